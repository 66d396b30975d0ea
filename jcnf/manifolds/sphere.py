"""The sphere."""

import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from jcnf._checks import check_int
from jcnf.manifolds._smooth import angle_over_sine, cos, dot, norm, sinc
from jcnf.manifolds.base import Manifold, within


class Sphere(Manifold):
    """The unit sphere S^n in R^(n+1), with the metric of R^(n+1): distances are angles.

    There is a quadrature for S^1 (n points) and for S^2, with n Gauss-Legendre nodes along the
    axis and 2n longitudes.

    **Arguments:**

    - `n`: the dimension of the sphere: 1 for the circle, 2 for directions in space.
    """

    n: int = eqx.field(static=True)

    def __check_init__(self):
        check_int(n=self.n)

    @property
    def dim(self):
        """Number of coordinates, n + 1."""
        return self.n + 1

    @property
    def intrinsic_dim(self):
        """Dimension of the sphere, n."""
        return self.n

    @property
    def log_volume(self):
        """Logarithm of 2 pi^((n+1)/2) / Gamma((n+1)/2)."""
        half = self.dim / 2
        return math.log(2) + half * math.log(math.pi) - math.lgamma(half)

    def project(self, x, tolerance=np.inf):
        return within(tolerance, x, x / jnp.sqrt(dot(x, x)))

    def tangent(self, x, v):
        return v - dot(x, v) * x

    def frame(self, x):
        # The reflection that takes x to -+ the first unit vector takes the other ones to this basis
        # (Householder). The sign avoids cancellation.
        first = jnp.eye(1, self.dim, dtype=x.dtype)[0]
        w = x + jnp.where(x[0] < 0, -1, 1) * first
        others = jnp.eye(self.dim, dtype=x.dtype)[1:]
        return others - (2 / dot(w, w)) * w[1:, None] * w[None]

    def exp(self, x, v):
        square = dot(v, v)
        return self.project(cos(square) * x + sinc(square) * v)

    def log(self, x, y):
        # The second projection makes u tangent although it may be tiny, as it is near the antipode.
        cosine = dot(x, y)
        u = self.tangent(x, self.tangent(x, y))
        square = dot(u, u)
        antipodal = (cosine < 0) & (square < (8 * jnp.finfo(x.dtype).eps) ** 2)
        ratio = angle_over_sine(jnp.where(antipodal, 1, square), cosine)
        return jnp.where(antipodal, math.pi * self.frame(x)[0], ratio * u)

    def distance(self, x, y):
        return 2 * jnp.arctan2(norm(x - y), norm(x + y))

    def uniform(self, key, num_samples, dtype=None):
        z = jr.normal(key, (num_samples, self.dim), dtype)
        return z / jnp.linalg.norm(z, axis=1, keepdims=True)

    def quadrature(self, n):
        check_int(n=n)
        if self.n > 2:
            return None
        count = n if self.n == 1 else 2 * n
        angles = 2 * math.pi / count * np.arange(count)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        if self.n == 1:
            return circle, np.full(n, 2 * math.pi / n)
        heights, weights = np.polynomial.legendre.leggauss(n)
        radii = np.sqrt(1 - heights**2)
        points = np.concatenate(
            [
                radii[:, None, None] * circle[None],
                np.broadcast_to(heights[:, None, None], (n, count, 1)),
            ],
            axis=2,
        )
        return points.reshape(-1, 3), np.repeat(weights * 2 * math.pi / count, count)

    def extend_velocity(self, x, p, v):
        """Return |x| v, which keeps |x| and is homogeneous of degree 1 in x."""
        return jnp.sqrt(dot(x, x)) * v
