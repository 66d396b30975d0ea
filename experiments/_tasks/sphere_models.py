"""Mixtures and kernels of von Mises-Fisher distributions on the sphere S^2."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key
from scipy.spatial import KDTree

from jcnf.distributions import BaseDistribution
from jcnf.evaluate.chunks import evenly_spaced
from jcnf.manifolds import Sphere

SPHERE = Sphere(2)
COMPONENTS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048)
MIN_ROWS = 4  # for each component
EM_STEPS, EM_EVERY = 250, 25  # in all, and between validations
CONCENTRATIONS = np.geomspace(3, 3e6, 37)  # of the kernels
MAX_CONCENTRATION = CONCENTRATIONS[-1]  # a standard deviation of 2 minutes of arc
MIN_CONCENTRATION = 1e-3  # in place of 0, of the uniform component
NEWTON_STEPS = 5
CHUNK = 500  # rows scored at once

Points = Float[np.ndarray, "n 3"]


class Mixture(BaseDistribution):
    """The mixture sum_i w_i k_i / (2 pi (1 - e^-2 k_i)) e^(k_i (mean_i.x - 1)) (Fisher 1953).

    A concentration k is about 1 / variance, in radians, where it is large.

    **Arguments:**

    - `means`: unit vectors (components, 3).
    - `concentrations`: k, (components,), at least 0.
    - `log_weights`: logarithms of w, (components,), which sum to 1.
    """

    means: Float[Array, "components 3"]
    concentrations: Float[Array, " components"]
    log_weights: Float[Array, " components"]
    dim: int = eqx.field(static=True)

    def __init__(self, means, concentrations, log_weights):
        self.means = jnp.asarray(means, float)
        self.concentrations = jnp.maximum(jnp.asarray(concentrations, float), MIN_CONCENTRATION)
        self.log_weights = jnp.asarray(log_weights, float)
        self.dim = 3

    @property
    def manifold(self) -> Sphere:
        """The sphere S^2."""
        return SPHERE

    def distribution(self, dtype=None):
        """Raise `ValueError`: distrax has no distributions on manifolds."""
        raise ValueError("a base on a manifold has no distrax distribution: use log_prob, sample")

    def joint(self, x: Float[Array, "3"]) -> Float[Array, " components"]:
        """Return the logarithm of each component's weight times its density at x."""
        k = self.concentrations
        # mean.x - 1 without cancellation.
        below = -jnp.sum((x[None] - self.means) ** 2, axis=1) / 2
        return (
            self.log_weights + k * below + jnp.log(k / -jnp.expm1(-2 * k)) - math.log(2 * math.pi)
        )

    def log_prob(self, z):
        return jax.vmap(lambda x: jax.nn.logsumexp(self.joint(x)))(z)

    def score(self, x: Points) -> Float[np.ndarray, " n"]:
        """Return the log-density of each row, in nats, in chunks."""
        parts = np.split(x, range(CHUNK, len(x), CHUNK))
        return np.concatenate([_log_prob(self, jnp.asarray(part, float)) for part in parts])

    def sample(self, key, num_samples, dtype=None):
        component_key, key = jr.split(key)
        components = jr.categorical(component_key, self.log_weights, shape=(num_samples,))
        return self.sample_components(components, key).astype(dtype or self.means.dtype)

    def sample_components(self, components, key) -> Float[Array, "n 3"]:
        """Draw a point of each of the components (n,), as `jcnf.manifolds.VonMisesFisher` does."""
        height_key, turn_key = jr.split(key)
        u = jr.uniform(height_key, components.shape, self.means.dtype)
        turn = jr.uniform(turn_key, components.shape, u.dtype, maxval=2 * math.pi)
        mean, k = self.means[components], self.concentrations[components]
        below = -jnp.log1p(u * jnp.expm1(-2 * k)) / k
        radius = jnp.sqrt(jnp.maximum(below * (2 - below), 0))
        across = jnp.stack([radius * jnp.cos(turn), radius * jnp.sin(turn)], axis=1)
        frames = jax.vmap(SPHERE.frame)(mean)
        x = (1 - below)[:, None] * mean + jnp.sum(across[:, :, None] * frames, axis=1)
        return jax.vmap(SPHERE.project)(x)


@jax.jit
def _log_prob(mixture, x):
    return mixture.log_prob(x)


