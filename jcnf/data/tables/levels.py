"""The distinct values of a column, the step between them, and noise one step wide.

`dequantise` makes a density of integers and of rounded numbers: with uniform noise, the mean
log-density of the noisy values, in units of the step, bounds the log-probability of the rounded
ones from below (Theis et al. 2016, A note on the evaluation of generative models).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


def resolutions(rows: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, " dim"]:
    """The step of each column with a repeated value (`Levels.step`, its units), 0 for the others.

    Duplicate rows repeat every value, so each of their columns has a step.
    """
    levels = [Levels.of(column) for column in rows.T]
    return np.array([one.step if one.variety < 1 else 0.0 for one in levels])


def dequantise(
    rows: Float[np.ndarray, "rows dim"],
    steps: Float[np.ndarray, " dim"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "rows dim"]:
    """`rows` + (U - 1/2) x `steps`, with U uniform on [0, 1), drawn from `rng`.

    Duplicate rows become distinct, but stay neighbours. An atom in an otherwise continuous column
    stays one, for its rows spread over a single step.
    """
    return rows + (rng.random(rows.shape) - 0.5) * steps


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """The distinct values of one column, ascending, and how many rows hold each."""

    values: Float[np.ndarray, " levels"]
    counts: Int[np.ndarray, " levels"]

    @classmethod
    def of(cls, column: Float[np.ndarray, " rows"]) -> "Levels":
        """Values that differ by rounding alone (a few parts in 1e15) count as one."""
        values, counts = np.unique(column, return_counts=True)
        new = np.diff(values) > 4e-15 * (np.abs(values[1:]) + np.median(np.abs(column)))
        starts = np.flatnonzero(np.concatenate([[True], new]))
        return cls(values[starts], np.add.reduceat(counts, starts))

    @property
    def variety(self) -> float:
        """Distinct values per row: 1 where no value repeats."""
        return len(self.values) / self.counts.sum()

    @property
    def step(self) -> float:
        """The resolution: the gap that a tenth of the gaps between neighbouring values undercut.

        The smallest gap itself is often rounding, or the finer print of small numbers (five
        digits of 1.2345 and of 123.45); the typical gap is too wide where values are sparse.
        """
        gaps = np.diff(self.values)
        return float(np.quantile(gaps, 0.1, method="lower")) if len(gaps) else 0.0

    def atoms(self) -> Int[np.ndarray, " atoms"]:
        """Indices of values in over 0.5% of the rows, 10 times as often as those about them.

        None where the other values too repeat, 10 times or more on average: frequent values of a
        stepped column become a density by dequantising.
        """
        rows = self.counts.sum()
        near = np.lib.stride_tricks.sliding_window_view(np.pad(self.counts, 5, mode="reflect"), 11)
        often = self.counts > max(0.005 * rows, 9)
        peaks = np.flatnonzero(often & (self.counts >= 10 * np.median(near, axis=1)))
        others = rows - self.counts[peaks].sum()
        return peaks if others < 10 * (len(self.counts) - len(peaks)) else peaks[:0]
