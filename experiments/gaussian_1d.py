"""Learn a one-dimensional Gaussian from 100 points, with a field of 10 parameters and L-BFGS.

    python -m experiments.gaussian_1d --points 1000
    python -m experiments.gaussian_1d divergence:hutchinson --noise gaussian

The defaults reproduce the problem of DiffEqFlux's FFJORD tutorial. Its `monte_carlo=True` is the
second command (Rademacher noise is exact in one dimension).
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import Loop, LoopExperiment, PointMeasure, Run, Training
from experiments._runner.fields import MLP, FlowSettings
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.loop import fit
from experiments._runner.objectives import Likelihood, Objective
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Points, Whole
from experiments._runner.solves import TrainingSolve
from experiments._runner.stages import Stage
from jcnf import evaluate, plot, training
from jcnf.distributions import ScaledNormal

MEAN, STD = 6.0, 0.7
EXTENT = (0.0, 12.0)  # more than 8 standard deviations to each side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian1D(FlowExperiment, LoopExperiment):
    """Points of N(6, 0.7^2) and the flow that learns their density."""

    has_table: ClassVar[bool] = True

    # number of training points
    points: Points = 100
    # seed of the training points; --seed is the seed of everything else
    data_seed: Whole = 0

    objective: Objective = Likelihood(
        # The line search of L-BFGS compares losses that hardly differ, so they must be accurate.
        solve=TrainingSolve(solver="tsit5", rtol=1e-5, atol=1e-5)
    )
    flow: FlowSettings = FlowSettings(
        field=MLP(widths=(3,), time="ignore", activation="tanh", bounded=True), t1=10.0
    )
    training: Training = Training(
        steps=20,
        batch=100,
        learning_rate=1e-2,
        warmup=0,
        average=0.0,
        # Three steps for each parameter find the Gaussian of the points. Many more fit the noise of
        # the points, unless --regularizers jacobian 1 keeps the density smooth.
        lbfgs_steps=30,
    )
    measure: PointMeasure = PointMeasure()
    loop: Loop = Loop(log_every=1, validate_every=10)
    run: Run = Run()

    def trace(self) -> None:
        self.trace_objectives(1)

    def make_stages(self) -> list[Stage]:
        """Return the stages; a batch as large as the points becomes all of them."""
        return [
            stage._replace(batch=None) if (stage.batch or 0) >= self.points else stage
            for stage in super().make_stages()
        ]


def run(settings: Gaussian1D) -> None:
    """Train on the points, measure on fresh points and against the true density, and draw."""
    run_dir = RunDir("gaussian_1d", settings)
    truth = ScaledNormal(1, STD, MEAN)
    points = truth.sample(jr.fold_in(jr.key(settings.data_seed), 3), settings.points)
    test_key, sample_key = jr.split(jr.fold_in(jr.key(settings.run.seed), 2))
    solve, val_solve = settings.measure.make_solve(), settings.measure.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(1, data=np.asarray(points)),
        make_draw=training.draw_rows,
        data=points,
        # Validation is on the training points: there are no others.
        validate=lambda flow: evaluate.log_prob(flow, points, solve=val_solve).nll,
        score="train_nll",
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    test = truth.sample(test_key, settings.measure.test_points)
    with progress(f"measuring on {len(test)} fresh points"):
        report = evaluate.accuracy_report(flow, test, solve=solve, extent=EXTENT)
    scores, view = report.scores, report.grid
    assert view is not None
    gaps = np.asarray(truth.log_prob(test)) - scores.log_prob
    drawn = evaluate.sample(flow, sample_key, settings.measure.test_points, solve=solve)
    samples = drawn.x[-1][~drawn.failed]
    at_points = np.asarray(truth.log_prob(points))
    learned = evaluate.log_prob(flow, points, solve=solve).log_prob
    fitted_normal = ScaledNormal(1, float(jnp.std(points)), float(jnp.mean(points)))
    axis = np.asarray(view.points)[:, 0]
    density, true_density = np.exp(view.log_prob), np.exp(truth.log_prob(view.points))
    cell = (EXTENT[1] - EXTENT[0]) / len(axis)
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "nll_gap": float(np.mean(gaps)),
        "nll_gap_stderr": evaluate.standard_error(gaps),
        "entropy": math.log(STD * math.sqrt(2 * math.pi * math.e)),
        "train_nll": fitted.score,
        # As published, over the training points only; then the integral of |p - q| / 2 itself;
        # then the published measure for a Gaussian with the points' mean and standard deviation.
        "total_variation": half_difference(at_points, learned),
        "total_variation_integral": float(np.sum(np.abs(density - true_density)) * cell / 2),
        "gaussian_total_variation": half_difference(at_points, fitted_normal.log_prob(points)),
        "gaussian_nll": evaluate.gaussian_nll(np.asarray(points), np.asarray(test)),
        **moments("sample", samples),
        **moments("points", points),
    }
    figure = plot.histogram(points, samples, axis, density)
    (axes,) = figure.axes
    axes.plot(axis, true_density, color="black", ls=":", label="true density")
    axes.legend()
    run_dir.save_figures(
        histogram=figure,
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units),
    )
    numerics = report.numerics() | fitted.numerics()
    numerics["solver_failures"] += drawn.failures
    run_dir.finish(metrics, numerics, fitted.timing, report.warnings())


def half_difference(log_p, log_q) -> float:
    """Mean of |p - q| / 2 over points, from log-densities."""
    return float(np.mean(np.abs(np.exp(log_p) - np.exp(log_q))) / 2)


def moments(name: str, x) -> dict[str, float]:
    """Return the mean and standard deviation of `x`, with keys that start with `name`."""
    return {f"{name}_mean": float(np.mean(x)), f"{name}_std": float(np.std(x))}


if __name__ == "__main__":
    main(run, Gaussian1D)
