"""Probability paths: how a base sample x0 at s=0 becomes a data point x1 at s=1.

A path is a function `path(s, x0, x1, z) -> x_s` of one sample, smooth in s, where s in [0, 1] is
the share of the time that has passed and z is standard normal noise, for paths that take some. Its
velocity is its derivative in s: a path of one's own is one function, and nothing else.
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
    """The point x_s of a path and its velocity dx_s/ds, (dim,) each."""
    return jax.jvp(lambda s: path(s, x0, x1, z), (s,), (jnp.ones_like(s),))


def linear(s, x0, x1, z):
    """(1 - s) x0 + s x1: straight lines (Liu et al. 2023; Lipman et al. 2023 with sigma_min 0)."""
    return (1 - s) * x0 + s * x1


def trigonometric(s, x0, x1, z):
    """cos(pi s/2) x0 + sin(pi s/2) x1: of constant variance (Albergo & Vanden-Eijnden 2023)."""
    angle = jnp.asarray(np.pi / 2, s.dtype) * s
    return jnp.cos(angle) * x0 + jnp.sin(angle) * x1


@dataclasses.dataclass(frozen=True)
class SigmaMin:
    """(1 - (1 - sigma) s) x0 + s x1: ends in x1 blurred by sigma x0 (Lipman et al. 2023, eq. 22).

    **Raises:** `ValueError` for a sigma not in [0, 1).
    """

    sigma: float = 1e-2

    def __post_init__(self):
        check_number("[0, 1)", sigma=self.sigma)

    def __call__(self, s, x0, x1, z):
        """The point at s."""
        return (1 - (1 - self.sigma) * s) * x0 + s * x1


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """a x1 + sqrt(1 - a^2) x0, log a = -(low u + (high - low) u^2 / 2) / 2, u = 1 - (1 - end) s.

    The path of a variance-preserving diffusion with the linear schedule from `low` to `high` (Song
    et al. 2021; Lipman et al. 2023, eq. 18), for a standard normal base. At s=0 a is exp(-(low +
    high) / 4), 0.0066 by default, so that it starts in the base up to that. At u=0 the velocity
    would be infinite: the path stops at u = `end`, in x1 blurred by (low end)^(1/2) x0, 0.01 by
    default.

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
        """The point at s."""
        u = 1 - (1 - self.end) * s
        exponent = self.low * u + (self.high - self.low) * u**2 / 2
        return jnp.exp(-exponent / 2) * x1 + jnp.sqrt(-jnp.expm1(-exponent)) * x0


def bump(s):
    """sin^2(pi s): noise that comes and goes with a velocity of 0."""
    return jnp.sin(jnp.asarray(np.pi, s.dtype) * s) ** 2


@dataclasses.dataclass(frozen=True)
class Stochastic:
    """path + sigma gamma(s) z: a stochastic interpolant (Albergo et al. 2023, definition 2.1).

    `gamma` is 0 at both ends. sqrt(s (1 - s)), the Brownian bridge, is possible too, but its
    velocity has infinite variance at the ends: draw times away from them.

    **Raises:** `ValueError` for a negative sigma.
    """

    sigma: float = 0.1
    path: Path = linear
    gamma: Callable = bump

    def __post_init__(self):
        check_number("[0, inf)", sigma=self.sigma)
        check_callable(
            "a function, as jcnf.objectives.paths.linear is", path=self.path, gamma=self.gamma
        )

    def __call__(self, s, x0, x1, z):
        """The point at s."""
        return self.path(s, x0, x1, z) + self.sigma * self.gamma(s) * z


PATHS: dict[str, Path] = {
    "linear": linear,
    "trigonometric": trigonometric,
    "sigma_min": SigmaMin(),
    "variance_preserving": VariancePreserving(),
    "stochastic": Stochastic(),
}
