"""Draws of X for one row of the context after another, and their quantiles."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr, ndtri

DRAWS = 200  # for each row of the context
# With a single column, each component of the mixture has:
COLUMN_DRAWS, FEWEST = 100, 8  # draws in all, and at least so many of one component
FARTHEST = 4.5  # normal scores of its outermost draws
FINER = 4  # points between two draws, by interpolation


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
        fewest, total = (FEWEST, COLUMN_DRAWS) if dim == 1 else (1, DRAWS)
        counts = np.maximum(fewest, np.round(weights * total)).astype(int)
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
        known = ~np.isnan(x).any(axis=(1, 2))
        if known.any():
            quantiles = self._of_distribution if increasing else self._of_draws
            found[known] = quantiles(x[known], levels)
        return found

    def _of_draws(self, x, levels):
        order = np.argsort(x, axis=1)
        shares = self.shares[order]
        below = ndtri(np.cumsum(shares, axis=1) - shares / 2)
        drawn = np.take_along_axis(x, order, axis=1)
        found = np.empty((len(x), len(levels), x.shape[2]))
        for row, column in np.ndindex(len(x), x.shape[2]):
            each = (row, slice(None), column)
            found[each] = np.interp(ndtri(levels), below[each], drawn[each])
        return found

    def _of_distribution(self, x, levels):
        curves = [self._curve(x, component) for component in range(len(self.weights))]
        found = np.empty((len(x), len(levels), 1))
        for row in range(len(x)):
            at = np.sort(np.concatenate([drawn[row] for _, drawn in curves]))
            below = sum(
                weight * ndtr(np.interp(at, drawn[row], scores))
                for weight, (scores, drawn) in zip(self.weights, curves, strict=True)
            )
            found[row, :, 0] = np.interp(ndtri(levels), ndtri(below), at)
        return found

    def _curve(self, x, component):
        """Return scores in fine steps, and what a component makes of them in each row."""
        own = self.which == component
        scores = self.scores[own, 0]
        finer = np.linspace(scores[0], scores[-1], FINER * (len(scores) - 1) + 1)
        # Monotone cubic interpolation; errors of the solves may have left draws out of order.
        drawn = PchipInterpolator(scores, np.maximum.accumulate(x[:, own, 0], axis=1), axis=1)
        return finer, drawn(finer)
