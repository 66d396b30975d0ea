"""Learning the density of an energy U, exp(-U) / Z, without samples of it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import Training
from experiments._runner.objectives import BySolves
from experiments._runner.settings import Positive, Whole
from experiments._runner.solves import TrainingSolve
from experiments._runner.stages import MakeDraw, Stage, fresh_batches
from jcnf import Flow, Solve, evaluate, objectives
from jcnf._checks import InputError
from jcnf.data import energies
from jcnf.data.energies import Energy, Integral

EnergyName = Literal["u1", "u2", "u3", "u4"]
CELLS = 300  # along each axis of the grid on which densities are integrated
# Share of the extent added at each side, where a flow may put mass that the target does not have.
MARGIN_SHARE = 0.25
# A KL divergence is never negative. An estimate further below 0 than sampling explains means that
# the flow is too stiff for its solve, so that its log-densities are wrong.
KL_STDERRS, KL_ROUNDING = 5, 1e-3  # of the final figure: standard errors, and nats
# A flow learns to exploit the errors of looser solves: its loss falls below -log Z, which no loss
# can, while its true KL and its number of evaluations rise.
TRAINING_SOLVE = TrainingSolve(rtol=1e-4, atol=1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReverseKL(BySolves):
    """Reverse KL divergence to the density of an energy U, by ODE solves."""

    solve: TrainingSolve = TRAINING_SOLVE
    # number of steps by the energy U / --temperature, whose modes are connected, before --steps by
    # U itself: a mode that a flow misses at first it does not find later
    hot_steps: Whole = 1000
    # temperature of these steps
    temperature: Positive = 5.0

    @functools.cached_property
    def energy(self) -> Energy:
        """The energy U."""
        raise NotImplementedError

    def make(self, temperature: float = 1.0) -> Callable:
        """Return the reverse KL to exp(-U / temperature)."""
        return functools.partial(
            objectives.reverse_kl,
            # Looked up when this is traced, because an energy may have to be imported.
            energy=lambda x: self.energy.function(x) / temperature,
            **self.options,
        )

    def make_stages(self, training: Training) -> list[Stage]:
        """Return a stage of training by the tempered energy, if it has steps, and one by U."""
        stages = super().make_stages(training)
        if self.hot_steps:
            hot = objectives.with_context(self.make(self.temperature))
            stages.insert(0, training.make_stage(hot, self.solve.make(), steps=self.hot_steps))
        return stages


class MatchReport(NamedTuple):
    """Measurements of how near a flow is to its target density."""

    metrics: dict[str, float]
    samples: np.ndarray  # of the flow, without those whose solve failed
    report: evaluate.AccuracyReport  # of the log-densities of the samples
    failures: int  # samples whose solve failed
    warnings: list[str]  # reasons not to trust these numbers


def integrated(energy: Energy) -> Integral:
    """Integrate exp(-U) by quadrature; raise `InputError` if log Z is not finite."""
    integral = energies.integrate(energy)
    if not math.isfinite(integral.log):
        raise InputError(
            f"log Z of {energy.name} is {integral.log}: make its energy finite everywhere in "
            "--extent, with a steep wall where the density should end"
        )
    return integral


def base_batches(flow: Flow) -> MakeDraw:
    """Return a function that draws batches of fresh base samples."""
    return fresh_batches(lambda key, num: flow.base.sample(key, num))


def measure(
    flow: Flow,
    energy: Energy,
    integral: Integral,
    key: Key[Array, ""],
    num: int,
    solve: Solve,
) -> MatchReport:
    """Measure KL in both directions, effective sample size and log Z with `num` fresh samples.

    Mass that the flow misses is in none of its samples. So `forward_kl`, the mean under the target
    of the log-ratio of its density to the flow's, is an integral over a grid. Consumes `key`.
    """
    drawn = evaluate.sample(flow, key, num, solve=solve)
    x = drawn.x[-1][~drawn.failed]
    report = evaluate.accuracy_report(
        flow, jnp.asarray(x), solve=solve, extent=widened(energy.extent), cells=CELLS
    )
    log_q = report.scores.log_prob.astype(np.float64)
    u = np.asarray(energy.function(jnp.asarray(x)), np.float64)
    known = ~report.scores.failed
    log_w = (-u - integral.log - log_q)[known]  # log p / q
    top = log_w.max()
    w = np.exp(log_w - top)
    stderr = evaluate.standard_error(log_w)
    metrics = {
        "reverse_kl": nan_if_negative(float(-np.mean(log_w)), KL_STDERRS * stderr + KL_ROUNDING),
        "reverse_kl_stderr": stderr,
        "forward_kl": forward_kl(report.grid, energy, integral),
        "ess": float(np.sum(w) ** 2 / (len(w) * np.sum(w**2))),
        "log_z": integral.log,
        "log_z_importance": float(np.log(np.mean(w)) + top + integral.log),
        "log_z_importance_stderr": evaluate.standard_error(w) / float(np.mean(w)),
    }
    warnings = report.warnings()
    if math.isnan(metrics["reverse_kl"]):
        metrics |= dict.fromkeys(("forward_kl", "ess", "log_z_importance"), math.nan)
        warnings.append(
            f"E_q[log q + U] + log Z is {-np.mean(log_w):.3g}, which no KL divergence can be: the "
            "flow is too stiff for its solve; train with a smaller --clip, or smaller --rtol and "
            "--atol"
        )
    return MatchReport(metrics, x, report, drawn.failures, warnings)


def nan_if_negative(kl: float, noise: float) -> float:
    """Return an estimated KL, nats, or NaN if it is more negative than noise explains."""
    return kl if kl >= -noise else math.nan


def widened(extent: energies.Extent) -> energies.Extent:
    """Add a margin to each side of an extent."""
    a, b, c, d = extent
    across, up = MARGIN_SHARE * (b - a), MARGIN_SHARE * (d - c)
    return a - across, b + across, c - up, d + up


def forward_kl(grid: evaluate.Grid | None, energy: Energy, integral: Integral) -> float:
    """KL(p || q), nats, by the midpoint rule; NaN if q is unknown anywhere that p has mass."""
    assert grid is not None  # there always is one in two dimensions
    a, b, c, d = grid.extent
    area = (b - a) * (d - c) / grid.log_prob.size
    log_p = -np.asarray(energy.function(grid.points), np.float64) - integral.log
    p = np.exp(log_p)
    some = p * area > 1e-12
    return float(np.sum((p * (log_p - grid.log_prob.ravel()))[some]) * area)
