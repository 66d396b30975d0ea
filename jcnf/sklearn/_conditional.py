"""Draws of X for one row of the context after another, and their quantiles."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import ndtr, ndtri

DRAWS = 200  # for each row of the context
FEWEST = 8  # from one component of the mixture, if there is a single column
FARTHEST = 4.5  # normal scores of the outermost draws of a single column


class Draws(NamedTuple):
    """Normal scores that the components of a mixture carry to draws of X, for any context.

    With a single column, each component has evenly spaced scores in increasing order. As its flow
    is increasing, its distribution function is then known at the draws.
    """

    scores: Float[np.ndarray, "draws dim"]
    which: Int[np.ndarray, " draws"]  # number of the component; each has a run of draws
    shares: Float[np.ndarray, " draws"]  # weights of the draws in a mean, which sum to 1
    weights: Float[np.ndarray, " components"]

    @classmethod
    def of(cls, weights: Float[np.ndarray, " components"], dim: int) -> "Draws":
        """Return the draws for the weights of a mixture."""
        weights = weights / weights.sum()
        counts = np.maximum(FEWEST if dim == 1 else 1, np.round(weights * DRAWS)).astype(int)
        which = np.repeat(np.arange(len(weights)), counts)
        if dim > 1:
            scores = np.random.default_rng(0).normal(size=(len(which), dim))
            return cls(scores, which, np.repeat(weights / counts, counts), weights)
        scores = np.concatenate([np.linspace(-FARTHEST, FARTHEST, count) for count in counts])
        # The trapezoidal rule is very accurate for smooth integrands that vanish at both ends.
        density = np.exp(-(scores**2) / 2)
        totals = np.add.reduceat(density, np.cumsum(counts) - counts)
        return cls(scores[:, None], which, weights[which] * density / totals[which], weights)

    def quantiles(
        self,
        x: Float[np.ndarray, "n draws dim"],
        levels: Float[np.ndarray, " levels"],
        increasing: bool,
    ) -> Float[np.ndarray, "n levels dim"]:
        """Return the quantiles of each column of what the components made of the scores.

        NaN where a draw is NaN. If the flows are `increasing` functions of a single column, the
        quantiles are those of the mixture's distribution function, and otherwise of the draws.
        """
        found = np.full((len(x), len(levels), x.shape[2]), np.nan)
        for row, column in np.ndindex(len(x), x.shape[2]):
            drawn = x[row, :, column]
            if np.isnan(drawn).any():
                continue
            order = np.argsort(drawn)
            if increasing:
                below = self._distribution(drawn[order], drawn)
            else:
                below = np.cumsum(self.shares[order]) - self.shares[order] / 2
            found[row, :, column] = np.interp(ndtri(levels), ndtri(below), drawn[order])
        return found

    def _distribution(self, at, drawn):
        """Return the distribution function at some points, between the draws of each component."""
        total = np.zeros(len(at))
        for component, weight in enumerate(self.weights):
            own = self.which == component
            x = np.maximum.accumulate(drawn[own])
            total += weight * ndtr(np.interp(at, x, self.scores[own, 0]))
        return total
