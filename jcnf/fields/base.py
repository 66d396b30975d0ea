"""The type of velocity fields, and their Jacobian dv/dx by forward mode."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jcnf._checks import check_instance, check_int

CHUNK = 64


class Field(eqx.Module):
    """A velocity field v(t, x, c) of one sample. Subclass it to define one:

        class Rotation(jcnf.fields.Field):
            rate: Float[Array, ""]
            dim: int = eqx.field(static=True, default=2)

            def __call__(self, t, x, context=None):
                return self.rate * jnp.stack([-x[1], x[0]])

    Override `velocity_and_divergence` if the divergence has a closed form, and `gradient` if the
    velocity is the gradient of a known potential. A field with a context sets `context_dim` to its
    size.

    **Raises:** `ValueError` unless `dim` is at least 1 and `context_dim` at least 0.
    """

    # Not annotated, so that subclasses may replace them by a dataclass field or by a property. To a
    # type checker, an abstract variable would be the first argument of `__init__`.
    if TYPE_CHECKING:
        dim = 0
    else:
        dim: eqx.AbstractVar[int]
    context_dim = 0
    manifold = cast(Any, None)  # a jcnf.manifolds.Manifold, or None for R^dim

    def __check_init__(self):
        check_int(dim=self.dim)
        check_int(0, context_dim=self.context_dim)

    @abstractmethod
    def __call__(
        self,
        t: Float[Array, ""],
        x: Float[Array, " dim"],
        context: Float[Array, " context"] | None = None,
    ) -> Float[Array, " dim"]:
        """Return the velocity dx/dt at time `t`, (dim,)."""

    def velocity_and_divergence(
        self,
        t: Float[Array, ""],
        x: Float[Array, " dim"],
        context: Float[Array, " context"] | None = None,
    ) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Return v (dim,) and tr(dv/dx), exactly; by forward mode unless overridden."""
        v, divergence, _ = trace_and_frobenius(self, t, x, context)
        return v, divergence

    def velocity_divergence_and_product(
        self,
        t: Float[Array, ""],
        x: Float[Array, " dim"],
        vector: Float[Array, " dim"],
        context: Float[Array, " context"] | None = None,
    ) -> tuple[Float[Array, " dim"], Float[Array, ""], Float[Array, " dim"]]:
        """Return v (dim,), div v, and the Jacobian's product with `vector` (dim,).

        Unless it is overridden, this takes one product more than the divergence. Override it where
        the divergence takes the whole Jacobian anyway.
        """
        v, divergence = self.velocity_and_divergence(t, x, context)
        _, product = jax.jvp(lambda x: self(t, x, context), (x,), (vector,))
        return v, divergence, product

    def gradient(self, t: Float[Array, ""], x: Float[Array, " dim"]) -> Float[Array, " dim+1"]:
        """Return the gradient in (x, t) of the potential Phi, for a field v = -grad_x Phi.

        **Raises:** `ValueError` for a field without a known potential.
        """
        raise ValueError(
            f"field must have a potential, but {type(self).__name__} has none: use "
            "jcnf.fields.Potential"
        )


def check_not_on_manifold(field: Field) -> None:
    """Raise `ValueError` for a field on a manifold, to which no vectors of R^dim can be added."""
    if field.manifold is not None:
        raise ValueError(
            f"field must be in R^dim; got one on {field.manifold}: change the field inside the "
            "TangentField instead"
        )


def check_field(field: Any) -> None:
    """Raise `ValueError` unless `field` is a `Field` whose static attributes cannot change.

    A compiled program would keep the values that it read from them when it was traced.
    """
    hint = (
        "a jcnf.fields.Field: subclass it, as in `class MyField(jcnf.fields.Field): dim: int = 2; "
        "def __call__(self, t, x, context=None): ...`, and pass an instance"
    )
    check_instance(Field, hint, field=field)
    for name, value in _static_attributes(field):
        try:
            hash(value)
        except TypeError as error:
            raise ValueError(
                f"field must have hashable static attributes; got {name}, an {error}: use a tuple "
                "for a list, and an attribute that is not static for an array"
            ) from None


def _static_attributes(tree):
    """Yield the name and value of each static attribute of the modules in a pytree."""
    for module in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, eqx.Module)):
        if not isinstance(module, eqx.Module):
            continue
        for field in dataclasses.fields(module):
            value = getattr(module, field.name, None)
            if field.metadata.get("static"):
                yield f"{type(module).__name__}.{field.name}", value
            else:
                yield from _static_attributes(value)


def pushforward(field: Field, t, x, context) -> Callable:
    """Return the map from (e,) to v and (dv/dx) e, which is linear in e.

    It raises `ValueError` if the velocity does not have the shape of `x`.
    """

    def velocity(x):
        v = field(t, x, context)
        if v.shape != x.shape:
            raise ValueError(f"the field must give an array of shape {x.shape}; got {v.shape}")
        return v

    return partial(jax.jvp, velocity, (x,))


def jvps(
    field: Field, t, x, context, tangents: Float[Array, "k dim"]
) -> tuple[Float[Array, " dim"], Float[Array, "k dim"]]:
    """Return v, and (dv/dx) e for each row e of `tangents`.

    This takes one jvp per row, and computes the velocity once.
    """
    return jax.vmap(pushforward(field, t, x, context), out_axes=(None, 0))((tangents,))


def trace_and_frobenius(
    field: Field,
    t,
    x,
    context,
    directions: Float[Array, "k dim"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, " dim"], Float[Array, ""], Float[Array, ""]]:
    """Return v, and the sums over k of e_k' (dv/dx) e_k and |(dv/dx) e_k|^2.

    By default the e_k are the unit vectors, and the sums are tr(dv/dx) and |dv/dx|_F^2. With more
    than `chunk` directions, the products are computed `chunk` at a time and recomputed in reverse
    mode, so that memory does not grow with their number.
    """
    push = pushforward(field, t, x, context)
    directions = jnp.eye(len(x), dtype=x.dtype) if directions is None else directions
    if len(directions) <= chunk:
        v, images = jax.vmap(push, out_axes=(None, 0))((directions,))
        return v, jnp.sum(directions * images), jnp.sum(images**2)

    @jax.checkpoint
    def one(direction):
        _, image = push((direction,))
        return direction @ image, image @ image

    diagonal, squares = jax.lax.map(one, directions, batch_size=chunk)
    return field(t, x, context), jnp.sum(diagonal), jnp.sum(squares)
