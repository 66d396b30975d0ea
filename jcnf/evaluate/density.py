"""A density over its whole space, and the Gaussian it has to beat."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jcnf import require
from jcnf.evaluate.scores import ACCURATE, Scores, score
from jcnf.flow import Flow, check_flow
from jcnf.solve import Solve


class Grid(NamedTuple):
    """A density on an interval or a rectangle."""

    log_prob: np.ndarray  # (n,) or (n, n) nats, at x[j] or [i, j] at (x[j], y[i])
    points: Array  # (n, 1) or (n * n, 2), row by row
    extent: tuple[float, ...]  # xmin, xmax and, in the plane, ymin, ymax
    mass: float  # integral of the density over it
    failures: int

    def cropped(self, cells: int) -> "Grid":
        """Return the grid of the `cells` an axis in the middle, with the mass that is in them.

        **Raises:** `ValueError` for more cells than there are, or a number that leaves half a cell.
        """
        n, dim = len(self.log_prob), self.log_prob.ndim
        require.whole(1, n, cells=cells)
        if (n - cells) % 2:
            raise ValueError(f"cells must be {n} less an even number; got cells={cells}")
        inner = slice((n - cells) // 2, (n + cells) // 2)
        low, high = np.reshape(self.extent, (dim, 2)).T
        middle, half = (low + high) / 2, (high - low) / 2 * cells / n
        extent = tuple(np.stack([middle - half, middle + half], 1).ravel().tolist())
        log_prob = self.log_prob[(inner,) * dim]
        points = self.points.reshape(*self.log_prob.shape, dim)[(inner,) * dim].reshape(-1, dim)
        return _grid(log_prob, points, extent)


def grid(flow: Flow, extent: tuple[float, ...], n: int = 200, *, solve: Solve = ACCURATE) -> Grid:
    """The log-density of a flow in 1 or 2 dimensions at the centres of equal cells, n an axis.

    Its integral is over the cells whose solves did not fail.
    """
    check_flow(flow)
    check_extent(extent, flow.base.dim)
    return grid_of(lambda points: score(flow, points, solve=solve), extent, n)


def grid_of(scores: Callable[[Array], Scores], extent: tuple[float, ...], n: int = 200) -> Grid:
    """The same of any `scores(points)`, of points (m, 1) or (m, 2)."""
    check_extent(extent)
    require.whole(cells=n)
    dim = len(extent) // 2
    intervals = np.reshape(extent, (dim, 2))
    axes = [cell_centres(tuple(interval), n) for interval in intervals]
    points = jnp.asarray(np.stack(np.meshgrid(*axes), -1).reshape(-1, dim), float)
    found = scores(points)
    return _grid(found.log_prob.reshape([n] * dim), points, extent)


def _grid(log_prob, points, extent):
    """The grid with its mass; a cell whose solve failed is NaN."""
    volume = np.prod(np.diff(np.reshape(extent, (-1, 2)))) / log_prob.size
    mass = float(np.nansum(np.exp(log_prob, dtype=np.float64)) * volume)
    return Grid(log_prob, points, extent, mass, int(np.isnan(log_prob).sum()))


def check_extent(extent: tuple[float, ...], dim: int | None = None) -> None:
    """Raise `ValueError` for what is no window in `dim` dimensions, or in 1 or 2."""
    size = len(extent) if isinstance(extent, Sequence) else 0
    if size not in (2, 4):
        raise ValueError(
            "a grid is of 1 or 2 dimensions: its extent is (xmin, xmax) or (xmin, xmax, ymin, "
            f"ymax); got {extent}"
        )
    if dim is not None and size != 2 * dim:
        raise ValueError(
            "a grid needs a lowest and a highest value for each of the flow's dimensions; "
            f"got {size} values for {dim}"
        )
    intervals = np.reshape(extent, (-1, 2))
    if not np.all(np.diff(intervals) > 0) or not np.all(np.isfinite(intervals)):
        raise ValueError(f"a grid needs a finite extent that rises; got {extent}")


def cell_centres(interval: tuple[float, float], n: int) -> np.ndarray:
    """Midpoints of n equal cells of an interval, (n,)."""
    require.whole(n=n)
    edges = np.linspace(*interval, n + 1)
    return (edges[:-1] + edges[1:]) / 2


def gaussian_nll(train: np.ndarray, test: np.ndarray) -> float:
    """Test NLL in nats of a full-covariance Gaussian fitted to `train`: the baseline to beat.

    NaN where the covariance is singular: there is no density then.

    **Raises:** `ValueError` for other shapes than (rows, dim), and for rows that are not finite.
    """
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    if train.ndim != 2 or train.shape[1:] != test.shape[1:] or not (len(train) and len(test)):
        raise ValueError(
            f"expected rows (n, dim) of one dimension, at least 1; got {train.shape}, {test.shape}"
        )
    require.finite(train=train, test=test)
    covariance = np.atleast_2d(np.cov(train, rowvar=False, bias=True))
    if np.linalg.matrix_rank(covariance, hermitian=True) < len(covariance):
        return float("nan")
    factor = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(factor, (test - train.mean(0)).T)
    log_det = np.sum(np.log(np.diag(factor)))
    dim = train.shape[1]
    return float(np.mean(np.sum(whitened**2, 0)) / 2 + log_det + dim * np.log(2 * np.pi) / 2)
