"""Learn p(x | class) of two moons, and draw samples with classifier-free guidance.

    python -m experiments.conditional --guidance 0 1 4
    python -m experiments.conditional objective:likelihood field:mlp

Guidance needs flow matching, which drops some classes so that the flow learns p(x) too.
"""

import dataclasses
import functools
from typing import Annotated

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import Loop, LoopExperiment, PointMeasure, Run, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.loop import fit
from experiments._runner.objectives import GuidedFlowMatching, Likelihood, Mixed
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Range, choice
from experiments._runner.stages import fresh_batches
from experiments._tasks.density2d import VALIDATION_POINTS
from jcnf import evaluate, fields, flows, plot
from jcnf.data import labeled_moons

SAMPLES_SHOWN = 2000  # in each class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance(GuidedFlowMatching):
    """Flow matching with some classes dropped, and the guidance that this allows."""

    # guidance scales to draw: 0 ignores the class, 1 samples p(x | class)
    guidance: Annotated[tuple[float, ...], Range(-1e3, 1e3, min_length=1)] = (0.0, 1.0, 2.0, 4.0)

    def check(self) -> None:
        super().check()
        if not self.drop_context and set(self.guidance) != {1.0}:
            raise ValueError(
                "--guidance other than 1 needs a flow also trained without the class: set "
                "--drop-context above 0, or pass --guidance 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional(FlowExperiment, LoopExperiment):
    """Two moons by class, and the conditional flow that learns them."""

    objective: (
        Annotated[Guidance, choice("objective:flow-matching")]
        | Annotated[Likelihood, choice("objective:likelihood")]
        | Annotated[Mixed, choice("objective:mixed")]
    ) = Guidance()
    flow: FlowSettings = FlowSettings()
    training: Training = Training()
    measure: PointMeasure = PointMeasure()
    loop: Loop = Loop()
    run: Run = Run()

    def trace(self) -> None:
        self.trace_objectives(2, labeled_moons.CLASSES)


def run(settings: Conditional) -> None:
    """Train the flow, measure it on fresh points of each class, and draw guided samples."""
    run_dir = RunDir("conditional", settings)
    val_key, test_key, sample_key, data_key = jr.split(jr.fold_in(jr.key(settings.run.seed), 2), 4)

    def labeled(key, num):
        label_key, point_key = jr.split(key)
        labels = jr.randint(label_key, (num,), 0, labeled_moons.CLASSES)
        return labeled_moons.sample(point_key, labels), labels

    def with_classes(key, num):
        x, labels = labeled(key, num)
        return x, labeled_moons.one_hot(labels)

    validation, val_labels = labeled(val_key, VALIDATION_POINTS)
    val_context = labeled_moons.one_hot(val_labels)
    solve, val_solve = settings.measure.make_solve(), settings.measure.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(2, labeled_moons.CLASSES),
        make_draw=fresh_batches(with_classes),
        data=None,
        validate=lambda flow: (
            evaluate.log_prob(flow, validation, context=val_context, solve=val_solve).nll
        ),
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    labels = jnp.repeat(jnp.arange(labeled_moons.CLASSES), settings.measure.test_points)
    test, context = labeled_moons.sample(test_key, labels), labeled_moons.one_hot(labels)
    with progress(f"measuring on {len(test)} fresh points"):
        report = evaluate.accuracy_report(flow, test, context=context, solve=solve)
    log_prob = report.scores.log_prob
    gaps = np.asarray(labeled_moons.log_prob(test, labels)) - log_prob
    metrics = {
        "test_nll": report.scores.nll,
        "test_nll_stderr": report.scores.stderr,
        "nll_gap": float(np.mean(gaps)),
        "nll_gap_stderr": evaluate.standard_error(gaps),
        "entropy": labeled_moons.ENTROPY,
    }
    for label in range(labeled_moons.CLASSES):
        of_class = np.asarray(labels) == label
        metrics[f"test_nll_class{label}"] = float(-np.mean(log_prob[of_class]))
        metrics[f"nll_gap_class{label}"] = float(np.mean(gaps[of_class]))
    shown = jnp.repeat(jnp.arange(labeled_moons.CLASSES), SAMPLES_SHOWN)
    z = flow.base.sample(sample_key, len(shown))
    clouds = []
    objective = settings.objective
    for scale in objective.guidance if isinstance(objective, Guidance) else (1.0,):
        # The scale is an array, so that all scales share one compiled program.
        guide = functools.partial(fields.Guided, scale=jnp.asarray(scale, float))
        guided = flows.with_fields(flow, guide)
        times = jnp.array([0.0, flow.bijection.t1])
        paths = evaluate.trajectory(
            guided, z, times, context=labeled_moons.one_hot(shown), solve=solve, chunk=len(z)
        )
        clouds.append((f"guidance {scale:g}", paths.x[-1], np.asarray(shown)))
    clouds.insert(0, ("data", np.asarray(labeled_moons.sample(data_key, shown)), np.asarray(shown)))
    run_dir.save_figures(
        guidance=plot.scatter_by_class(clouds, labeled_moons.EXTENT),
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units),
    )
    numerics = report.numerics() | fitted.numerics()
    run_dir.finish(metrics, numerics, fitted.timing, report.warnings())


if __name__ == "__main__":
    main(run, Conditional)
