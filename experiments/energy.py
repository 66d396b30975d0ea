"""Learn a density from its energy U alone: exp(-U) / Z with unknown Z, and no samples of it.

    python -m experiments.energy --target u2
    python -m experiments.energy --target module:function --extent -4 4 -4 4

Training minimizes the reverse KL divergence (Chen et al. 2018, section 5.1 and figure 4), by
default with a planar flow.
"""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from experiments._runner.cli import main
from experiments._runner.config import Loop, LoopExperiment, PointMeasure, Run, Training
from experiments._runner.fields import FlowSettings, Planar
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.loop import fit
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._tasks import figures
from experiments._tasks.energies import (
    CELLS,
    ReverseKL,
    base_batches,
    integrated,
    measure,
    nan_if_negative,
)
from jcnf import Flow, Solve, evaluate, objectives, plot
from jcnf.data import energies
from jcnf.data.energies import Energy

VALIDATION_POINTS = 5000
VALIDATION_KL_NOISE = 0.1  # nats by which an estimate in validations may be negative
# A larger share of the density near the border of its window means that some lies outside.
MAX_BORDER_SHARE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetKL(ReverseKL):
    """Reverse KL divergence to the density of the energy, by ODE solves."""

    # energy to learn: u1, u2, u3, u4, or your own as module:function, which maps x (batch, 2) to U
    # (batch,) in nats by operations of jax.numpy
    target: str = "u1"
    # for your own energy: lowest and highest z1, then lowest and highest z2, of a window that holds
    # its mass
    extent: energies.Extent | None = None

    def check(self) -> None:
        super().check()
        if ":" not in self.target:  # your own is imported later, once JAX may compute
            energies.energy(self.target, self.extent)

    @functools.cached_property
    def energy(self) -> Energy:
        with jax.ensure_compile_time_eval():  # an energy of yours is tried, even within a jit
            return energies.energy(self.target, self.extent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchEnergy(FlowExperiment, LoopExperiment):
    """An energy and the flow that learns its density."""

    objective: TargetKL = TargetKL()
    flow: FlowSettings = FlowSettings(field=Planar(units=32, hyper_width=32), t1=10.0)
    training: Training = Training(steps=3000, batch=512, learning_rate=3e-3)
    measure: PointMeasure = PointMeasure(test_points=20_000)
    loop: Loop = Loop(validate_every=500)
    run: Run = Run()

    def trace(self) -> None:
        self.trace_objectives(2)


def run(settings: MatchEnergy) -> None:
    """Train the flow, measure it on fresh samples and on a grid, and draw the figures."""
    energy = settings.objective.energy
    integral = integrated(energy)
    run_dir = RunDir("energy", settings)
    flow = settings.make_flow(2)
    keys = jr.split(jr.fold_in(jr.key(settings.run.seed), 2), 4)
    validation = flow.base.sample(keys[0], VALIDATION_POINTS)
    test_points = settings.measure.test_points
    solve, val_solve = settings.measure.make_solve(), settings.measure.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        flow,
        make_draw=base_batches(flow),
        data=None,
        validate=lambda flow: nan_if_negative(
            float(free_energy(flow, validation, energy, val_solve)) + integral.log,
            VALIDATION_KL_NOISE,
        ),
        score="val_kl",
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    with progress(f"measuring on {test_points} fresh samples"):
        matched = measure(flow, energy, integral, keys[1], test_points, solve)
        view = evaluate.grid(flow, energy.extent, solve=solve)
    metrics = matched.metrics
    with progress("drawing figures"):
        figures.save_density_figures(
            run_dir,
            flow,
            target_samples(energy, len(matched.samples), settings.run.seed),
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


@eqx.filter_jit
def free_energy(flow: Flow, z: Array, energy: Energy, solve: Solve) -> Array:
    """Estimate E_q[log q + U], nats, from base samples `z`; NaN if the solve of any failed."""
    value, metrics = objectives.reverse_kl(flow, z, energy=energy.function, solve=solve)
    return jnp.where(metrics["failed_rows"] > 0, jnp.nan, value)


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
