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


class Preconditioned(Wrapper):
    """The velocity of a Gaussian plus a field f of bounded reach in its whitened coordinates.

    Flow matching from N(0, I) to N(m, C) along an affine path a(s) x0 + b(s) x1 has a known
    solution. The points are N(b m, S) with S = a^2 I + b^2 C, and the velocity is
    b' m + (a a' I + b b' C) S^-1 (x - b m). The field is this velocity plus g S^(1/2) f(t, y),
    where y = S^(-1/2) (x - b m) with its length r softly limited, to r / sqrt(1 + r^2 / (dim
    reach^2)), and g(s) is about the size of what is left to learn. Scaling what a network is given
    and what it returns goes back to Karras et al. (2022, arXiv:2206.00364), by one number for all
    coordinates.

    If f starts at 0, the flow starts as the Gaussian with the data's mean and covariance. Far from
    the data f sees a point on a sphere, so that the velocity is the Gaussian's plus a bounded one:
    solves stay short there, and the log-density falls as that of a Gaussian. The divergence has a
    closed form if that of f has one.

    **Arguments:**

    - `field`: f, any field; it is given the time t and the context as they are.
    - `reference`: N(m, C), usually `jcnf.distributions.FullNormal.fit(x)`. It is not trained.
    - `path`: the path of `jcnf.objectives.flow_matching`; it must be a x0 + b x1 + c z, as all of
      `jcnf.objectives.paths` are. For another objective, any of them will do.
    - `reach`: distance from the mean, in standard deviations, beyond which f sees little change.
    - `t1`: the end time of the flow, at which s = t / t1 is 1.

    **Raises:** `ValueError` if the dimensions differ, and for a reach or an end time that is not
    positive.
    """

    field: Field
    reference: FullNormal
    path: Callable = eqx.field(static=True)
    reach: float = eqx.field(static=True, default=3.0)
    t1: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        check_field(self.field)
        check_instance(FullNormal, "a jcnf.distributions.FullNormal", reference=self.reference)
        check_callable("a function such as those in jcnf.objectives.paths", path=self.path)
        check_number("(0, inf)", reach=self.reach, t1=self.t1)
        if self.reference.dim != self.field.dim:
            raise ValueError(
                f"field and reference must have the same dim; got {self.field.dim} and "
                f"{self.reference.dim}"
            )

    def __call__(self, t, x, context=None):
        gaussian, y = self._gaussian(t, x.dtype), self._whiten(t, x)
        return self._velocity(gaussian, y, self.field(t, self._limit(y)[0], context))

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v, by the divergence of f and one product with its Jacobian.

        A whitened point y is limited to q y, with q = (1 + |y|^2 / (dim reach^2))^(-1/2). The
        Jacobian of this is q I - (q^3 / (dim reach^2)) y y'.
        """
        gaussian, y = self._gaussian(t, x.dtype), self._whiten(t, x)
        limited, q = self._limit(y)
        f, divergence = self.field.velocity_and_divergence(t, limited, context)
        _, pushed = jax.jvp(lambda y: self.field(t, y, context), (limited,), (y,))
        inner = q * divergence - q**3 * self._curvature * jnp.dot(y, pushed)
        total = jnp.sum(gaussian.rate) + gaussian.gain * inner
        return self._velocity(gaussian, y, f), total / self.t1

    @property
    def _curvature(self):
        return 1 / (self.field.dim * self.reach**2)

    def _limit(self, y):
        """Return y with its length limited, and the factor q by which it is shorter."""
        q = jax.lax.rsqrt(1 + self._curvature * jnp.sum(y**2))
        return q * y, q

    def _whiten(self, t, x):
        gaussian = self._gaussian(t, x.dtype)
        return ((x - gaussian.mean) @ self._basis(x.dtype)) / gaussian.std

    def _velocity(self, gaussian, y, f):
        moved = gaussian.std * (gaussian.rate * y + gaussian.gain * f)
        return (gaussian.drift + self._basis(y.dtype) @ moved) / self.t1

    def _basis(self, dtype):
        return jax.lax.stop_gradient(self.reference.basis).astype(dtype)

    def _gaussian(self, t, dtype) -> "_Gaussian":
        """Return the Gaussian at time `t`. It depends on no sample, so `vmap` computes it once."""
        s = t / self.t1
        one, zero = jnp.ones((), t.dtype), jnp.zeros((), t.dtype)
        parts = []
        for ends in ((one, zero, zero), (zero, one, zero), (zero, zero, one)):
            along = functools.partial(_along, self.path, ends)
            parts.append(jax.jvp(along, (s,), (jnp.ones_like(s),)))
        (a, da), (b, db), (c, dc) = parts
        moments = jax.lax.stop_gradient((self.reference.mean, self.reference.std))
        m, std = (moment.astype(dtype) for moment in moments)
        variance = a**2 + c**2 + b**2 * std**2
        rate = (a * da + c * dc + b * db * std**2) / variance
        # Given x, the velocity of a Gaussian path has standard deviation std |a b' - a' b| /
        # sqrt(variance). One number for all directions keeps the divergence of f in closed form.
        gain = jnp.abs(a * db - da * b) * jnp.mean(std / variance)
        return _Gaussian(b * m, db * m, jnp.sqrt(variance), rate, gain)


class _Gaussian(NamedTuple):
    """The Gaussian of a path at one time."""

    mean: Float[Array, " dim"]
    drift: Float[Array, " dim"]  # d mean / ds
    std: Float[Array, " dim"]  # along the axes of the reference
    rate: Float[Array, " dim"]  # d log std / ds
    gain: Float[Array, ""]  # of the field, relative to std


def _along(path: Callable, ends: Any, s: Float[Array, ""]) -> Float[Array, ""]:
    return path(s, *ends)
