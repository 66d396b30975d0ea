"""Learning a density in the plane, as several experiments do."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import Loop, LoopExperiment, Measure, Run, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.loop import fit
from experiments._runner.objectives import FlowMatching, Objective
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import MAX_WIDTH, Count, Points, Range
from experiments._runner.stages import fresh_batches
from experiments._tasks import figures
from jcnf import evaluate, flows, plot
from jcnf.data.toys import Toy, toy
from jcnf.flows import augmented

VALIDATION_POINTS, REFERENCE_POINTS = 2000, 20_000
# Checks of the accuracy may take this share of the training time, and at least these seconds.
MEASURING_SHARE = 0.5
MIN_MEASURING_SECONDS = 40.0
# Importance samples of the extra dimensions per point: in validations, figures and the test.
VALIDATION_SAMPLES, VIEW_SAMPLES, TEST_SAMPLES = 4, 8, 64


ToyName = Literal[
    "8gaussians",
    "2spirals",
    "checkerboard",
    "pinwheel",
    "moons",
    "circles",
    "swissroll",
    "rings",
    "6gaussians",
    "2circles",
    "parabola",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneMeasure(Measure):
    """Held-out numbers and figures."""

    # number of fresh points for the held-out NLL
    test_points: Points = 20_000
    # number of grid cells per side in the figures of densities
    cells: Annotated[int, Range(2, 10_000)] = 150
    # width of the window in which mass is sought, relative to that of the figures
    margin: Annotated[float, Range(1, 10)] = 2.0
    # number of base samples whose trajectories are drawn
    particles: Count = figures.PARTICLES
    # number of times at which the trajectories are drawn
    frames: Annotated[int, Range(2, 10_000)] = figures.FRAMES


class PlaneExperiment(LoopExperiment):
    """The settings of an experiment that learns a density in the plane by the loop."""

    measure: PlaneMeasure
    augment: int = 0  # number of extra dimensions

    def make_density(self) -> Toy:
        """Return the density to learn."""
        raise NotImplementedError

    def make_flow(
        self, dim: int, context_dim: int = 0, data: np.ndarray | None = None
    ) -> flows.Flow:
        """Return the untrained flow; without data (n, dim), a flow of the same structure."""
        raise NotImplementedError


class PlaneFlow(FlowExperiment, PlaneExperiment):
    """The settings of an experiment that learns a density in the plane by a CNF."""

    measure: PlaneMeasure

    def trace(self) -> None:
        self.trace_objectives(2 + self.augment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyFlow(PlaneFlow):
    """A toy density and the flow that learns it."""

    # toy density
    data: ToyName = "8gaussians"
    # number of extra dimensions, N(0, I) in the data, beside x (the NLL is then a bound)
    augment: Annotated[int, Range(0, MAX_WIDTH)] = 0

    objective: Objective = FlowMatching()
    flow: FlowSettings = FlowSettings()
    training: Training = Training()
    measure: PlaneMeasure = PlaneMeasure()
    loop: Loop = Loop()
    run: Run = Run()

    def make_density(self) -> Toy:
        return toy(self.data)


def learn(
    name: str,
    settings: PlaneExperiment,
    more_metrics: Callable[[Any], dict[str, float]] = lambda flow: {},
) -> None:
    """Train the flow of the settings on their density, measure it on fresh points and draw it.

    `more_metrics(flow)` returns further figures for the summary.
    """
    density, measure, extra = settings.make_density(), settings.measure, settings.augment
    solve, val_solve = measure.make_solve(), measure.make_validation_solve()
    run_dir = RunDir(name, settings)
    seed = jr.key(settings.run.seed)
    val_key, test_key, sample_key, plot_key = jr.split(jr.fold_in(seed, 2), 4)
    joint_key, score_key = jr.split(jr.fold_in(seed, 3))  # for the extra dimensions
    sample = jax.jit(density.sample, static_argnums=1)
    validation = sample(val_key, VALIDATION_POINTS)

    def draw(key: Key[Array, ""], num: int):
        if not extra:
            return density.sample(key, num)
        key, extra_key = jr.split(key)
        return augmented.augment(density.sample(key, num), extra_key, extra)

    def score(flow, x, solve, samples):
        if not extra:
            return evaluate.log_prob(flow, x, solve=solve)
        return evaluate.marginal_log_prob(flow, x, score_key, samples=samples, solve=solve)

    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(2 + extra, data=reference_points(draw, settings.run.seed)),
        make_draw=fresh_batches(draw),
        data=None,
        validate=lambda flow: score(flow, validation, val_solve, VALIDATION_SAMPLES).nll,
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    test = sample(test_key, measure.test_points)
    joint = augmented.augment(test, joint_key, extra) if extra else test
    # A wider window than that of the figures, to find mass that the model puts outside it.
    cells = measure.cells + 2 * round((measure.margin - 1) * measure.cells / 2)
    with progress(f"measuring on {measure.test_points} fresh points"):
        report = evaluate.accuracy_report(
            flow,
            joint,
            solve=solve,
            extent=None if extra else square(density.extent * cells / measure.cells),
            cells=cells,
            seconds=max(MIN_MEASURING_SECONDS, MEASURING_SHARE * fitted.timing["train_s"]),
        )
        if extra:
            scores = score(flow, test, solve, TEST_SAMPLES)
            view = evaluate.grid_of(
                lambda points: score(flow, points, solve, VIEW_SAMPLES),
                square(density.extent),
                measure.cells,
            )
        else:
            assert report.grid is not None
            scores, found = report.scores, report.grid
            outside = round(len(found.log_prob) * (1 - measure.cells / cells) / 2)
            shown = min(len(found.log_prob) - 2 * outside, found.measured_cells)
            view = found.cropped(shown)
            test = test[report.points]
    gaps = np.asarray(density.log_prob(test)) - scores.log_prob
    with progress(f"drawing {measure.test_points} samples"):
        samples = evaluate.sample(flow, sample_key, measure.test_points, solve=solve)
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "nll_gap": float(np.mean(gaps)),
        "nll_gap_stderr": evaluate.standard_error(gaps),
        "entropy": density.entropy,
        **more_metrics(flow),
    }
    # The mean of true minus model log-density on the same points; NLL - entropy is noisier.
    gap = f"paired gap {metrics['nll_gap']:.3f} ± {metrics['nll_gap_stderr']:.3f}"
    title = f"{density.name}: held-out NLL {scores.nll:.3f} ± {scores.stderr:.3f} nats, {gap}"
    true = np.asarray(density.log_prob(view.points)).reshape(view.log_prob.shape)
    with progress("drawing figures"):
        figures.save_density_figures(
            run_dir,
            flow,
            np.asarray(test),
            samples.x[-1],
            view,
            key=plot_key,
            solve=solve,
            title=title,
            true_log_density=true,
            particles=measure.particles,
            frames=measure.frames,
        )
        run_dir.save_figures(
            training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
        )
    numerics = report.numerics() | fitted.numerics()
    warnings = report.warnings()
    if extra:
        numerics |= {
            "solver_failures": report.failures + scores.failures,
            "mass": view.mass,
            "grid_failures": view.failures,
            "importance_samples": TEST_SAMPLES,
        }
        if scores.failures or view.failures:
            warnings.append(
                f"the solve failed for {scores.failures} points and {view.failures} cells of the "
                "grid: their numbers are missing"
            )
    run_dir.finish(metrics, numerics, fitted.timing, warnings)


def reference_points(draw: Callable, seed: int) -> np.ndarray:
    """Return fresh points, for the moments of the data."""
    return np.asarray(draw(jr.fold_in(jr.key(seed), 4), REFERENCE_POINTS))


def square(half: float) -> tuple[float, float, float, float]:
    """Return the extent of the square [-half, half]^2."""
    return -half, half, -half, half
