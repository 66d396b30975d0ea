"""Flat manifolds: Euclidean space and the torus."""

import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jcnf._checks import check_int
from jcnf.manifolds._smooth import norm
from jcnf.manifolds.base import Manifold


class _Flat(Manifold):
    dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_int(dim=self.dim)

    @property
    def intrinsic_dim(self):
        """Dimension of the manifold."""
        return self.dim

    def tangent(self, x, v):
        return v

    def frame(self, x):
        return jnp.eye(self.dim, dtype=x.dtype)

    def exp(self, x, v):
        return self.project(x + v)

    def log(self, x, y):
        return self.project(y - x)

    def distance(self, x, y):
        return norm(self.log(x, y))


class Euclidean(_Flat):
    """The space R^dim, which is useful as a part of a `Product`.

    **Arguments:**

    - `dim`: number of coordinates.
    """

    @property
    def log_volume(self):
        """Infinity."""
        return math.inf

    def project(self, x, tolerance=np.inf):
        return x

    def uniform(self, key, num_samples, dtype=None):
        """Raise `ValueError`: there is no uniform distribution."""
        raise ValueError("Euclidean space has no uniform distribution: use a normal one")


class Torus(_Flat):
    """The torus of `dim` angles in radians, with the flat metric: each angle is in [-pi, pi).

    Any real number is an angle; `project` wraps it, up to rounding. Networks are given the cosines,
    then the sines of the angles, so that fields are periodic (`embedding_dim` is 2 `dim`). The
    quadrature is the trapezoidal rule, n^dim points.

    **Arguments:**

    - `dim`: number of angles.
    """

    @property
    def embedding_dim(self):
        """Number of cosines and sines."""
        return 2 * self.dim

    @property
    def log_volume(self):
        """Logarithm of (2 pi)^dim."""
        return self.dim * math.log(2 * math.pi)

    def project(self, x, tolerance=np.inf):
        return x - 2 * math.pi * jnp.floor((x + math.pi) / (2 * math.pi))

    def uniform(self, key, num_samples, dtype=None):
        shape = (num_samples, self.dim)
        return jr.uniform(key, shape, dtype, minval=-math.pi, maxval=math.pi)

    def quadrature(self, n):
        check_int(n=n)
        angles = [-math.pi + 2 * math.pi / n * np.arange(n)] * self.dim
        points = np.stack(np.meshgrid(*angles, indexing="ij"), -1).reshape(-1, self.dim)
        return points, np.full(len(points), (2 * math.pi / n) ** self.dim)

    def embed(self, x):
        return jnp.concatenate([jnp.cos(x), jnp.sin(x)])

    def pull_back(self, x, w):
        """Return the angular velocities -sin(x) w_cos + cos(x) w_sin."""
        return jnp.cos(x) * w[self.dim :] - jnp.sin(x) * w[: self.dim]
