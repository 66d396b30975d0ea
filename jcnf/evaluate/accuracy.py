"""Accuracy of a flow's log-densities: their numerical error next to their statistical error."""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_number
from jcnf.divergence import Divergence, Estimator, Exact, FixedNoise
from jcnf.evaluate.chunks import CHUNK, evenly_spaced
from jcnf.evaluate.grid import Grid, Quadrature, check_extent, grid, quadrature
from jcnf.evaluate.log_prob import (
    ACCURATE,
    LogProbs,
    check_data,
    log_prob,
    roundtrip,
    standard_error,
)
from jcnf.evaluate.precision import in_float64
from jcnf.evaluate.row_independence import COPIED_ROWS, RowIndependence, row_independence
from jcnf.flows import Flow
from jcnf.ode import Solve

MASS_TOLERANCE = 1e-3
MAX_ROUND_TRIP_POINTS = 1000
# With a time limit, the log-densities of points may take this share of it, but those of the first
# `MIN_POINTS` points are always computed.
SCORING_SHARE = 1 / 3
MIN_POINTS = 2000
# Cells of a grid that are far from the data may need many more steps than points do. With a time
# limit, their solves end after this many times the steps of the points, and at least `MIN_STEPS`.
TIMES_STEPS_OF_POINTS = 8
MIN_STEPS = 64


class AccuracyReport(NamedTuple):
    """Log-densities of points, and estimates of their errors."""

    scores: LogProbs  # by the given solve; the mean over draws if the divergence is an estimate
    points: np.ndarray  # indices of the rows of x that were measured, all unless time was short
    log_prob_error: np.ndarray  # (reference points,) nats: distance from the reference
    estimator_stderr: float  # standard error of the mean NLL by an estimator's noise, nats, or 0
    roundtrip_error: float  # max |x - to_data(to_base(x))|
    nfe_backward: float  # base to data, without the log-det
    failures: int  # points whose solve failed, to the base or back
    grid: Grid | None  # the density in 1 or 2 dimensions
    row_independence: RowIndependence | None  # None if every solve failed
    shortened: str  # what was measured only in part, to keep within the time limit, or ""
    quadrature: Quadrature | None = None  # the density on a manifold of 1 or 2 dimensions

    @property
    def nll_error(self) -> float:
        """Mean numerical error of a log-density, an upper bound for that of the NLL, nats.

        It is NaN if unknown: the solves of all points, or the reference, failed.
        """
        return float(np.mean(self.log_prob_error)) if len(self.log_prob_error) else np.nan

    def numerics(self) -> dict[str, float]:
        """Return the figures for a summary, by name."""
        figures = {
            "nfe_forward": self.scores.nfe,
            "nfe_backward": self.nfe_backward,
            "roundtrip_error": self.roundtrip_error,
            "log_prob_error": self.nll_error,
            "log_prob_error_max": float(np.max(self.log_prob_error, initial=self.nll_error)),
            "solver_failures": self.failures,
        }
        if self.estimator_stderr:
            figures["estimator_stderr"] = self.estimator_stderr
        if self.row_independence is not None:
            figures["row_difference"] = self.row_independence.difference
        if density := self.grid or self.quadrature:
            figures |= {"mass": density.mass, "grid_failures": density.failures}
        return figures

    def warnings(self) -> list[str]:
        """Return a sentence on each problem with the numbers; none if they can be trusted."""
        found = [self.shortened] if self.shortened else []
        if self.row_independence is not None and (wrong := self.row_independence.warning()):
            found.append(wrong)
        if self.failures:
            found.append(f"the solve failed for {self.failures} points: their numbers are missing")
        error, statistical = self.nll_error + self.estimator_stderr, self.scores.stderr
        if not error <= statistical:
            found.append(
                f"the numerical error of the NLL, {error:.1e} nats, is not below its statistical "
                f"error of {statistical:.1e}: tighten rtol/atol, average more probes, or use "
                "float64"
            )
        density = self.grid or self.quadrature
        if density and density.failures:
            found.append(f"the solve failed for {density.failures} cells of the grid")
        # Cells that were not measured may hold what is missing of the mass, but not an excess.
        missing = np.inf if density and density.unmeasured else MASS_TOLERANCE
        if density and not -missing <= density.mass - 1 <= MASS_TOLERANCE:
            enlarge = "enlarge the extent, " if self.grid else ""
            found.append(
                f"the density has a mass of {density.mass:.4f} on its grid, not 1: {enlarge}use "
                "more cells, or tighten rtol/atol"
            )
        return found


