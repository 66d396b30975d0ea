"""Learning a density in the plane, as several experiments do."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import MAX_COUNT, MAX_WIDTH, LoopSettings, RunSettings
from experiments._runner.flow_config import FitSettings, FlowSettings
from experiments._runner.loop import fit
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import drawing
from experiments._tasks import figures
from jcnf import Solve, evaluate, plot
from jcnf.data.toys import Toy, toy
from jcnf.flows import Flow, augmented

VALIDATION_POINTS = 2000
# Checks of the accuracy may take this share of the training time, and at least these seconds.
MEASURING_SHARE = 0.5
MIN_MEASURING_SECONDS = 20.0
# Importance samples of the extra dimensions per point: in validations, figures and the test.
VALIDATION_SAMPLES, VIEW_SAMPLES, TEST_SAMPLES = 4, 8, 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneSettings(RunSettings):
    """Settings of a density in the plane and of its measurement."""

    # number of fresh points for the held-out NLL
    test_points: int = 20_000
    # number of grid cells per side in the figures of densities
    cells: int = 150
    # width of the window in which mass is sought, relative to that of the figures
    margin: ClassVar[float] = 2.0

    def check(self) -> None:
        super().check()
        self.make_density()
        self.at_least(2, "test_points", most=MAX_COUNT)
        self.at_least(2, "cells", most=10_000)

    def make_density(self) -> Toy:
        """Return the density to learn."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToySettings(PlaneSettings):
    """Settings of a toy density."""

    # toy density: 8gaussians, 2spirals, checkerboard, pinwheel, moons, circles, swissroll, rings,
    # 6gaussians, 2circles, parabola
    data: str = "8gaussians"

    def make_density(self) -> Toy:
        return toy(self.data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneLoop(LoopSettings, PlaneSettings):
    """Settings of a density and of the loop that trains on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneFlow(FlowSettings, PlaneSettings):
    """Settings of a density and of the flow that learns it."""

    @property
    def dim(self) -> int:
        return 2

    def check(self) -> None:
        super().check()
        self.check_objective(self.dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneFit(FitSettings, PlaneFlow, PlaneLoop):
    """Settings of a density and of the flow that the loop trains on it."""

    # number of extra dimensions, N(0, I) in the data, beside x (the NLL is then a bound)
    augment: int = 0
    # number of base samples whose trajectories are drawn
    particles: int = figures.PARTICLES
    # number of times at which the trajectories are drawn
    frames: int = figures.FRAMES

    @property
    def dim(self) -> int:
        return 2 + self.augment

    def check(self) -> None:
        self.at_least(0, "augment", most=MAX_WIDTH)
        super().check()
        self.at_least(1, "particles", most=MAX_COUNT)
        self.at_least(2, "frames", most=10_000)


def learn_flow(
    name: str, settings: PlaneFit, also: Callable[[Any], dict[str, float]] = lambda flow: {}
) -> None:
    """Train the flow of the settings on their density, measure it and draw it."""
    flow = settings.make_flow(settings.dim)
    solves = settings.make_test_solve(), settings.make_validation_solve()
    learn(name, settings, flow, *solves, also=also, ways=(settings.particles, settings.frames))


def learn(
    name: str,
    settings: PlaneLoop,
    flow: Flow,
    solve: Solve,
    quick: Solve,
    *,
    also: Callable[[Any], dict[str, float]] = lambda flow: {},
    ways: tuple[int, int] = (figures.PARTICLES, figures.FRAMES),
) -> None:
    """Train `flow`, measure it on fresh points and draw it.

    Measurements use the ODE solve `solve`, validations `quick`. `also(flow)` returns further
    figures for the summary. `ways` is the number of base samples whose trajectories are drawn, if
    the flow is a CNF, and the number of times. Dimensions of the flow beyond two are extra ones.
    """
    density, extra = settings.make_density(), flow.base.dim - 2
    run_dir = RunDir(name, settings, resume=settings.resume)
    val_key, test_key, sample_key, plot_key = jr.split(jr.fold_in(jr.key(settings.seed), 2), 4)
    # Keys for the extra dimensions.
    joint_key, score_key = jr.split(jr.fold_in(jr.key(settings.seed), 3))
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
        flow,
        draw_of=drawing(draw),
        data=None,
        validate=lambda flow: score(flow, validation, quick, VALIDATION_SAMPLES).nll,
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {})

    test = sample(test_key, settings.test_points)
    joint = augmented.augment(test, joint_key, extra) if extra else test
    # A wider window than that of the figures, to find mass that the model puts outside it.
    cells = settings.cells + 2 * round((settings.margin - 1) * settings.cells / 2)
    with progress(f"measuring on {settings.test_points} fresh points"):
        report = evaluate.accuracy_report(
            flow,
            joint,
            solve=solve,
            extent=None if extra else square(density.extent * cells / settings.cells),
            cells=cells,
            seconds=max(MIN_MEASURING_SECONDS, MEASURING_SHARE * fitted.timing["train_s"]),
        )
        if extra:
            scores = score(flow, test, solve, TEST_SAMPLES)
            view = evaluate.grid_of(
                lambda points: score(flow, points, solve, VIEW_SAMPLES),
                square(density.extent),
                settings.cells,
            )
        else:
            assert report.grid is not None
            scores, found = report.scores, report.grid
            outside = round(len(found.log_prob) * (1 - settings.cells / cells) / 2)
            shown = min(len(found.log_prob) - 2 * outside, found.measured_cells)
            view = found.cropped(shown)
            test = test[report.points]
    gaps = np.asarray(density.log_prob(test)) - scores.log_prob
    with progress(f"drawing {settings.test_points} samples"):
        samples = evaluate.sample(flow, sample_key, settings.test_points, solve=solve)
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "nll_gap": float(np.mean(gaps)),
        "nll_gap_stderr": evaluate.standard_error(gaps),
        "entropy": density.entropy,
        **also(flow),
    }
    title = f"{density.name}: held-out NLL {scores.nll:.3f} nats, gap {metrics['nll_gap']:.3f}"
    true = np.asarray(density.log_prob(view.points)).reshape(view.log_prob.shape)
    with progress("drawing figures"):
        figures.plane(
            run_dir,
            flow,
            np.asarray(test),
            samples.x[-1],
            view,
            key=plot_key,
            solve=solve,
            title=title,
            true_log_density=true,
            particles=ways[0],
            frames=ways[1],
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


def square(half: float) -> tuple[float, float, float, float]:
    """Return the extent of the square [-half, half]^2."""
    return -half, half, -half, half
