"""Fields that add what a network learns to the known velocity of a Gaussian."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jcnf._checks import check_callable, check_instance, check_number
from jcnf.distributions import FullNormal
from jcnf.fields.base import Field, check_field
from jcnf.fields.wrappers import Wrapper


class GaussianResidual(Wrapper):
    """The velocity of a Gaussian plus a field f, which is given points of bounded distance.

    Flow matching from N(0, I) to N(m, C) along an affine path a(s) x0 + b(s) x1 has a known
    solution. The points are N(b m, S) with S = a^2 I + b^2 C, and the velocity is
    b' m + (a a' I + b b' C) S^-1 (x - b m); for another base, a has its standard deviation as a
    factor. The field is this velocity plus g(s) f(t, b m + q u). Here u = x - b m, and
    q = 1 / sqrt(1 + u' S^-1 u / (dim reach^2)) is about 1 on the data and falls as 1 / |u| far from
    them. The number g(s) is the standard deviation of a coordinate of the velocity, given x, if the
    data are the Gaussian. Splitting off the Gaussian solution goes back to Karras et al. (2022,
    arXiv:2206.00364), for one standard deviation in all directions.

    If f starts at 0, the flow starts as the Gaussian with the data's mean and covariance. Far from
    the data f sees a point on an ellipsoid, so that the velocity is the Gaussian's plus a bounded
    one: solves stay short there, and the log-density falls as that of a Gaussian. The divergence
    has a closed form if that of f has one.

    **Arguments:**

    - `field`: f, any field; it is given the time t and the context as they are.
    - `reference`: N(m, C), usually `jcnf.distributions.FullNormal.fit(x)`. It is not trained.
    - `path`: the path of `jcnf.objectives.flow_matching`; it must be a x0 + b x1 + c z, as all of
      `jcnf.objectives.paths` are. For another objective, any of them will do.
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
        check_instance(FullNormal, "a jcnf.distributions.FullNormal", reference=self.reference)
        check_callable("a function such as those in jcnf.objectives.paths", path=self.path)
        check_number("(0, inf)", reach=self.reach, t1=self.t1, base_std=self.base_std)
        if self.reference.dim != self.field.dim:
            raise ValueError(
                f"field and reference must have the same dim; got {self.field.dim} and "
                f"{self.reference.dim}"
            )

    def __call__(self, t, x, context=None):
        gaussian, u = self._centered(t, x)
        q, _ = self._limit(gaussian, u)
        f = self.field(t, gaussian.mean + q * u, context)
        return self._velocity(gaussian, u, f)

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v, by the divergence of f and one product with its Jacobian.

        The Jacobian of q u is q I - (q^3 / (dim reach^2)) u (S^-1 u)'.
        """
        gaussian, u = self._centered(t, x)
        q, w = self._limit(gaussian, u)
        point = gaussian.mean + q * u
        f, divergence = self.field.velocity_and_divergence(t, point, context)
        # The product with q u, not with u, which could overflow far from the data.
        _, pushed = jax.jvp(lambda x: self.field(t, x, context), (point,), (q * u,))
        inner = q * (divergence - q * self._curvature * jnp.dot(w, pushed))
        total = jnp.sum(gaussian.rate) + gaussian.gain * inner
        return self._velocity(gaussian, u, f), total / self.t1

    @property
    def _curvature(self):
        return 1 / (self.field.dim * self.reach**2)

    def _centered(self, t, x):
        gaussian = self._gaussian(t, x.dtype)
        return gaussian, x - gaussian.mean

    def _limit(self, gaussian, u):
        """Return q, and S^-1 u."""
        basis = self._basis(u.dtype)
        y = u @ basis
        # A sum of squares, because terms of u' S^-1 u could overflow with different signs.
        q = jax.lax.rsqrt(1 + self._curvature * jnp.sum(y**2 / gaussian.variance))
        return q, basis @ (y / gaussian.variance)

    def _velocity(self, gaussian, u, f):
        basis = self._basis(u.dtype)
        linear = basis @ (gaussian.rate * (u @ basis))
        return (gaussian.drift + linear + gaussian.gain * f) / self.t1

    def _basis(self, dtype):
        return jax.lax.stop_gradient(self.reference.basis).astype(dtype)

    def _gaussian(self, t, dtype) -> "_Gaussian":
        """Return the Gaussian at time `t`. It depends on no sample, so `vmap` computes it once."""
        s = t / self.t1
        base, one, zero = (jnp.asarray(value, t.dtype) for value in (self.base_std, 1, 0))
        parts = []
        for ends in ((base, zero, zero), (zero, one, zero), (zero, zero, one)):
            along = functools.partial(_along, self.path, ends)
            parts.append(jax.jvp(along, (s,), (jnp.ones_like(s),)))
        (a, da), (b, db), (c, dc) = parts
        moments = jax.lax.stop_gradient((self.reference.mean, self.reference.std))
        m, std = (moment.astype(dtype) for moment in moments)
        variance = a**2 + c**2 + b**2 * std**2
        rate = (a * da + c * dc + b * db * std**2) / variance
        # Given x, the velocity along an axis has standard deviation |a b' - a' b| std / sqrt(S).
        gain = jnp.abs(a * db - da * b) * jnp.sqrt(jnp.mean(std**2 / variance))
        return _Gaussian(b * m, db * m, variance, rate, gain)


class _Gaussian(NamedTuple):
    """The Gaussian of a path at one time."""

    mean: Float[Array, " dim"]
    drift: Float[Array, " dim"]  # d mean / ds
    variance: Float[Array, " dim"]  # along the axes of the reference
    rate: Float[Array, " dim"]  # d log std / ds
    gain: Float[Array, ""]  # of the field


def _along(path: Callable, ends: Any, s: Float[Array, ""]) -> Float[Array, ""]:
    return path(s, *ends)
