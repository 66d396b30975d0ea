"""Learn a neural ODE from one noisy trajectory: a spiral of known motion, or a table of times.

The data, network and Euler steps are the source's (see `jcnf.data.series`), with more windows in a
batch and a higher learning rate, which decays as a cosine. The source's own settings:
--batch 1 --learning-rate 5e-4 --schedule constant --warmup 0 --average 0 --clip 1e9. With
--solver rk4 --fixed-step 0.2 a solve takes as many evaluations and has none of Euler's error.
"""

import functools
from pathlib import Path

import equinox as eqx
import jax.random as jr
import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import MAX_COUNT, LoopSettings, SolveSettings, preset
from experiments._runner.loop import fit
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import Stage
from experiments._tasks.series import SCORE, Learner, root_mean_square
from jcnf import fields, objectives, plot, training
from jcnf._checks import InputError
from jcnf.data.series import TARGETS, Series, load_series, spiral
from jcnf.training import checkpoint

# Between observations, in t, where velocities are of the order of 1.
MAX_TIME_GAP = 1000.0


@preset
class Spiral(LoopSettings, SolveSettings):
    """A series and the field that learns to follow it."""

    # spiral to learn: linear (dz/dt = W z), cubic (dz/dt = W' z^3)
    target: str = "linear"
    # table to learn instead of a target: a column of times, then the values (they are standardized)
    data: Path | None = None
    # unit of t in the times of the table (default: chosen to make velocities about 1)
    time_unit: float | None = None
    # last observations of the table to hold out from training
    held_out: int = 0
    # number of observations of the target
    points: int = 200
    # standard deviation of the noise on the observations of the target
    noise: float = 0.01
    # observe the target at random times
    irregular: bool = False
    # length in t of the shortest training windows
    shortest: float = 1.0
    # length in t of the longest training windows
    longest: float = 5.0
    # observations in a window, at most
    rows: int = 32
    # hidden widths of the field, an mlp
    widths: tuple[int, ...] = (16, 16)
    # activation: tanh, softplus, silu, elu, sine, identity, logcosh
    activation: str = "elu"
    # how time enters the field: ignore, concat, squash, concatsquash, hyper, blend
    time: str = "ignore"
    # windows in a training batch
    batch: int = 32
    # windows in the batch of L-BFGS; 0 for the longest window from each observation
    lbfgs_batch: int = 0
    # fixed step in t; None to use the tolerances
    fixed_step: float | None = 0.05

    has_table = True
    solver = "euler"
    steps = 1200
    learning_rate = 3e-2
    warmup = 50
    average = 0.99
    log_every = 20
    checkpoint_every = 200
    validate_every = 20

    def check(self) -> None:
        super().check()
        self.at_least(3, "points", most=MAX_COUNT)
        self.at_least(2, "rows", most=MAX_COUNT)
        self.at_least(0, "held_out", "noise")
        self.positive("shortest", "longest")
        self.sizes("widths")
        if self.lbfgs_steps and self.adjoint == "forward":
            raise InputError("L-BFGS needs reverse-mode gradients: choose another --adjoint")
        if self.time_unit is not None:
            self.positive("time_unit")
        if self.data is None and (self.held_out or self.time_unit is not None):
            raise InputError("--held-out and --time-unit only apply to --data: leave them out")
        of_target = ("target", "points", "noise", "irregular")
        if self.data is not None and any(
            getattr(self, name) != getattr(type(self), name) for name in of_target
        ):
            raise InputError(
                "--data replaces the target: leave out --target, --points, --noise and --irregular"
            )
        if self.target not in TARGETS:
            raise InputError(f"unknown target '{self.target}': use one of {', '.join(TARGETS)}")
        self.check_steps(self.longest)
        try:
            self.make_stages()
            self.draw_of(1)
            eqx.filter_eval_shape(self.make_field, 1)
        except ValueError as error:
            raise InputError(str(error)) from None

    def make_series(self) -> Series:
        """Return the series to learn from."""
        if self.data is not None:
            return load_series(self.data, unit=self.time_unit, held_out=self.held_out)
        return spiral(
            self.target,
            points=self.points,
            noise=self.noise,
            irregular=self.irregular,
            seed=self.seed,
        )

    def make_field(self, dim: int) -> fields.MLP:
        key = jr.fold_in(jr.key(self.seed), 0)
        return fields.MLP(dim, self.widths, time=self.time, activation=self.activation, key=key)

    def draw_of(self, num: int | None) -> training.DrawBatch:
        """Return a function that draws `num` windows, or with None the longest from each row."""
        lengths = {"shortest": self.shortest, "longest": self.longest}
        return objectives.sample_windows(num, **lengths, rows=self.rows)

    def make_stages(self) -> list[Stage]:
        solve = self.make_solve()
        stage = Stage(
            functools.partial(objectives.trajectory_fit, solve=solve),
            self.steps,
            self.make_optimizer(self.steps, self.learning_rate),
            solve,
            self.average,
            self.batch,
        )
        return self.then_lbfgs([stage])

    @property
    def loss_units(self) -> str:
        return "mean squared error"


def run(settings: Spiral) -> None:
    """Train the field, compare it with the truth, and draw the trajectories as it learned them."""
    series = settings.make_series()
    gap = float(np.max(np.diff(series.times)))
    if not gap <= MAX_TIME_GAP:
        raise InputError(
            f"the widest gap between times is {gap:.3g} units of t, more than {MAX_TIME_GAP:g}: "
            f"give a larger --time-unit than {series.unit:.3g}"
        )
    settings.check_steps(max(settings.longest, gap))
    run_dir = RunDir("spiral", settings, resume=settings.resume)
    learner = Learner(
        run_dir,
        series,
        held_out=settings.held_out,
        draw_all=settings.draw_of(None),
        solve=settings.make_test_solve(),
        quick=settings.make_validation_solve(),
    )
    field = settings.make_field(series.values.shape[1])
    fitted = fit(
        run_dir, settings, field, settings.draw_of, learner.data, learner.validate, score=SCORE
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
    if settings.held_out:
        metrics["rmse"] = root_mean_square(held_out)
    truth = learner.truth
    if truth is not None:
        curve, stats = learner.follow(field, truth[0])
        metrics["rmse"] = root_mean_square(curve - truth)
        title = f"learned, from the true start: RMSE {metrics['rmse']:.3g} to the truth"
        # Solve with the training steps too: the field has learned to make up for their error.
        as_trained, own = learner.follow(field, truth[0], settings.make_solve())
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
