"""Products of manifolds."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.linalg import block_diag

from jcnf._checks import check_instance
from jcnf.manifolds._smooth import norm
from jcnf.manifolds.base import Manifold


class Product(Manifold):
    """The product of manifolds, with the coordinates of the first part first.

    Squares of distances add up, and so do logarithms of volumes.

    **Arguments:**

    - `parts`: the manifolds.

    **Raises:** `ValueError` unless there is at least one part, and every part is a manifold.
    """

    parts: tuple[Manifold, ...]

    def __init__(self, parts: Sequence[Manifold]):
        for part in parts:
            check_instance(Manifold, "a manifold, such as jcnf.manifolds.Sphere(2)", part=part)
        if not parts:
            raise ValueError("parts must be at least one manifold; got none")
        self.parts = tuple(parts)

    @property
    def dim(self):
        """Number of coordinates of all parts."""
        return sum(part.dim for part in self.parts)

    @property
    def intrinsic_dim(self):
        """Sum of the parts' dimensions."""
        return sum(part.intrinsic_dim for part in self.parts)

    @property
    def embedding_dim(self):
        """Number of coordinates of all embedded parts."""
        return sum(part.embedding_dim for part in self.parts)

    @property
    def log_volume(self):
        """Sum of the parts' logarithms."""
        return sum(part.log_volume for part in self.parts)

    def split(self, *vectors):
        """Yield each part with its share of each of the vectors, (dim,)."""
        ends = list(itertools.accumulate(part.dim for part in self.parts))
        return zip(self.parts, *(jnp.split(v, ends[:-1]) for v in vectors), strict=True)

    def project(self, x, tolerance=np.inf):
        """Return the nearest point; NaN in all coordinates if any part is too far."""
        found = jnp.concatenate([part.project(own, tolerance) for part, own in self.split(x)])
        return (
            found if tolerance == np.inf else jnp.where(jnp.any(jnp.isnan(found)), jnp.nan, found)
        )

    def tangent(self, x, v):
        return jnp.concatenate([part.tangent(*own) for part, *own in self.split(x, v)])

    def frame(self, x):
        return block_diag(*(part.frame(own) for part, own in self.split(x)))

    def exp(self, x, v):
        return jnp.concatenate([part.exp(*own) for part, *own in self.split(x, v)])

    def log(self, x, y):
        return jnp.concatenate([part.log(*own) for part, *own in self.split(x, y)])

    def distance(self, x, y):
        return norm(jnp.stack([part.distance(*own) for part, *own in self.split(x, y)]))

    def uniform(self, key, num_samples, dtype=None):
        keys = jr.split(key, len(self.parts))
        drawn = [
            part.uniform(k, num_samples, dtype) for part, k in zip(self.parts, keys, strict=True)
        ]
        return jnp.concatenate(drawn, axis=1)

    def quadrature(self, n):
        rules = []
        for part in self.parts:
            rule = part.quadrature(n)
            if rule is None:
                return None
            rules.append(rule)
        points, weights = rules[0]
        for more, factors in rules[1:]:
            points = np.concatenate(
                [np.repeat(points, len(more), axis=0), np.tile(more, (len(points), 1))], axis=1
            )
            weights = np.outer(weights, factors).reshape(-1)
        return points, weights

    def embed(self, x):
        return jnp.concatenate([part.embed(own) for part, own in self.split(x)])

    def pull_back(self, x, w):
        ends = list(itertools.accumulate(part.embedding_dim for part in self.parts))
        shares = jnp.split(w, ends[:-1])
        return jnp.concatenate(
            [part.pull_back(own, w) for (part, own), w in zip(self.split(x), shares, strict=True)]
        )

    def extend_velocity(self, x, p, v):
        return jnp.concatenate([part.extend_velocity(*own) for part, *own in self.split(x, p, v)])
