"""Learn a density from its energy U alone: exp(-U) / Z with unknown Z, and no samples of it.

Training minimizes the reverse KL divergence (Chen et al. 2018, section 5.1 and figure 4), by
default with a planar flow.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import MAX_COUNT, preset
from experiments._runner.flow_config import FitSettings, FlowSettings
from experiments._runner.loop import fit
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import DrawOf, Stage, drawing
from experiments._tasks import figures
from jcnf import Flow, Solve, evaluate, objectives, plot
from jcnf._checks import InputError
from jcnf.data import energies
from jcnf.data.energies import Energy, Integral

VALIDATION_POINTS = 5000
CELLS = 300  # along each axis of the grid on which densities are integrated
# Share of the extent added at each side, where a flow may put mass that the target does not have.
MARGIN_SHARE = 0.25
# A KL divergence is never negative. An estimate further below 0 than sampling explains means that
# the flow is too stiff for its solve, so that its log-densities are wrong.
VALIDATION_KL_NOISE = 0.1  # nats
KL_STDERRS, KL_ROUNDING = 5, 1e-3  # of the final figure: standard errors, and nats
# A larger share of the density near the border of its window means that some lies outside.
MAX_BORDER_SHARE = 1e-4


@preset
class EnergySettings(FlowSettings):
    """Settings of a planar flow that learns a density from its energy by reverse KL."""

    # fresh samples of the flow to measure
    test_points: int = 20_000
    # first steps, by the energy U / --temperature, whose modes are connected: a mode that a flow
    # misses at first it does not find later
    hot_steps: int = 1000
    # temperature of the first --hot-steps
    temperature: float = 5.0

    objective = "reverse_kl"
    field = "planar"
    widths = (32, 32)
    t1 = 10.0
    steps = 3000
    batch = 512
    learning_rate = 3e-3

    def check(self) -> None:
        if self.steer or self.finetune_steps:
            raise InputError(
                "--steer and --finetune-steps need data for likelihood, and an energy has none: "
                "leave them out"
            )
        self.at_least(0, "hot_steps")
        self.positive("temperature")
        super().check()
        self.at_least(2, "test_points", most=MAX_COUNT)
        self.check_objective(dim=2)
        if self.temperature != type(self)().temperature and not self.hot_steps:
            raise InputError(
                "--temperature has no effect without --hot-steps: raise --hot-steps above 0, or "
                "leave it out"
            )

    def uses(self) -> set[str]:
        # Reverse KL uses the same solve, divergence and regularizers as likelihood.
        return super().uses() | {"likelihood"}

    @property
    def loss_units(self) -> str:
        return "nats"

    def make_energy(self) -> Energy:
        """Return the energy to learn."""
        raise NotImplementedError

    def make_objectives(self) -> dict[str, Callable]:
        return {"reverse_kl": self.make_reverse_kl()}

    def make_reverse_kl(self, temperature: float = 1.0) -> Callable:
        """Return the reverse KL to exp(-U / temperature), with the training solve."""
        function = self.make_energy().function
        return functools.partial(
            objectives.reverse_kl,
            energy=lambda x: function(x) / temperature,
            solve=self.make_solve(),
            divergence=self.make_divergence(),
            regularizers=self.make_regularizers(),
        )

    def make_stages(self) -> list[Stage]:
        """Return the stages: the tempered energy, the energy, then L-BFGS; unused ones left out."""
        stages = super().make_stages()
        if not self.hot_steps:
            return stages
        hot = stages[0]._replace(
            objective=objectives.with_context(self.make_reverse_kl(self.temperature)),
            steps=self.hot_steps,
            optimizer=self.make_optimizer(self.hot_steps, self.learning_rate),
        )
        return [hot, *stages]


@preset
class MatchEnergy(EnergySettings, FitSettings):
    """An energy and the flow that learns its density."""

    # energy to learn: u1, u2, u3, u4, or your own as module:function, which maps x (batch, 2) to U
    # (batch,) in nats by operations of jax.numpy
    target: str = "u1"
    # for your own energy: lowest and highest z1, then lowest and highest z2, of a window that holds
    # its mass
    extent: tuple[float, float, float, float] | None = None

    validate_every = 500

    @functools.cached_property
    def _energy(self) -> Energy:
        return energies.energy(self.target, self.extent)

    def make_energy(self) -> Energy:
        return self._energy


class Matched(NamedTuple):
    """Measurements of how near a flow is to its target density."""

    metrics: dict[str, float]
    samples: np.ndarray  # of the flow, without those whose solve failed
    report: evaluate.AccuracyReport  # of the log-densities of the samples
    failures: int  # samples whose solve failed
    warnings: list[str]  # reasons not to trust these numbers


def run(settings: MatchEnergy) -> None:
    """Train the flow, measure it on fresh samples and on a grid, and draw the figures."""
    energy = settings.make_energy()
    integral = integrated(energy)
    run_dir = RunDir("energy", settings, resume=settings.resume)
    flow = settings.make_flow(2)
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 2), 4)
    validation = flow.base.sample(keys[0], VALIDATION_POINTS)
    solve, quick = settings.make_test_solve(), settings.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        flow,
        draw_of=base_samples(flow),
        data=None,
        validate=lambda flow: possible(
            float(free_energy(flow, validation, energy, quick)) + integral.log, VALIDATION_KL_NOISE
        ),
        score="val_kl",
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    with progress(f"measuring on {settings.test_points} fresh samples"):
        matched = measure(flow, energy, integral, keys[1], settings.test_points, solve)
        view = evaluate.grid(flow, energy.extent, solve=solve)
    metrics = matched.metrics
    with progress("drawing figures"):
        figures.plane(
            run_dir,
            flow,
            target_samples(energy, len(matched.samples), settings.seed),
            matched.samples,
            view,
            key=keys[2],
            solve=solve,
            title=f"{energy.name}: reverse KL {metrics['reverse_kl']:.4f} nats, "
            f"ESS {100 * metrics['ess']:.1f} %; the data are of the target's grid",
            true_log_density=-np.asarray(energy.function(view.points)).reshape(view.log_prob.shape)
            - integral.log,
        )
        run_dir.save_figures(
            training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
        )
    numerics = matched.report.numerics() | {
        "samples_failed": matched.failures,
        **fitted.numerics(),
    }
    warnings = matched.warnings
    if integral.border > MAX_BORDER_SHARE:
        warnings.append(
            f"a share of {integral.border:.1e} of the mass of exp(-U) lies near the border of its "
            "extent, so Z may miss mass outside it: widen --extent"
        )
    run_dir.finish(metrics, numerics, fitted.timing, warnings)


def integrated(energy: Energy) -> Integral:
    """Integrate exp(-U) by quadrature; raise `InputError` if log Z is not finite."""
    integral = energies.integrate(energy)
    if not math.isfinite(integral.log):
        raise InputError(
            f"log Z of {energy.name} is {integral.log}: make its energy finite everywhere in "
            "--extent, with a steep wall where the density should end"
        )
    return integral


def base_samples(flow: Flow) -> DrawOf:
    """Return a function that draws batches of fresh base samples."""
    return drawing(lambda key, num: flow.base.sample(key, num))


@eqx.filter_jit
def free_energy(flow: Flow, z: Array, energy: Energy, solve: Solve) -> Array:
    """Estimate E_q[log q + U], nats, from base samples `z`; NaN if the solve of any failed."""
    value, metrics = objectives.reverse_kl(flow, z, energy=energy.function, solve=solve)
    return jnp.where(metrics["failed_rows"] > 0, jnp.nan, value)


def measure(
    flow: Flow,
    energy: Energy,
    integral: Integral,
    key: Key[Array, ""],
    num: int,
    solve: Solve,
) -> Matched:
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
        "reverse_kl": possible(float(-np.mean(log_w)), KL_STDERRS * stderr + KL_ROUNDING),
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
    return Matched(metrics, x, report, drawn.failures, warnings)


def possible(kl: float, noise: float) -> float:
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


def target_samples(energy: Energy, num: int, seed: int) -> np.ndarray:
    """Draw target samples (num, 2) for figures: grid cells by their mass, uniform within each."""
    points = energies.cell_grid(energy.extent, CELLS).reshape(-1, 2)
    log_p = -np.asarray(energy.function(jnp.asarray(points, float)), np.float64)
    p = np.exp(log_p - log_p.max())
    rng = np.random.default_rng(seed)
    a, b, c, d = energy.extent
    jitter = (rng.random((num, 2)) - 0.5) * np.array([b - a, d - c]) / CELLS
    return points[rng.choice(len(points), num, p=p / p.sum())] + jitter


if __name__ == "__main__":
    main(run, MatchEnergy)
