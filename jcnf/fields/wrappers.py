"""Fields made of other fields. The divergence has a closed form if every field inside has one."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key, check_number
from jcnf.fields.base import Field, check_field, check_not_on_manifold
from jcnf.fields.layers import uniform


class Wrapper(Field):
    """A field around another one, with the same `dim`, `context_dim` and `manifold`."""

    field: eqx.AbstractVar[Field]

    def __check_init__(self):
        check_field(self.field)

    @property
    def dim(self) -> int:
        """Dimension of x."""
        return self.field.dim

    @property
    def context_dim(self) -> int:
        """Size of the conditioning vector, 0 for none."""
        return self.field.context_dim

    @property
    def manifold(self) -> Any:
        """The manifold of x, None for R^dim."""
        return self.field.manifold


class Cast(Wrapper):
    """The field f computed in another dtype, for mixed precision.

    The parameters, inputs and computations of f are in `dtype`. The velocity is cast back to the
    dtype of x, so that the state of a solve, its error control and the sum of a log-det keep their
    precision. A closed-form divergence is computed in `dtype` as well.

    **Arguments:**

    - `field`: f, any field. Its arrays keep their dtype and are cast at each call.
    - `dtype`: a floating dtype, such as `jnp.bfloat16`.

    **Raises:** `ValueError` for a dtype that is not floating.
    """

    field: Field
    dtype: Any = eqx.field(static=True)

    def __check_init__(self):
        try:
            floating = self.dtype is not None and jnp.issubdtype(self.dtype, jnp.floating)
        except TypeError:
            floating = False
        if not floating:
            raise ValueError(
                f"dtype must be a floating dtype, such as jnp.bfloat16; got {self.dtype}"
            )

    def _down(self, *values):
        def cast(leaf):
            return leaf.astype(self.dtype) if eqx.is_inexact_array(leaf) else leaf

        return jax.tree.map(cast, (self.field, *values))

    def __call__(self, t, x, context=None):
        field, *arguments = self._down(t, x, context)
        return field(*arguments).astype(x.dtype)

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v, both computed in `dtype`."""
        field, *arguments = self._down(t, x, context)
        v, divergence = field.velocity_and_divergence(*arguments)
        return v.astype(x.dtype), divergence.astype(x.dtype)


class MinusIdentity(Wrapper):
    """The field v(t, x) = f(t, x) - x (FFJORD's residual option, Grathwohl et al. 2019).

    **Arguments:**

    - `field`: f, any field in R^dim.
    """

    field: Field

    def __check_init__(self):
        check_field(self.field)
        check_not_on_manifold(self.field)

    def __call__(self, t, x, context=None):
        return self.field(t, x, context) - x

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v = div f - dim."""
        v, divergence = self.field.velocity_and_divergence(t, x, context)
        return v - x, divergence - self.dim


class TimeRescaling(Wrapper):
    """The field v(t, x) = r f(start + r t, x): f from time `start` on, run r times as fast.

    With `rate=T` and a flow with `t1=1`, the end time T of f is trained too (FFJORD's option,
    Grathwohl et al. 2019). The module stores the square root of r, which keeps r positive.

    **Arguments:**

    - `field`: f, any field.
    - `rate`: initial value of r, positive.
    - `start`: the time of f at t=0. It has no gradient; pass a float, because weight decay would
      change an array.

    **Raises:** `ValueError` for a concrete rate that is not positive and finite, and for a concrete
    start that is not finite.
    """

    field: Field
    sqrt_rate: Float[Array, ""]
    start: float | Float[Array, ""]

    def __init__(
        self, field: Field, rate: float | Float[Array, ""], start: float | Float[Array, ""] = 0.0
    ):
        check_number("(0, inf)", rate=rate)
        check_number("(-inf, inf)", start=start)
        self.field = field
        self.sqrt_rate = jnp.sqrt(jnp.asarray(rate, jnp.result_type(rate, float)))
        self.start = start

    @property
    def rate(self) -> Float[Array, ""]:
        """The time r of f that passes per unit of time."""
        return self.sqrt_rate**2

    def _time(self, t):
        return jax.lax.stop_gradient(self.start) + self.rate * t

    def __call__(self, t, x, context=None):
        return self.rate * self.field(self._time(t), x, context)

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v = r div f."""
        v, divergence = self.field.velocity_and_divergence(self._time(t), x, context)
        return self.rate * v, self.rate * divergence

    def gradient(self, t, x):
        """Return the gradient of the potential r Phi(x, start + r t) in (x, t)."""
        *by_x, by_t = self.rate * self.field.gradient(self._time(t), x)
        return jnp.stack([*by_x, self.rate * by_t])


