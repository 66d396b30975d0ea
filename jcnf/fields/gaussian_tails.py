"""Fields that turn into the known velocity of a Gaussian far from the data."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jcnf._checks import check_callable, check_instance, check_number
from jcnf.distributions import FullNormal
from jcnf.fields.base import Field, check_field, check_not_on_manifold
from jcnf.fields.wrappers import Wrapper


class GaussianTails(Wrapper):
    """A field that is f near the data, and nearly the velocity of a Gaussian far from them.

    Flow matching trains a field where the data are, but nothing determines it elsewhere. For
    Gaussian data N(m, C) and an affine path a(s) x0 + b(s) x1 from N(0, I), the solution is known:
    the points are N(b m, S) with S = a^2 I + b^2 C, and the velocity at b m + u is b' m + L u with
    L = S' S^-1 / 2. (With base samples of another standard deviation, a is multiplied by it; if
    the path adds noise c z, S has c^2 I too.) This field
    is f(t, p) + (1 - q) L u, where p = b m + q u, q = (1 + z^2)^(-1/4) and
    z = u' S^-1 u / (dim reach^2). In other words, f sees the point drawn toward the mean, and the
    Gaussian moves the rest.

    On the data q is about 1, so the field is f. Far from them q falls as 1 / |u|. There f sees a
    point on an ellipsoid, and the velocity is the Gaussian's plus a bounded one: solves stay short,
    and the log-density falls as that of a Gaussian. The divergence has a closed form if that of f
    has one.

    **Arguments:**

    - `field`: f, any field in R^dim; it gets t and the context unchanged.
    - `reference`: N(m, C), usually `jcnf.distributions.FullNormal.fit(x)`. It is not trained.
    - `path`: the path of `jcnf.objectives.flow_matching`; it must be a x0 + b x1 + c z, as all of
      `jcnf.objectives.paths` are, with a, b and c smooth on [0, 1] (so not the Brownian bridge).
      With an objective other than flow matching, any of these paths will do.
    - `reach`: distance from the mean, in standard deviations, beyond which f sees little change.
    - `t1`: the end time of the flow, at which s = t / t1 is 1.
    - `base_std`: the standard deviation of each coordinate of the flow's base distribution.

    **Raises:** `ValueError` if the dimensions differ, and for a reach, an end time or a standard
    deviation that is not positive.
    """

    field: Field
    reference: FullNormal
    path: Callable = eqx.field(static=True)
    reach: float = eqx.field(static=True, default=3.0)
    t1: float = eqx.field(static=True, default=1.0)
    base_std: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        check_field(self.field)
        check_not_on_manifold(self.field)
        check_instance(FullNormal, "a jcnf.distributions.FullNormal", reference=self.reference)
        check_callable("a function such as those in jcnf.objectives.paths", path=self.path)
        check_number("(0, inf)", reach=self.reach, t1=self.t1, base_std=self.base_std)
        if self.reference.dim != self.field.dim:
            raise ValueError(
                f"field and reference must have the same dim; got {self.field.dim} and "
                f"{self.reference.dim}"
            )

    def __call__(self, t, x, context=None):
        tails = self._tails(t, x)
        return self.field(t, tails.point, context) + tails.velocity

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v, by the divergence of f and one product with its Jacobian J.

        With k = z q^2 / (dim reach^2), the gradient of q is -k q^3 S^-1 u. So the divergence is
        q tr J + (1 - q) tr L + k q^3 u' S^-1 (L - J) u.
        """
        tails = self._tails(t, x)
        basis, near = self._basis(x.dtype), tails.near
        f, divergence, pushed = self.field.velocity_divergence_and_product(
            t, tails.point, basis @ near, context
        )
        # In this order, because u' S^-1 u could overflow far from the data.
        change = jnp.sum(near / tails.variance * (tails.rate * near - pushed @ basis))
        q, k = tails.q, tails.z * tails.q**2 * self._scale
        divergence = q * (divergence + k * change) + (1 - q) * jnp.sum(tails.rate)
        return f + tails.velocity, divergence

    @property
    def _scale(self):
        return 1 / (self.field.dim * self.reach**2)

    def _tails(self, t, x) -> "_Tails":
        basis = self._basis(x.dtype)
        mean, variance, rate = self._gaussian(t, x.dtype)
        y = (x - mean) @ basis
        # Clipped to the largest finite number, so that z q^2 is finite wherever x is.
        z = jnp.minimum(self._scale * jnp.sum(y**2 / variance), jnp.finfo(x.dtype).max)
        q = jax.lax.rsqrt(jnp.hypot(jnp.ones_like(z), z))
        near = q * y
        velocity = basis @ ((1 - q) * rate * y)
        return _Tails(z, q, near, mean + basis @ near, velocity, variance, rate)

    def _basis(self, dtype):
        return jax.lax.stop_gradient(self.reference.basis).astype(dtype)

    def _gaussian(self, t, dtype):
        """Return b m, the eigenvalues of S, and those of L, which is half of d log S / dt.

        They depend on no sample, so that `vmap` computes them once.
        """
        m, std = (
            jax.lax.stop_gradient(moment).astype(dtype)
            for moment in (self.reference.mean, self.reference.std)
        )

        def moments(t):
            base, one, zero = (jnp.asarray(value, t.dtype) for value in (self.base_std, 1, 0))
            s = t / self.t1
            a = self.path(s, base, zero, zero)
            b = self.path(s, zero, one, zero)
            c = self.path(s, zero, zero, one)
            return b * m, a**2 + c**2 + (b * std) ** 2

        (mean, variance), (_, slope) = jax.jvp(moments, (t,), (jnp.ones_like(t),))
        return mean, variance, slope / (2 * variance)


class _Tails(NamedTuple):
    """What the Gaussian adds to f at one point x = b m + u, with u = basis @ y."""

    z: Float[Array, ""]
    q: Float[Array, ""]
    near: Float[Array, " dim"]  # q y
    point: Float[Array, " dim"]  # p, where f is evaluated
    velocity: Float[Array, " dim"]  # (1 - q) L u
    variance: Float[Array, " dim"]  # along the axes of the reference
    rate: Float[Array, " dim"]  # d log std / dt along them