def fit_mixture(train: Points, val: Points, seed: int, components: int = 0) -> Mixture:
    """Fit mixtures by EM (Banerjee et al. 2005); return the best on validation.

    Each has a uniform component too. Their number of components grows, from random rows as means,
    until validation is no better, unless it is given; every `EM_EVERY` steps are validated.
    """
    x, key = jnp.asarray(train, float), jr.key(seed)
    counts = [k for k in COMPONENTS if k == 1 or MIN_ROWS * k <= len(train)]
    best, best_score = None, -np.inf
    for count in [components] if components else counts:
        mixture, before = _start(x, count, jr.fold_in(key, count)), best_score
        for _ in range(EM_STEPS // EM_EVERY):
            mixture = _expect_and_maximize(mixture, x)
            score = float(mixture.score(val).mean())
            if score > best_score:
                best, best_score = mixture, score
        if best_score == before:
            break
    if best is None:
        raise ValueError("no mixture has finite log-densities of the validation rows")
    return best


def kernels(train: Points, concentration: float) -> Mixture:
    """Put an equal kernel on each training row."""
    weights = np.full(len(train), -np.log(len(train)))
    return Mixture(train, np.full(len(train), concentration), weights)


def adaptive_kernels(train: Points, neighbor: int, fraction: float) -> Mixture:
    """Put a kernel on each place, as wide as a fraction of the distance to its n-th neighbor."""
    places, repeats = np.unique(train, axis=0, return_counts=True)
    nearest, _ = KDTree(places).query(places, k=min(neighbor + 1, len(places)))
    width = np.maximum(fraction * nearest[:, -1], MAX_CONCENTRATION**-0.5)
    return Mixture(places, width**-2, np.log(repeats / len(train)))


def fit_kernels(train: Points, val: Points) -> Mixture:
    """Put a kernel on each training row, with the concentration that is best on validation."""
    val = val[evenly_spaced(len(val), 1000)]
    best = max(CONCENTRATIONS, key=lambda k: kernels(train, k).score(val).mean())
    return kernels(train, best)


def concentration(length: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return k for which the mean of x has this length: coth k - 1/k, by Newton's method."""
    r = jnp.clip(length, 1e-3, 1 - 1 / MAX_CONCENTRATION)
    k = r * (3 - r**2) / (1 - r**2)  # a good start (Banerjee et al. 2005)
    for _ in range(NEWTON_STEPS):
        coth = 1 / jnp.tanh(k)
        # 1/k^2 - 1/sinh(k)^2 cancels where k is small, and its limit is 1/3.
        slope = jnp.where(k > 0.1, 1 / k**2 - (coth**2 - 1), 1 / 3)
        reached = jnp.where(k > 0.1, coth - 1 / k, k / 3)
        k = k - (reached - r) / slope
    return jnp.minimum(k, MAX_CONCENTRATION)


def _start(x, count: int, key: Key[Array, ""]) -> Mixture:
    rows = jr.permutation(key, len(x))[:count]
    means = jnp.concatenate([x[rows], jnp.eye(3, dtype=x.dtype)[:1]])
    # As if the components shared the sphere evenly: each has the area 4 pi / count.
    concentrations = jnp.append(jnp.full(count, count / 2.0), 0.0)
    return Mixture(means, concentrations, jnp.full(count + 1, -math.log(count + 1)))


@jax.jit
def _expect_and_maximize(mixture: Mixture, x: Float[Array, "n 3"]) -> Mixture:
    """Take `EM_EVERY` steps of EM; the last component stays uniform."""

    def step(_, mixture):
        shares = jax.nn.softmax(jax.vmap(mixture.joint)(x), axis=1)
        mass, sums = jnp.sum(shares, axis=0), jnp.matmul(shares.T, x, precision="highest")
        lengths = jnp.sqrt(jnp.sum(sums**2, axis=1))
        safe = jnp.maximum(lengths, jnp.finfo(x.dtype).tiny)
        means = jnp.where(lengths[:, None] > 0, sums / safe[:, None], mixture.means)
        k = concentration(lengths / jnp.maximum(mass, jnp.finfo(x.dtype).tiny)).at[-1].set(0.0)
        return Mixture(means, k, jnp.log(jnp.maximum(mass, 1e-30) / len(x)))

    return jax.lax.fori_loop(0, EM_EVERY, step, mixture)
