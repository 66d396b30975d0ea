"""The interface of manifolds, whose points are vectors of coordinates."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

TOLERANCE = 1e-2  # a point with a coordinate farther off than this is not on the manifold

Point = Float[Array, " dim"]
Tangent = Float[Array, " dim"]
QuadratureRule = tuple[Float[np.ndarray, "points dim"], Float[np.ndarray, " points"]]


class Manifold(eqx.Module):
    """A Riemannian manifold whose points and tangent vectors are vectors of `dim` coordinates.

    Every method takes one point, and `jax.vmap` makes it take a batch. Values and gradients are
    finite everywhere, also for equal points and at the cut locus (antipodes), where `log` returns
    one of the shortest geodesics. Points are taken to lie on the manifold, except by `project` and
    `extend_velocity`.
    """

    # The number of coordinates of a point. To a type checker, an abstract variable would be the
    # first argument of `__init__`.
    if TYPE_CHECKING:
        dim = 0
    else:
        dim: eqx.AbstractVar[int]

    @property
    @abstractmethod
    def intrinsic_dim(self) -> int:
        """Dimension of the manifold."""

    @property
    def embedding_dim(self) -> int:
        """Number of coordinates of an embedded point, `dim` unless they differ (torus)."""
        return self.dim

    @property
    @abstractmethod
    def log_volume(self) -> float:
        """Logarithm of the Riemannian volume, or inf."""

    @abstractmethod
    def project(self, x: Point, tolerance: float = np.inf) -> Point:
        """Return the nearest point of the manifold; NaN if a coordinate moves by over `tolerance`.

        It is differentiable in `x`.
        """

    @abstractmethod
    def tangent(self, x: Point, v: Float[Array, " dim"]) -> Tangent:
        """Return the orthogonal projection of `v` on the tangent space at `x`."""

    @abstractmethod
    def frame(self, x: Point) -> Float[Array, "intrinsic_dim dim"]:
        """Return an orthonormal basis (in R^dim) of the tangent space at `x`, as rows."""

    @abstractmethod
    def exp(self, x: Point, v: Tangent) -> Point:
        """Return the end of the geodesic from `x` with velocity `v`, after unit time."""

    @abstractmethod
    def log(self, x: Point, y: Point) -> Tangent:
        """Return the velocity of a shortest geodesic from `x` to `y` in unit time."""

    @abstractmethod
    def distance(self, x: Point, y: Point) -> Float[Array, ""]:
        """Return the length of a shortest geodesic; its gradient is 0 for equal points."""

    @abstractmethod
    def uniform(
        self, key: Key[Array, ""], num_samples: int, dtype: Any = None
    ) -> Float[Array, "num_samples dim"]:
        """Draw independent points that are uniform in volume; consumes `key`.

        **Raises:** `ValueError` for a manifold of infinite volume.
        """

    def quadrature(self, n: int) -> QuadratureRule | None:
        """Return the points and weights of a quadrature rule, with about `n` points an axis.

        The weights sum to the volume. Return None if there is no rule for this manifold.
        """
        return None

    def embed(self, x: Point) -> Float[Array, " embedding_dim"]:
        """Return the continuous coordinates of `x` that networks take."""
        return x

    def pull_back(self, x: Point, w: Float[Array, " embedding_dim"]) -> Tangent:
        """Return the tangent part of a vector `w` at `embed(x)`, in coordinates of `x`."""
        return self.tangent(x, w)

    def extend_velocity(
        self, x: Float[Array, " dim"], p: Point, v: Tangent
    ) -> Float[Array, " dim"]:
        """Return the velocity at `x`, whose nearest point is `p`, that moves `p` with velocity `v`.

        The rest of x stays as it is, and the divergence in R^dim at p is the Riemannian divergence
        of v.
        """
        return v


def within(tolerance: float, x: Float[Array, " dim"], nearest: Point) -> Point:
    """Return `nearest`, or NaN if it is farther from `x` in any coordinate than `tolerance`."""
    if tolerance == np.inf:
        return nearest
    return jnp.where(jnp.max(jnp.abs(x - nearest)) <= tolerance, nearest, jnp.nan)
