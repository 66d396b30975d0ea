"""Base distributions on manifolds. Densities are with respect to the Riemannian volume.

Points that are farther off the manifold than `jcnf.manifolds.TOLERANCE` have the log-density NaN.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import check_finite, check_instance, check_int, check_key, check_number
from jcnf.distributions import BaseDistribution
from jcnf.manifolds._smooth import dot
from jcnf.manifolds.base import TOLERANCE, Manifold
from jcnf.manifolds.flat import Euclidean, Torus
from jcnf.manifolds.product import Product
from jcnf.manifolds.sphere import Sphere

IMAGES_PER_SIDE = 3  # on each side; the next one adds e^-59 of the density at scale 2
NUM_WAVES = 6  # the next one adds e^-98 at scale 2
NARROW = 2.0  # scales below it are summed over images, others over waves


class _OnManifold(BaseDistribution):
    """A base on `self.manifold`, by the log-density of one point and a sampler of points."""

    manifold: eqx.AbstractVar[Manifold]

    @property
    def dim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of coordinates of a point."""
        return self.manifold.dim

    @abstractmethod
    def _log_prob(self, x) -> Array: ...

    @abstractmethod
    def _sample(self, key, num_samples, dtype) -> Array: ...

    def distribution(self, dtype=None):
        """Raise `ValueError`: distrax has no distributions on manifolds."""
        raise ValueError("a base on a manifold has no distrax distribution: use log_prob, sample")

    def log_prob(self, z):
        """Return the log-density of each point, in nats; NaN for points off the manifold."""
        return jax.vmap(lambda z: self._log_prob(self.manifold.project(z, TOLERANCE)))(z)

    def sample(self, key, num_samples, dtype=None):
        check_key(key)
        check_int(num_samples=num_samples)
        return self._sample(key, num_samples, dtype)


class Uniform(_OnManifold):
    """The uniform distribution: the density is one over the volume.

    **Raises:** `ValueError` for a manifold of infinite volume.
    """

    manifold: Manifold

    def __check_init__(self):
        check_instance(
            Manifold, "a manifold, such as jcnf.manifolds.Sphere(2)", manifold=self.manifold
        )
        if not math.isfinite(self.manifold.log_volume):
            raise ValueError(f"manifold must have a finite volume; got {self.manifold}")

    def _log_prob(self, x):
        return 0 * jnp.sum(x) - self.manifold.log_volume

    def _sample(self, key, num_samples, dtype):
        return self.manifold.uniform(key, num_samples, dtype)


