"""Held-out numbers: exact divergence, tight tolerance, fixed-size chunks compiled once.

Nothing here draws conclusions from a solve that failed: its samples come back as NaN, counted.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf.flow import CNF, solve_trajectory, transform
from jcnf.solve import Solve

ACCURATE = Solve(rtol=1e-5, atol=1e-5, norm="worst", max_steps=4096)
CHUNK = 5000


class Scores(NamedTuple):
    """Log-densities of a set of points, and what they cost."""

    log_prob: np.ndarray  # (n,) nats; NaN where the solve failed
    nfe: float  # mean over chunks
    failures: int  # points whose solve failed

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats."""
        return float(-np.mean(self.log_prob))

    @property
    def stderr(self) -> float:
        """Its standard error over the points, nats."""
        return standard_error(self.log_prob)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def score(
    flow: CNF,
    x: Float[Array, "n dim"],
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int = CHUNK,
) -> Scores:
    """Log-density of each point by the exact divergence, in chunks of one compiled program."""
    parts = [_score(flow, part, ctx, solve) for part, ctx in _chunks((x, context), len(x), chunk)]
    log_probs, stats = zip(*jax.device_get(parts), strict=True)
    joined, failed = _join(log_probs, stats, len(x))
    return Scores(joined, float(np.mean([s.nfe for s in stats])), failed)


class Transport(NamedTuple):
    """Points carried along the flow."""

    x: np.ndarray  # (times, n, dim); NaN where the solve failed
    nfe: float  # mean over chunks
    failures: int  # points whose solve failed


def transport(
    flow: CNF,
    x: Float[Array, "n dim"],
    times: Float[Array, " times"],
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int = CHUNK,
) -> Transport:
    """Points at each of `times`, from where they are at `times[0]`; as `jcnf.trajectory`."""
    times = jnp.asarray(times, jnp.result_type(x))
    parts = [
        _transport(flow, part, times, ctx, solve)
        for part, ctx in _chunks((x, context), len(x), chunk)
    ]
    paths, stats = zip(*jax.device_get(parts), strict=True)
    joined, failed = _join([np.moveaxis(p, 1, 0) for p in paths], stats, len(x))
    return Transport(np.moveaxis(joined, 0, 1), float(np.mean([s.nfe for s in stats])), failed)


def draw(
    flow: CNF,
    key: Key[Array, ""],
    num_samples: int,
    *,
    context: Float[Array, "num_samples context"] | None = None,
    solve: Solve = ACCURATE,
) -> Transport:
    """Samples at `x[-1]` and the base draws they came from at `x[0]`; consumes `key`."""
    z = flow.base.sample(key, num_samples)
    return transport(flow, z, jnp.array([0.0, flow.t1]), context=context, solve=solve)


def roundtrip_error(
    flow: CNF,
    x: Float[Array, "n dim"],
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
) -> float:
    """max |x - to_data(to_base(x))| over points and components, in the units of `x`."""
    settings: dict[str, Any] = {"context": context, "solve": solve}
    z = transport(flow, x, jnp.array([flow.t1, 0.0]), **settings).x[-1]
    back = transport(flow, jnp.asarray(z), jnp.array([0.0, flow.t1]), **settings).x[-1]
    return float(np.max(np.abs(back - np.asarray(x))))


class Grid(NamedTuple):
    """A density on a rectangle of the plane."""

    log_prob: np.ndarray  # (n, n) nats, [i, j] at (x[j], y[i])
    points: Array  # (n * n, 2), row by row
    extent: tuple[float, float, float, float]  # xmin, xmax, ymin, ymax
    mass: float  # integral of the density over the rectangle
    failures: int


def grid(
    flow: CNF, extent: tuple[float, float, float, float], n: int = 200, *, solve: Solve = ACCURATE
) -> Grid:
    """The log-density of a 2-D flow at the centres of n x n cells, and its integral over them."""
    cells = np.meshgrid(cell_centres(extent[:2], n), cell_centres(extent[2:], n))
    points = jnp.asarray(np.stack(cells, -1).reshape(-1, 2), float)
    scores = score(flow, points, solve=solve)
    area = (extent[1] - extent[0]) * (extent[3] - extent[2]) / n**2
    mass = float(np.sum(np.exp(scores.log_prob, dtype=np.float64)) * area)
    return Grid(scores.log_prob.reshape(n, n), points, extent, mass, scores.failures)


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


# Accelerators multiply float32 matrices with fewer digits unless told otherwise.
_full_precision = jax.default_matmul_precision("highest")


@eqx.filter_jit
@_full_precision
def _score(flow, x, context, solve):
    result = transform(flow, x, context=context, solve=solve)
    return flow.base.log_prob(result.x) + result.logdet, result.stats


@eqx.filter_jit
@_full_precision
def _transport(flow, x, times, context, solve):
    return solve_trajectory(flow, x, times, context=context, solve=solve)


def _chunks(arrays, n, size):
    """Pieces of at most `size` rows, the last one padded by repeating its last row."""
    # An index past the end would be clamped by jax, and give the last row again.
    if any(len(a) != n for a in jax.tree.leaves(arrays)):
        raise ValueError(f"expected one row of context for each of the {n} points")
    size = min(size, n)
    for start in range(0, n, size):
        rows = np.minimum(np.arange(start, start + size), n - 1)
        yield jax.tree.map(lambda a, rows=rows: a[rows], arrays)


def _join(parts, stats, n):
    failed = np.repeat([bool(s.failed) for s in stats], len(parts[0]))[:n]
    joined = np.concatenate(parts)[:n]
    joined[failed] = np.nan
    return joined, int(failed.sum())