class Mixture(Field):
    """Mixture of experts v(t, x) = sum_i p_i(t) f_i(t, x), with shares p = softmax(w t + b).

    This is FFJORD's mixture layer (Grathwohl et al. 2019), applied to whole fields. The shares
    depend only on time, so that divergences mix as velocities do.

    **Arguments:**

    - `fields`: the experts f_i, with the same `dim` and the same `context_dim`.
    - `key`: consumed once, for w and b: uniform in (-1, 1).

    **Raises:** `ValueError` for no fields, and for fields that differ in `dim` or `context_dim`.
    """

    fields: tuple[Field, ...]
    share_weight: Float[Array, " fields"]
    share_bias: Float[Array, " fields"]
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)

    def __init__(self, fields: Sequence[Field], *, key: Key[Array, ""]):
        for one in fields:
            check_field(one)
        check_key(key)
        sizes = {(field.dim, field.context_dim) for field in fields}
        if len(sizes) != 1:
            raise ValueError(
                "fields must be at least one field, all of one dim and one context_dim; got "
                f"{len(fields)} fields of (dim, context_dim) {sorted(sizes)}"
            )
        if any(field.manifold != fields[0].manifold for field in fields):
            raise ValueError("fields must all be on the same manifold")
        weight_key, bias_key = jr.split(key)
        self.fields = tuple(fields)
        self.share_weight = uniform(weight_key, (len(self.fields),), 1)
        self.share_bias = uniform(bias_key, (len(self.fields),), 1)
        ((self.dim, self.context_dim),) = sizes

    @property
    def manifold(self) -> Any:
        """The manifold of x, None for R^dim."""
        return self.fields[0].manifold

    def shares(self, t: Float[Array, ""]) -> Float[Array, " fields"]:
        """Return p(t), the experts' shares of the velocity: positive, with sum 1."""
        return jax.nn.softmax(self.share_weight * t + self.share_bias)

    def __call__(self, t, x, context=None):
        return self.shares(t) @ jnp.stack([field(t, x, context) for field in self.fields])

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v = sum_i p_i div f_i."""
        pairs = [field.velocity_and_divergence(t, x, context) for field in self.fields]
        v, divergence = (jnp.stack(parts) for parts in zip(*pairs, strict=True))
        return self.shares(t) @ v, self.shares(t) @ divergence


class Guided(Wrapper):
    """Classifier-free guidance, v(t, x, c) = f(t, x, 0) + scale (f(t, x, c) - f(t, x, 0)).

    In the notation of Ho & Salimans (2022), the scale is 1 + w; Zheng et al. (2023) apply it to
    flows.

    0 is the null context, which `objectives.flow_matching(..., drop_context=rate)` trains too.
    Contexts must not be 0 themselves: encode classes as one-hot vectors, and add a column of ones
    to numbers. With `scale` 1 this is f, and with 0 it is f without a context. Above 1, samples
    keep closer to what distinguishes their context from others, and no longer follow p(x | c).
    Log-densities are those of the guided flow.

    **Arguments:**

    - `field`: f, a field that takes a context.
    - `scale`: any finite number; as an array, many values share one compiled program.

    **Raises:** `ValueError` for a scale that is not finite, and for a call without a context.
    """

    field: Field
    scale: float | Float[Array, ""]

    def __check_init__(self):
        check_number("(-inf, inf)", scale=self.scale)

    def __call__(self, t, x, context=None):
        without = self.field(t, x, _null(context))
        return without + self.scale * (self.field(t, x, context) - without)

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v, the same combination of the divergences of f."""
        v, div = self.field.velocity_and_divergence(t, x, context)
        v0, div0 = self.field.velocity_and_divergence(t, x, _null(context))
        return v0 + self.scale * (v - v0), div0 + self.scale * (div - div0)


class Embedded(Field):
    """The field v(t, x, c) = f(t, x, e(c)), with a network e that shortens the context.

    The network is trained with f. It is evaluated anew at each evaluation of the field.

    **Arguments:**

    - `field`: f, a field whose context has as many entries as e returns.
    - `embedding`: e, a module from one context (context_dim,) to features (field.context_dim,).
    - `context_dim`: the size of c.

    **Raises:** `ValueError` if e does not return what f takes.
    """

    field: Field
    embedding: Callable[[Float[Array, " context"]], Float[Array, " features"]]
    context_dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_field(self.field)
        check_int(context_dim=self.context_dim)
        size = embedded_size(self.embedding, self.context_dim)
        if size != self.field.context_dim:
            raise ValueError(
                f"the embedding returns {size} features, but the field takes a context of size "
                f"{self.field.context_dim}"
            )

    @property
    def dim(self) -> int:
        """Dimension of x."""
        return self.field.dim

    @property
    def manifold(self) -> Any:
        """The manifold of x, None for R^dim."""
        return self.field.manifold

    def _features(self, context):
        return self.embedding(context)

    def __call__(self, t, x, context=None):
        return self.field(t, x, self._features(context))

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v, those of f."""
        return self.field.velocity_and_divergence(t, x, self._features(context))

    def velocity_divergence_and_product(self, t, x, vector, context=None):
        """Return v (dim,), div v, and the Jacobian's product with `vector` (dim,), those of f."""
        return self.field.velocity_divergence_and_product(t, x, vector, self._features(context))


def embedded_size(embedding: Any, context_dim: int) -> int:
    """Return the number of features that an embedding makes of one context.

    **Raises:** `ValueError` if it does not return a vector.
    """
    out = eqx.filter_eval_shape(embedding, jax.ShapeDtypeStruct((context_dim,), float))
    if not hasattr(out, "shape") or len(out.shape) != 1:
        raise ValueError(f"an embedding must return a vector; got {out!r}")
    return out.shape[0]


def _null(context):
    if context is None:
        raise ValueError("a guided field needs a context: pass context of shape (batch, context)")
    return jnp.zeros_like(context)
