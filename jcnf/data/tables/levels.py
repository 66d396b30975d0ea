"""The distinct values of a column, the step between them, and noise one step wide.

The noise turns integers and rounded numbers into values that have a density. The mean log-density
of the noisy values, in units of the step, is a lower bound on the log-probability of the rounded
ones (Theis et al. 2016, A note on the evaluation of generative models).
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int


def resolutions(rows: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, " dim"]:
    """Return the step (`Levels.step`) of each column that repeats a value, and 0 for the others.

    The step is in the column's units. A duplicate row repeats all its values and so gives every
    column a step.
    """
    levels = [Levels.of(column) for column in rows.T]
    return np.array([one.step if one.variety < 1 else 0.0 for one in levels])


def jitter(
    rows: Float[np.ndarray, "rows dim"],
    steps: Float[np.ndarray, " dim"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "rows dim"]:
    """Return `rows` + (U - 1/2) x `steps`, with U uniform on [0, 1) and drawn from `rng`.

    Unlike `jcnf.data.images.dequantize`, whose noise fills [0, 1), this keeps a column's units and
    its mean. An atom in an otherwise continuous column remains one, because its rows spread over
    only one step.
    """
    return rows + (rng.random(rows.shape) - 0.5) * steps


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """The distinct values of one column, ascending, and how many rows hold each."""

    values: Float[np.ndarray, " levels"]
    counts: Int[np.ndarray, " levels"]

    @classmethod
    def of(cls, column: Float[np.ndarray, " rows"]) -> "Levels":
        """Count the values of a column; those a few parts in 1e15 apart (rounding) are one."""
        values, counts = np.unique(column, return_counts=True)
        new = np.diff(values) > 4e-15 * (np.abs(values[1:]) + np.median(np.abs(column)))
        starts = np.flatnonzero(np.concatenate([[True], new]))
        return cls(values[starts], np.add.reduceat(counts, starts))

    @property
    def variety(self) -> float:
        """Number of distinct values per row: 1 if no value repeats."""
        return len(self.values) / self.counts.sum()

    @property
    def step(self) -> float:
        """Resolution of the column: the 10 % quantile of the gaps between adjacent values.

        The smallest gap is often rounding, or comes from small numbers printed more finely than
        large ones (1.2345 and 123.45 both have five digits). The median gap is too wide where
        values are sparse.
        """
        gaps = np.diff(self.values)
        return float(np.quantile(gaps, 0.1, method="lower")) if len(gaps) else 0.0

    def largest_atom(self) -> tuple[float, int] | None:
        """Return the most frequent of the column's atoms and how many rows hold it, or None.

        An atom is a value in over 0.5 % of the rows that is 10 times as frequent as nearby ones.
        There are none if the other values repeat too, 10 times or more on average: dequantizing
        turns the frequent values of a column with steps into a density.
        """
        rows = self.counts.sum()
        near = np.lib.stride_tricks.sliding_window_view(np.pad(self.counts, 5, mode="reflect"), 11)
        often = self.counts > max(0.005 * rows, 9)
        peaks = np.flatnonzero(often & (self.counts >= 10 * np.median(near, axis=1)))
        others = rows - self.counts[peaks].sum()
        if not len(peaks) or others >= 10 * (len(self.counts) - len(peaks)):
            return None
        top = peaks[np.argmax(self.counts[peaks])]
        return float(self.values[top]), int(self.counts[top])
