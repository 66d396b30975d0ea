"""Densities over their whole space: on a grid, or by the quadrature of a manifold."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jcnf._checks import check_int
from jcnf.evaluate.log_prob import ACCURATE, LogProbs, log_prob
from jcnf.flows import Flow, check_flow
from jcnf.ode import Solve, unknown


class Grid(NamedTuple):
    """Density on an interval or a rectangle."""

    log_prob: np.ndarray  # (n,) at x[j] or (n, n) at (x[j], y[i]), nats; or NaN
    failed: np.ndarray  # of the same shape: cells whose solve failed
    points: Array  # (n, 1) or (n * n, 2), row by row
    extent: tuple[float, ...]  # xmin, xmax and, in the plane, ymin, ymax

    @property
    def mass(self) -> float:
        """Integral of the density over the cells that are not NaN."""
        volume = np.prod(np.diff(np.reshape(self.extent, (-1, 2)))) / self.log_prob.size
        return float(np.nansum(np.exp(self.log_prob, dtype=np.float64)) * volume)

    @property
    def failures(self) -> int:
        """Number of cells whose solve failed."""
        return int(self.failed.sum())

    @property
    def unmeasured(self) -> int:
        """Number of cells that were left out."""
        return int(np.isnan(self.log_prob).sum()) - self.failures

    @property
    def measured_cells(self) -> int:
        """Largest number of cells along an axis, in the middle, of which none was left out."""
        n = len(self.log_prob)
        left_out = np.argwhere(np.isnan(self.log_prob) & ~self.failed)
        from_border = np.minimum(left_out, n - 1 - left_out).min(axis=1)
        return n - 2 * (int(np.max(from_border, initial=-1)) + 1)

    def cropped(self, cells: int) -> "Grid":
        """Return the grid of the middle `cells` of each axis, with the mass that is in them.

        **Raises:** `ValueError` if there are fewer cells, or half a cell would be left per side.
        """
        n, dim = len(self.log_prob), self.log_prob.ndim
        check_int(1, n, cells=cells)
        if (n - cells) % 2:
            raise ValueError(f"cells must be {n} minus an even number; got cells={cells}")
        inner = slice((n - cells) // 2, (n + cells) // 2)
        low, high = np.reshape(self.extent, (dim, 2)).T
        middle, half = (low + high) / 2, (high - low) / 2 * cells / n
        extent = tuple(np.stack([middle - half, middle + half], 1).ravel().tolist())
        points = self.points.reshape(*self.log_prob.shape, dim)[(inner,) * dim].reshape(-1, dim)
        return Grid(self.log_prob[(inner,) * dim], self.failed[(inner,) * dim], points, extent)


def grid(
    flow: Flow,
    extent: tuple[float, ...],
    n: int = 200,
    *,
    solve: Solve = ACCURATE,
    enough: Callable[[int], bool] = lambda done: False,
) -> Grid:
    """Return the log-density of a flow in 1 or 2 dimensions on n equal cells per axis.

    It is computed at the centers of the cells, from the middle outwards. `enough(done)` is called
    after each chunk with the number of cells done; if it returns true, the outer ones are left out.

    **Raises:** `ValueError` if `extent` is not finite, increasing and of the flow's dimension.
    """
    check_flow(flow)
    check_extent(extent, flow.dim)
    if solve.step_plan is None and solve.heeds_step_plans:
        # No step plan serves both the middle and the cells far from the data.
        solve = dataclasses.replace(solve, step_plan=unknown(jnp.result_type(float)))
    return grid_of(lambda points: log_prob(flow, points, solve=solve, enough=enough), extent, n)


class Quadrature(NamedTuple):
    """Density at the points of a manifold's quadrature rule."""

    log_prob: np.ndarray  # (points,) nats; NaN where it failed or was left out
    failed: np.ndarray  # (points,) points whose solve failed
    points: np.ndarray  # (points, dim)
    weights: np.ndarray  # (points,), which sum to the volume

    @property
    def mass(self) -> float:
        """Integral of the density over the points that are not NaN."""
        return float(np.nansum(np.exp(self.log_prob, dtype=np.float64) * self.weights))

    @property
    def failures(self) -> int:
        """Number of points whose solve failed."""
        return int(self.failed.sum())

    @property
    def unmeasured(self) -> int:
        """Number of points that were left out."""
        return int(np.isnan(self.log_prob).sum()) - self.failures


