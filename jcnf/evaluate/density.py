"""A density over its whole space, and the Gaussian it has to beat."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jcnf.evaluate.scores import ACCURATE, Scores, score
from jcnf.flow import Flow
from jcnf.solve import Solve


class Grid(NamedTuple):
    """A density on an interval or a rectangle."""

    log_prob: np.ndarray  # (n,) or (n, n) nats, at x[j] or [i, j] at (x[j], y[i])
    points: Array  # (n, 1) or (n * n, 2), row by row
    extent: tuple[float, ...]  # xmin, xmax and, in the plane, ymin, ymax
    mass: float  # integral of the density over it
    failures: int


def grid(flow: Flow, extent: tuple[float, ...], n: int = 200, *, solve: Solve = ACCURATE) -> Grid:
    """The log-density of a flow in 1 or 2 dimensions at the centres of equal cells, n an axis.

    Its integral is over the cells whose solves did not fail.
    """
    if 2 * flow.base.dim != len(extent):
        raise ValueError(
            "a grid needs a lowest and a highest value for each of the flow's dimensions; "
            f"got {len(extent)} values for {flow.base.dim}"
        )
    return grid_of(lambda points: score(flow, points, solve=solve), extent, n)


def grid_of(scores: Callable[[Array], Scores], extent: tuple[float, ...], n: int = 200) -> Grid:
    """The same of any `scores(points)`, of points (m, 1) or (m, 2)."""
    dim = len(extent) // 2
    if len(extent) not in (2, 4):
        raise ValueError(f"a grid is of 1 or 2 dimensions; got an extent of {len(extent)} values")
    intervals = np.reshape(extent, (dim, 2))
    if n < 1 or not np.all(np.diff(intervals) > 0) or not np.all(np.isfinite(intervals)):
        raise ValueError(
            f"a grid needs at least one cell, and an extent that rises; got {n}, {extent}"
        )
    axes = [cell_centres(tuple(interval), n) for interval in intervals]
    points = jnp.asarray(np.stack(np.meshgrid(*axes), -1).reshape(-1, dim), float)
    found = scores(points)
    volume = np.prod(np.diff(intervals)) / n**dim
    mass = float(np.nansum(np.exp(found.log_prob, dtype=np.float64)) * volume)
    return Grid(found.log_prob.reshape([n] * dim), points, extent, mass, found.failures)


def cell_centres(interval: tuple[float, float], n: int) -> np.ndarray:
    """Midpoints of n equal cells of an interval, (n,)."""
    edges = np.linspace(*interval, n + 1)
    return (edges[:-1] + edges[1:]) / 2


def gaussian_nll(train: np.ndarray, test: np.ndarray) -> float:
    """Test NLL in nats of a full-covariance Gaussian fitted to `train`: the baseline to beat.

    NaN where the covariance is singular: there is no density then.
    """
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    covariance = np.atleast_2d(np.cov(train, rowvar=False, bias=True))
    if np.linalg.matrix_rank(covariance, hermitian=True) < len(covariance):
        return float("nan")
    factor = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(factor, (test - train.mean(0)).T)
    log_det = np.sum(np.log(np.diag(factor)))
    dim = train.shape[1]
    return float(np.mean(np.sum(whitened**2, 0)) / 2 + log_det + dim * np.log(2 * np.pi) / 2)