class VonMisesFisher(_OnManifold):
    """The density k / (4 pi sinh k) e^(k mean.x) on the sphere S^2 (Fisher 1953).

    Samples are exact: the height along the mean by the inverse of its distribution function (Ulrich
    1984), then a uniform longitude.

    **Arguments:**

    - `mean`: the mode, (3,); its length does not matter.
    - `concentration`: k, positive.

    **Raises:** `ValueError` for a mean of another shape, that is 0 or not finite, and for a
    concentration that is not positive and finite.
    """

    mean: Float[Array, "3"]
    concentration: Float[Array, ""]

    def __init__(self, mean, concentration):
        mean = np.asarray(mean, float)
        if mean.shape != (3,):
            raise ValueError(f"expected mean of shape (3,); got {mean.shape}")
        check_finite(mean=mean)
        check_number("(0, inf)", concentration=concentration)
        length = np.linalg.norm(mean)
        if length == 0:
            raise ValueError("mean must not be 0")
        self.mean = jnp.asarray(mean / length, float)
        self.concentration = jnp.asarray(concentration, float)

    @property
    def manifold(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The sphere S^2."""
        return Sphere(2)

    def _log_prob(self, x):
        mean, k = self.mean.astype(x.dtype), self.concentration.astype(x.dtype)
        # mean.x - 1 without cancellation; it is 0 at the mode.
        below = -dot(x - mean, x - mean) / 2
        return k * below + jnp.log(k / -jnp.expm1(-2 * k)) - math.log(2 * math.pi)

    def _sample(self, key, num_samples, dtype):
        height_key, longitude_key = jr.split(key)
        u = jr.uniform(height_key, (num_samples,), dtype)
        angle = jr.uniform(longitude_key, (num_samples,), dtype, maxval=2 * math.pi)
        mean, k = self.mean.astype(u.dtype), self.concentration.astype(u.dtype)
        below = -jnp.log1p(u * jnp.expm1(-2 * k)) / k  # 1 - mean.x
        radius = jnp.sqrt(jnp.maximum(below * (2 - below), 0))
        first, second = self.manifold.frame(mean)
        across = jnp.cos(angle)[:, None] * first[None] + jnp.sin(angle)[:, None] * second[None]
        return (1 - below)[:, None] * mean[None] + radius[:, None] * across


class WrappedNormal(_OnManifold):
    """Independent normal distributions N(loc, scale^2), wrapped on a torus of angles.

    The density of an angle is the sum over images, sum_j N(x + 2 pi j; loc, scale^2), or its
    Fourier series if the scale is at least 2 (Mardia & Jupp 2000): both are then
    exact up to rounding.

    **Arguments:**

    - `loc`, `scale`: (angles,), in radians.

    **Raises:** `ValueError` for other shapes and values that are not finite, or if `scale` is not
    positive.
    """

    loc: Float[Array, " angles"]
    scale: Float[Array, " angles"]

    def __init__(self, loc, scale):
        loc, scale = np.asarray(loc, float), np.asarray(scale, float)
        if loc.ndim != 1 or scale.shape != loc.shape:
            raise ValueError(
                f"expected loc and scale of one shape (angles,); got {loc.shape}, {scale.shape}"
            )
        check_finite(loc=loc, scale=scale)
        if not np.all(scale > 0):
            raise ValueError(f"scale must be positive; got {scale}")
        self.loc, self.scale = jnp.asarray(loc, float), jnp.asarray(scale, float)

    @property
    def manifold(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """The torus of the angles."""
        return Torus(len(self.loc))

    def _log_prob(self, x):
        scale = self.scale.astype(x.dtype)
        angle = self.manifold.project(x - self.loc.astype(x.dtype))
        narrow = scale < NARROW
        # Each sum is given a scale at which it is accurate, so that no gradient is NaN.
        low = jnp.where(narrow, scale, NARROW)[None]
        turns = (
            2 * math.pi * jnp.arange(-IMAGES_PER_SIDE, IMAGES_PER_SIDE + 1).astype(x.dtype)[:, None]
        )
        images = -(((angle[None] + turns) / low) ** 2) / 2
        by_images = jax.nn.logsumexp(images, axis=0) - jnp.log(math.sqrt(2 * math.pi) * low[0])
        high = jnp.where(narrow, NARROW, scale)[None]
        number = jnp.arange(1, NUM_WAVES + 1).astype(x.dtype)[:, None]
        waves = jnp.exp(-((number * high) ** 2) / 2) * jnp.cos(number * angle[None])
        by_waves = jnp.log1p(2 * jnp.sum(waves, axis=0)) - math.log(2 * math.pi)
        return jnp.sum(jnp.where(narrow, by_images, by_waves))

    def _sample(self, key, num_samples, dtype):
        z = jr.normal(key, (num_samples, self.dim), dtype)
        return self.manifold.project(
            self.loc.astype(z.dtype)[None] + self.scale.astype(z.dtype)[None] * z
        )


class Independent(BaseDistribution):
    """Independent base distributions, one after another, for a `jcnf.manifolds.Product`.

    **Arguments:**

    - `parts`: bases, in the order of the product's parts; a normal one for a Euclidean part.

    **Raises:** `ValueError` unless there is at least one part, and every part is a base.
    """

    parts: tuple[BaseDistribution, ...]

    def __init__(self, parts: Sequence[BaseDistribution]):
        for part in parts:
            check_instance(BaseDistribution, "a base distribution", part=part)
        if not parts:
            raise ValueError("parts must be at least one base distribution; got none")
        self.parts = tuple(parts)

    @property
    def dim(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Number of coordinates of all parts."""
        return sum(part.dim for part in self.parts)

    @property
    def manifold(self) -> Manifold | None:
        """The product of the parts' manifolds; None if all of them are in R^dim."""
        known = [getattr(part, "manifold", None) for part in self.parts]
        if not any(known):
            return None
        pairs = zip(known, self.parts, strict=True)
        return Product([Euclidean(part.dim) if own is None else own for own, part in pairs])

    def distribution(self, dtype=None):
        """Raise `ValueError`: the parts may be on manifolds, which distrax does not know."""
        raise ValueError("independent bases have no distrax distribution: use log_prob, sample")

    def log_prob(self, z):
        """Return the sum of the parts' log-densities, in nats."""
        ends = np.cumsum([part.dim for part in self.parts])
        shares = jnp.split(z, ends[:-1], axis=1)
        terms = [part.log_prob(own) for part, own in zip(self.parts, shares, strict=True)]
        return jnp.sum(jnp.stack(terms), axis=0)

    def sample(self, key, num_samples, dtype=None):
        check_key(key)
        keys = jr.split(key, len(self.parts))
        drawn = [
            part.sample(k, num_samples, dtype) for part, k in zip(self.parts, keys, strict=True)
        ]
        return jnp.concatenate(drawn, axis=1)