def quadrature(
    flow: Flow,
    n: int = 200,
    *,
    solve: Solve = ACCURATE,
    enough: Callable[[int], bool] = lambda done: False,
) -> Quadrature:
    """Return the log-density of a flow on a manifold at the points of `manifold.quadrature(n)`.

    `enough(done)` is called after each chunk with the number of points done; if it returns true,
    the others are left out.

    **Raises:** `ValueError` for a flow in R^dim, and for a manifold that has no quadrature.
    """
    check_flow(flow)
    manifold = flow.bijection.manifold
    rule = None if manifold is None else manifold.quadrature(n)
    if rule is None:
        where = "R^dim: use jcnf.evaluate.grid" if manifold is None else f"{manifold}"
        raise ValueError(f"flow must be on a manifold with a quadrature; got one on {where}")
    points, weights = rule
    found = log_prob(flow, jnp.asarray(points, float), solve=solve, enough=enough)
    left_out = (0, len(points) - len(found.log_prob))
    values = np.pad(found.log_prob, left_out, constant_values=np.nan)
    return Quadrature(values, np.pad(found.failed, left_out), points, weights)


def grid_of(scores: Callable[[Array], LogProbs], extent: tuple[float, ...], n: int = 200) -> Grid:
    """Return the grid of any function `scores(points)`, with points (m, 1) or (m, 2).

    The points start in the middle; `scores` may return results for only the first ones.
    """
    check_extent(extent)
    check_int(cells=n)
    dim = len(extent) // 2
    intervals = np.reshape(extent, (dim, 2))
    axes = [cell_centers(tuple(interval), n) for interval in intervals]
    points = np.stack(np.meshgrid(*axes), -1).reshape(-1, dim)
    from_middle = np.abs(points - intervals.mean(axis=1)) / np.ptp(intervals, axis=1)
    order = np.argsort(np.max(from_middle, axis=1), kind="stable")
    points = jnp.asarray(points, float)
    found = scores(points[order])
    done = order[: len(found.log_prob)]
    log_prob, failed = np.full(len(points), np.nan), np.zeros(len(points), bool)
    log_prob[done], failed[done] = found.log_prob, found.failed
    return Grid(log_prob.reshape([n] * dim), failed.reshape([n] * dim), points, extent)


def check_extent(extent: tuple[float, ...], dim: int | None = None) -> None:
    """Raise `ValueError` unless `extent` is a window in `dim` dimensions, by default 1 or 2."""
    size = len(extent) if isinstance(extent, Sequence) else 0
    if size not in (2, 4):
        raise ValueError(
            "extent must be (xmin, xmax) or (xmin, xmax, ymin, ymax), for a grid in 1 or 2 "
            f"dimensions; got {extent}"
        )
    if dim is not None and size != 2 * dim:
        raise ValueError(
            "extent must have a lower and an upper bound for each of the flow's dimensions; "
            f"got {size} values for {dim}"
        )
    intervals = np.reshape(extent, (-1, 2))
    if not np.all(np.diff(intervals) > 0) or not np.all(np.isfinite(intervals)):
        raise ValueError(f"extent must be finite and increase along each axis; got {extent}")


def cell_centers(interval: tuple[float, float], n: int) -> np.ndarray:
    """Return the midpoints of n equal cells of an interval, (n,)."""
    check_int(n=n)
    edges = np.linspace(*interval, n + 1)
    return (edges[:-1] + edges[1:]) / 2
