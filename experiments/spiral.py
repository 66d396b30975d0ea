"""Learn a neural ODE from one noisy trajectory: a spiral of known motion, or a table of times.

    python -m experiments.spiral --target cubic --irregular
    python -m experiments.spiral data:table --path table.csv --solver rk4 --fixed-step 0.2

The data, network and Euler steps are the source's (see `jcnf.data.series`), with more windows in a
batch and a higher learning rate, which decays as a cosine. The source's own settings:
--batch 1 --learning-rate 5e-4 --schedule constant --warmup 0 --average 0 --clip 1e9. With
--solver rk4 --fixed-step 0.2 a solve takes as many evaluations and has none of Euler's error.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, ClassVar

import jax.random as jr
import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import Loop, LoopExperiment, Measure, Run, Training
from experiments._runner.fields import MLP
from experiments._runner.loop import fit
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import (
    MAX_COUNT,
    NonNegative,
    Points,
    Positive,
    Range,
    Settings,
    Whole,
    choice,
)
from experiments._runner.solves import TrainingSolve
from experiments._runner.stages import Stage
from experiments._tasks.series import SCORE, LearnedSeries, SpiralName, root_mean_square
from jcnf import objectives, plot, training
from jcnf._checks import InputError
from jcnf.data.series import Series, load_series, spiral
from jcnf.training import checkpoint

# Between observations, in t, where velocities are of the order of 1.
MAX_TIME_GAP = 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(Settings):
    """A spiral of known motion, observed with noise."""

    # spiral to learn: linear (dz/dt = W z), cubic (dz/dt = W' z^3)
    target: SpiralName = "linear"
    # number of observations
    points: Annotated[int, Range(3, MAX_COUNT)] = 200
    # standard deviation of the noise on the observations
    noise: NonNegative = 0.01
    # observe the spiral at random times
    irregular: bool = False
    # all observations are trained on
    held_out: ClassVar[int] = 0

    def make(self, seed: int) -> Series:
        """Return the series to learn from."""
        return spiral(
            self.target,
            points=self.points,
            noise=self.noise,
            irregular=self.irregular,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Settings):
    """A table: a column of times, then the values, which are standardized."""

    # file of the table
    path: Path
    # unit of t in the times of the table (default: chosen to make velocities about 1)
    time_unit: Positive | None = None
    # number of observations at the end to hold out from training
    held_out: Whole = 0

    def make(self, seed: int) -> Series:
        """Return the series to learn from, which does not depend on the seed."""
        return load_series(self.path, unit=self.time_unit, held_out=self.held_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows(Settings):
    """The training windows, which --batch and --lbfgs-batch (0: one from each row) count."""

    # length in t of the shortest windows
    shortest: Positive = 1.0
    # length in t of the longest windows
    longest: Positive = 5.0
    # maximum number of observations in a window
    rows: Points = 32

    def check(self) -> None:
        self.make_draw(1)

    def make_draw(self, num: int | None) -> training.DrawBatch:
        """Return a function that draws `num` windows, or with None the longest from each row."""
        return objectives.sample_windows(
            num, shortest=self.shortest, longest=self.longest, rows=self.rows
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spiral(LoopExperiment):
    """A series and the field that learns to follow it."""

    has_table: ClassVar[bool] = True

    data: Annotated[Target, choice("data:target")] | Annotated[Table, choice("data:table")] = (
        Target()
    )
    windows: Windows = Windows()
    field: MLP = MLP(widths=(16, 16), time="ignore", activation="elu")
    solve: TrainingSolve = TrainingSolve(solver="euler", fixed_step=0.05)
    training: Training = Training(
        steps=1200, batch=32, learning_rate=3e-2, warmup=50, average=0.99, lbfgs_batch=0
    )
    measure: Measure = Measure()
    loop: Loop = Loop(log_every=20, checkpoint_every=200, validate_every=20)
    run: Run = Run()

    def check(self) -> None:
        super().check()
        self.solve.check_interval(self.windows.longest)
        self.make_stages()

    def make_stages(self) -> list[Stage]:
        solve = self.solve.make()
        objective = functools.partial(objectives.trajectory_fit, solve=solve)
        return self.training.then_lbfgs([self.training.make_stage(objective, solve)])

    @property
    def loss_units(self) -> str:
        return "mean squared error"


def run(settings: Spiral) -> None:
    """Train the field, compare it with the truth, and draw the trajectories as it learned them."""
    series = settings.data.make(settings.run.seed)
    gap = float(np.max(np.diff(series.times)))
    if not gap <= MAX_TIME_GAP:
        raise InputError(
            f"the widest gap between times is {gap:.3g} units of t, more than {MAX_TIME_GAP:g}: "
            f"give a larger --time-unit than {series.unit:.3g}"
        )
    settings.solve.check_interval(max(settings.windows.longest, gap))
    run_dir = RunDir("spiral", settings)
    learner = LearnedSeries(
        run_dir,
        series,
        held_out=settings.data.held_out,
        draw_all=settings.windows.make_draw(None),
        solve=settings.measure.make_solve(),
        val_solve=settings.measure.make_validation_solve(),
    )
    key = jr.fold_in(jr.key(settings.run.seed), 0)
    fitted = fit(
        run_dir,
        settings,
        settings.field.make(series.values.shape[1], 0, key),
        make_draw=settings.windows.make_draw,
        data=learner.data,
        validate=learner.validate,
        score=SCORE,
    )
    field = fitted.flow
    checkpoint.save(
        run_dir.path / "field.jcnf", training.partition(field)[0], {"config": run_dir.config}
    )

    metrics, warnings = {}, []
    curve, stats = learner.follow(field, series.values[0])
    failures = int(stats.failed.sum())
    known, held_out = learner.errors(curve)
    metrics["fit_rmse"] = root_mean_square(known)
    spread = root_mean_square(np.std(series.values[: learner.known], axis=0))
    metrics["r_squared"] = 1 - (metrics["fit_rmse"] / spread) ** 2
    if metrics["r_squared"] < 0.5:
        warnings.append(
            f"poor fit: the field explains less than half of the variance (R^2 is "
            f"{metrics['r_squared']:.2f})"
        )
    title = f"learned, from the first observation: {learner.caption(curve)}"
    if settings.data.held_out:
        metrics["rmse"] = root_mean_square(held_out)
    truth = learner.truth
    if truth is not None:
        curve, stats = learner.follow(field, truth[0])
        metrics["rmse"] = root_mean_square(curve - truth)
        title = f"learned, from the true start: RMSE {metrics['rmse']:.3g} to the truth"
        # Solve with the training steps too: the field has learned to make up for their error.
        as_trained, own = learner.follow(field, truth[0], settings.solve.make())
        metrics["rmse_as_trained"] = root_mean_square(as_trained - truth)
        failures += int(stats.failed.sum() + own.failed.sum())
    if failures:
        warnings.append("the solve of a trajectory failed, so its metrics are NaN")
    numerics = {
        "nfe": int(stats.nfe),
        "solver_failures": failures,
        **fitted.numerics(),
    }
    run_dir.save_figures(
        fit=learner.against_time(curve, title),
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units),
    )
    learner.draw_learning([r for r in fitted.records if SCORE in r])
    run_dir.finish(metrics, numerics, fitted.timing, warnings)


if __name__ == "__main__":
    main(run, Spiral)
