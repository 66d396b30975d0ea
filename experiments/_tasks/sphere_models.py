"""Models of densities on the sphere S^2 beside flows: mixtures and kernels of von Mises-Fisher.

The density of von Mises and Fisher (Fisher 1953) is k / (2 pi (1 - e^-2k)) e^(k (mean.x - 1)), with
respect to the area. Its concentration k is about 1 / variance, in radians, where it is large.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

COMPONENTS = (1, 4, 16, 64, 128, 256, 512)
MIN_ROWS = 4  # for each component
EM_STEPS = 50
CONCENTRATIONS = np.geomspace(3, 3e6, 37)  # of the kernels
MAX_CONCENTRATION = CONCENTRATIONS[-1]  # a standard deviation of 2 minutes of arc
NEWTON_STEPS = 5
CHUNK = 2_000_000  # numbers at once

Points = Float[np.ndarray, "n 3"]


class Fitted(NamedTuple):
    """A fitted density."""

    log_prob: Callable[[Points], Float[np.ndarray, " n"]]  # nats, with respect to the area
    chosen: dict[str, Any]  # what validation chose


def fit_mixture(train: Points, val: Points, seed: int) -> Fitted:
    """Fit mixtures of more and more components and a uniform one; return the best on validation."""
    rng = np.random.default_rng(seed)
    counts = [k for k in COMPONENTS if k == 1 or MIN_ROWS * k <= len(train)]
    mixtures = [Mixture.fit(train, k, rng) for k in counts]
    best = max(mixtures, key=lambda mixture: mixture.log_prob(val).mean())
    return Fitted(best.log_prob, {"components": len(best.means)})


def fit_kernels(train: Points, val: Points, seed: int) -> Fitted:
    """Put a kernel on each training row, with the concentration that is best on validation."""
    weights = np.full(len(train), -np.log(len(train)))

    def kernels(k):
        return Mixture(train, np.full(len(train), k), weights)

    best = max(CONCENTRATIONS, key=lambda k: kernels(k).log_prob(val).mean())
    return Fitted(kernels(best).log_prob, {"concentration": float(best)})


class Mixture(NamedTuple):
    """A mixture of von Mises-Fisher distributions; the concentration 0 is the uniform one."""

    means: Float[np.ndarray, "components 3"]
    concentrations: Float[np.ndarray, " components"]
    log_weights: Float[np.ndarray, " components"]

    @classmethod
    def fit(cls, x: Points, count: int, rng: np.random.Generator) -> "Mixture":
        """Return the mixture of `count` components and a uniform one, by EM (Banerjee et al. 2005).

        The means start at random rows.
        """
        means = np.concatenate([x[rng.permutation(len(x))[:count]], [[0, 0, 1]]])
        # As if the components shared the sphere evenly: each has the area 4 pi / count.
        found = cls(
            means,
            np.append(np.full(count, count / 2.0), 0.0),
            np.full(count + 1, -np.log(count + 1)),
        )
        for _ in range(EM_STEPS):
            joint = found.joint(x)
            shares = np.exp(joint - _log_sum(joint)[:, None])
            mass = shares.sum(axis=0)
            sums = shares.T @ x
            lengths = np.linalg.norm(sums, axis=1)
            kept = lengths > 0
            means = np.where(kept[:, None], sums / np.where(kept, lengths, 1)[:, None], means)
            k = concentration(np.divide(lengths, mass, out=np.zeros_like(mass), where=mass > 0))
            k[-1] = 0.0
            found = cls(means, k, np.log(np.maximum(mass, 1e-300) / len(x)))
        return found

    def joint(self, x: Points) -> Float[np.ndarray, "n components"]:
        """Return the logarithm of each component's weight times its density."""
        k = self.concentrations
        # The limit of k / (1 - e^-2k) at 0 is 1/2.
        scale = np.where(k > 0, k / -np.expm1(-2 * np.where(k > 0, k, 1)), 0.5)
        return k * (x @ self.means.T - 1) + np.log(scale / (2 * np.pi)) + self.log_weights

    def log_prob(self, x: Points) -> Float[np.ndarray, " n"]:
        """Return the log-density of each row, in nats."""
        parts = np.array_split(x, -(-len(x) * len(self.means) // CHUNK))
        return np.concatenate([_log_sum(self.joint(part)) for part in parts])


def concentration(length: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return k for which the mean of x has this length: coth k - 1/k, by Newton's method."""
    r = np.clip(length, 1e-6, 1 - 1 / MAX_CONCENTRATION)
    k = r * (3 - r**2) / (1 - r**2)  # a good start (Banerjee et al. 2005)
    for _ in range(NEWTON_STEPS):
        coth = 1 / np.tanh(np.minimum(k, 300))
        reached, slope = coth - 1 / k, 1 / k**2 - (coth**2 - 1)
        k = np.where(k > 1e-2, k - (reached - r) / slope, 3 * r)
    return np.minimum(k, MAX_CONCENTRATION)


def _log_sum(a):
    top = a.max(axis=1)
    return top + np.log(np.exp(a - top[:, None]).sum(axis=1))
