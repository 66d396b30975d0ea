"""Probability paths: how a base sample x0 at s=0 becomes a data point x1 at s=1.

A path is a function `path(s, x0, x1, z) -> x_s` of one sample, smooth in s. Here s in [0, 1] is the
fraction of the time that has passed, and z is standard normal noise, which a path may ignore. Its
velocity is its derivative in s, computed automatically, so a new path is a single function.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import check_callable, check_number

Vector = Float[Array, " dim"]
Path = Callable[[Float[Array, ""], Vector, Vector, Vector], Vector]


def velocity(
    path: Path, s: Float[Array, ""], x0: Vector, x1: Vector, z: Vector
) -> tuple[Vector, Vector]:
    """Return the point x_s of a path and its velocity dx_s/ds, each (dim,)."""
    return jax.jvp(lambda s: path(s, x0, x1, z), (s,), (jnp.ones_like(s),))


def linear(s, x0, x1, z):
    """Straight line (1 - s) x0 + s x1 (Liu et al. 2023; Lipman et al. 2023 with sigma_min 0)."""
    return (1 - s) * x0 + s * x1


def trigonometric(s, x0, x1, z):
    """Path cos(pi s/2) x0 + sin(pi s/2) x1 (Albergo & Vanden-Eijnden 2023).

    Its variance is constant if x0 and x1 have the same variance and are independent.
    """
    angle = jnp.asarray(np.pi / 2, s.dtype) * s
    return jnp.cos(angle) * x0 + jnp.sin(angle) * x1


@dataclasses.dataclass(frozen=True)
class SigmaMin:
    """Path (1 - (1 - sigma) s) x0 + s x1, which ends at x1 + sigma x0 (Lipman et al. 2023, eq. 22).

    **Raises:** `ValueError` if `sigma` is not in [0, 1).
    """

    sigma: float = 1e-2

    def __post_init__(self):
        check_number("[0, 1)", sigma=self.sigma)

    def __call__(self, s, x0, x1, z):
        return (1 - (1 - self.sigma) * s) * x0 + s * x1


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """Path a x1 + sqrt(1 - a^2) x0 of a variance-preserving diffusion.

    Here log a = -(low u + (high - low) u^2 / 2) / 2 with u = 1 - (1 - end) s: the linear schedule
    from `low` to `high` (Song et al. 2021; Lipman et al. 2023, eq. 18), for a standard normal base.
    At s=0, a is exp(-(low + high) / 4), 0.0066 by default, so the path does not start exactly in
    the base. At u=0 the velocity would be infinite, so the path stops at u = `end`, where x1 is
    blurred by (low end)^(1/2) x0, by default 0.01 x0.

    **Raises:** `ValueError` unless 0 < low <= high and 0 < end < 1.
    """

    low: float = 0.1
    high: float = 20.0
    end: float = 1e-3

    def __post_init__(self):
        check_number("(0, inf)", low=self.low, high=self.high)
        check_number("(0, 1)", end=self.end)
        if self.low > self.high:
            raise ValueError(f"expected low <= high; got {self.low} and {self.high}")

    def __call__(self, s, x0, x1, z):
        u = 1 - (1 - self.end) * s
        exponent = self.low * u + (self.high - self.low) * u**2 / 2
        return jnp.exp(-exponent / 2) * x1 + jnp.sqrt(-jnp.expm1(-exponent)) * x0


def bump(s):
    """Return sin^2(pi s), noise that is 0 at both ends, with slope 0."""
    return jnp.sin(jnp.asarray(np.pi, s.dtype) * s) ** 2


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Stochastic interpolant: path + sigma gamma(s) z (Albergo et al. 2023, definition 2.1).

    `gamma` must be 0 at both ends. The Brownian bridge, sqrt(s (1 - s)), also works, but its
    velocity has infinite variance at the ends: draw times away from them.

    **Raises:** `ValueError` if `sigma` is negative or not finite, or a function is not callable.
    """

    sigma: float = 0.1
    path: Path = linear
    gamma: Callable = bump

    def __post_init__(self):
        check_number("[0, inf)", sigma=self.sigma)
        check_callable("a function such as jcnf.objectives.paths.linear", path=self.path)
        check_callable("a function such as jcnf.objectives.paths.bump", gamma=self.gamma)

    def __call__(self, s, x0, x1, z):
        return self.path(s, x0, x1, z) + self.sigma * self.gamma(s) * z


PATHS: dict[str, Path] = {
    "linear": linear,
    "trigonometric": trigonometric,
    "sigma_min": SigmaMin(),
    "variance_preserving": VariancePreserving(),
    "stochastic": Stochastic(),
}