def accuracy_report(
    flow: Flow,
    x: Float[Array, "n dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    draws: int = 8,
    reference_points: int = 1000,
    extent: tuple[float, ...] | None = None,
    cells: int = 200,
    chunk: int | None = None,
    seconds: float | None = None,
) -> AccuracyReport:
    """Compute log-densities of `x` by `solve`, and estimate their error and that of a round trip.

    The numerical error is the difference from the same log-densities in float64 by dopri8 at a
    hundredth of the tolerance (1e-8 for fixed steps, and never below 1e-10), for
    `reference_points` of the points. It includes rounding; for a flow that solves no ODE, such as
    `jcnf.NICE`, it is rounding alone. The round trip uses at most `MAX_ROUND_TRIP_POINTS` points.
    An estimated `divergence` is drawn `draws` times (`key` is consumed once), and the log-densities
    are the means. Identical rows must have identical log-densities wherever they stand in a batch;
    this is checked in a batch as large as the largest one used here, at most `CHUNK` rows
    (`jcnf.evaluate.row_independence`). In 1 or 2 dimensions the density is integrated over
    `extent`, by default the range of `x` and half as much again on each side, and on a manifold of
    1 or 2 dimensions that has a quadrature, over the manifold.

    If all this would take longer than `seconds`, fewer points are measured, chosen at random, and
    the outer cells of the grid are left out; the warnings say so. At least `MIN_POINTS` points and
    one chunk of cells are always measured. Adaptive solves of cells then end after
    `TIMES_STEPS_OF_POINTS` times the steps that points take. `seconds` is not a hard limit:
    compiling and the last chunk may exceed it.

    **Raises:** `ValueError` as `jcnf.evaluate.log_prob` does, for fewer than 2 draws of an
    estimator, and for an `extent` on a manifold.
    """
    check_data(flow, x, context, solve, divergence)
    manifold = flow.bijection.manifold
    if manifold is not None and extent is not None:
        raise ValueError(f"extent must be None for a flow on a manifold; got {extent}")
    check_int(draws=draws, cells=cells)
    check_int(0, reference_points=reference_points)
    if extent is not None:
        check_extent(extent, x.shape[1])
    if seconds is not None:
        check_number("(0, inf)", seconds=seconds)
    start, given = time.monotonic(), len(x)

    def enough(done):
        late = seconds is not None and time.monotonic() - start > SCORING_SHARE * seconds
        return late and done >= MIN_POINTS

    order = np.arange(given)
    if seconds is not None:
        np.random.default_rng(0).shuffle(order)
    x, context = _rows((jnp.asarray(x), context), order)
    settings = {"context": context, "solve": solve, "chunk": chunk}
    keys: Any = [key]
    if isinstance(divergence, Estimator) and key is not None:
        if draws < 2:
            raise ValueError(
                "a stochastic divergence needs at least 2 draws, to measure its spread; got "
                f"draws={draws}"
            )
        keys = jax.random.split(key, draws)
    scored = [log_prob(flow, x, key=keys[0], divergence=divergence, enough=enough, **settings)]
    _, noise = flow.with_noise(divergence, keys[0], x)
    done = slice(0, len(scored[0].log_prob))
    x, context, noise = _rows((x, context, noise), done)
    settings["context"] = context
    scored += [log_prob(flow, x, key=k, divergence=divergence, **settings) for k in keys[1:]]
    log_probs = np.stack([s.log_prob for s in scored])
    scores = LogProbs(
        log_prob=log_probs.mean(0),
        nfe=float(np.mean([s.nfe for s in scored])),
        failed=np.any([s.failed for s in scored], axis=0),
    )
    few = evenly_spaced(len(x), reference_points)
    few = few[~scores.failed[few]]
    reference = np.full(len(few), np.nan)
    if len(few):
        x_few, context_few, noise_few = _rows((x, context, noise), few)
        reference = _reference(flow, x_few, context_few, solve, FixedNoise(divergence, noise_few))
    axes = x.shape[1] if manifold is None else manifold.intrinsic_dim
    plain = axes <= 2 and context is None
    some = evenly_spaced(len(x), MAX_ROUND_TRIP_POINTS)
    x_some, context_some = _rows((x, context), some)
    roundtrip_error, back = roundtrip(flow, x_some, context=context_some, solve=solve, chunk=chunk)
    failed = scores.failed.copy()
    failed[some] |= back.failed
    density = None
    if plain:
        cell_solve, end = solve, np.inf
        if seconds is not None:
            cell_solve = _no_longer(solve, scores.nfe)
            end = max(start + seconds, time.monotonic() + seconds / 3)
        per_axis = cells if axes == 2 else 10 * cells
        of_cells = {"solve": cell_solve, "enough": lambda done: time.monotonic() > end}
        if manifold is None:
            density = _grid(flow, x[~failed], extent, per_axis, of_cells)
        elif manifold.quadrature(1) is not None:
            density = quadrature(flow, per_axis, **of_cells)
    batch = min(CHUNK if chunk is None else chunk, len(x))
    if density is not None:
        batch = max(batch, min(CHUNK, density.log_prob.size))
    shortened = []
    if len(x) < given:
        shortened.append(f"{len(x)} of {given} points")
    if density is not None and density.unmeasured:
        cells, mass = density.log_prob.size, f"a mass of {density.mass:.4f}"
        inner = "the inner " if manifold is None else ""
        shortened.append(f"{inner}{cells - density.unmeasured} of {cells} cells ({mass})")
    return AccuracyReport(
        scores=scores,
        points=order[done],
        log_prob_error=np.abs(log_probs[0, few] - reference),
        estimator_stderr=standard_error(log_probs.mean(1)) if len(keys) > 1 else 0.0,
        roundtrip_error=roundtrip_error,
        nfe_backward=back.nfe,
        failures=int(failed.sum()),
        grid=density if isinstance(density, Grid) else None,
        row_independence=_row_independence(
            flow, x, keys[0], context, solve, divergence, ~scores.failed, batch
        ),
        shortened=f"measured {' and '.join(shortened)}, to keep within {seconds:.0f} s"
        if shortened
        else "",
        quadrature=density if isinstance(density, Quadrature) else None,
    )


def _row_independence(flow, x, key, context, solve, divergence, sound, batch):
    """Compare copies of the `sound` rows in one batch; return None if there are none."""
    if not np.any(sound):
        return None
    x, context = _rows((x, context), np.flatnonzero(sound)[:COPIED_ROWS])
    settings = {"key": key, "context": context, "solve": solve, "divergence": divergence}
    return row_independence(flow, x, batch=batch, **settings)


def _rows(arrays, index):
    return jax.tree.map(lambda a: a[index], arrays)


def _reference(flow, x, context, solve, divergence):
    """Return float64 log-densities by another solver, two digits more accurate, same noise."""
    loosest = 1e-6 if solve.step is not None else min(solve.rtol, solve.atol)
    tolerance = max(loosest / 100, 1e-10)
    accurate = Solve(
        solver="dopri8",
        rtol=tolerance,
        atol=tolerance,
        norm="worst",
        max_steps=4 * solve.max_steps,
    )

    def log_probs(flow, x, context, divergence):
        return log_prob(flow, x, context=context, solve=accurate, divergence=divergence).log_prob

    return in_float64(log_probs, flow, x, context, divergence)


def _no_longer(solve, nfe):
    """Return `solve` limited to a multiple of the steps that make `nfe` evaluations."""
    if solve.step is not None:
        return solve
    steps = nfe / int(solve.evaluations(2) - solve.evaluations(1))
    longest = max(MIN_STEPS, int(TIMES_STEPS_OF_POINTS * steps))
    return dataclasses.replace(solve, max_steps=min(solve.max_steps, longest))


def _grid(flow, x, extent, cells, settings):
    if extent is None and not len(x):
        return None
    if extent is None:
        low, high = np.min(x, 0), np.max(x, 0)
        margin = np.where(high > low, (high - low) / 2, 1)
        extent = tuple(np.stack([low - margin, high + margin], 1).ravel().tolist())
    return grid(flow, extent, cells, **settings)
