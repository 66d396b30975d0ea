"""A neural ODE learnt from one noisy trajectory: spirals of known motion, or a table in time."""

import functools
from pathlib import Path

import equinox as eqx
import jax.random as jr
import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import MANY, LoopSettings, SolveSettings, preset
from experiments._runner.loop import fit
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import Stage
from experiments._tasks.series import SCORE, Learner, root_mean_square
from jcnf import fields, objectives, plot, training
from jcnf._checks import InputError
from jcnf.data.series import TARGETS, Series, load_series, spiral
from jcnf.training import checkpoint

GAP = 1000.0  # in t, where velocities are of the order of 1


@preset
class Spiral(LoopSettings, SolveSettings):
    """A series, and the field that learns to follow it: the source's data, network and Euler steps
    (see `jcnf.data.series`); more windows in a batch and a higher rate, that falls as a cosine.

    The source's own: --batch 1 --learning-rate 5e-4 --schedule constant --warmup 0 --average 0
    --clip 1e9. In as many evaluations, --solver rk4 --fixed-step 0.2 has none of Euler's error.
    """

    # linear (dz/dt = W z), cubic (dz/dt = W' z^3)
    target: str = "linear"
    # a table in place of a target: a column of times, then the values, which are standardised
    data: Path | None = None
    # the file's time that is a unit of t; by default the velocity gets the size 1
    time_unit: float | None = None
    # last observations of a table that are not trained on
    held_out: int = 0
    # observations of a target
    points: int = 200
    # standard deviation of their noise
    noise: float = 0.01
    # observe a target at random times
    irregular: bool = False
    # length in t of the shortest windows trained on
    shortest: float = 1.0
    # and of the longest
    longest: float = 5.0
    # most observations in a window
    rows: int = 32
    # hidden widths of the mlp
    widths: tuple[int, ...] = (16, 16)
    # tanh, softplus, silu, elu, sine, identity, logcosh
    activation: str = "elu"
    # how time enters: ignore, concat, squash, concatsquash, hyper, blend
    time: str = "ignore"
    # windows in a training batch
    batch: int = 32
    # windows in L-BFGS's batch; 0 for the longest from each observation
    lbfgs_batch: int = 0
    # fixed step in t; None for the tolerances
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
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(3, "points", most=MANY)
        self.at_least(2, "rows", most=MANY)
        self.at_least(0, "held_out", "noise")
        self.positive("shortest", "longest")
        self.sizes("widths")
        if self.lbfgs_steps and self.adjoint == "forward":
            raise InputError("L-BFGS takes gradients by reverse mode: choose another --adjoint")
        if self.time_unit is not None:
            self.positive("time_unit")
        if self.data is None and (self.held_out or self.time_unit is not None):
            raise InputError("--held-out and --time-unit are of use with --data alone")
        of_target = ("target", "points", "noise", "irregular")
        if self.data is not None and any(
            getattr(self, name) != getattr(type(self), name) for name in of_target
        ):
            raise InputError("--data has times and values of its own: leave out those of a target")
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
        """What is learnt from."""
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
        """The untrained field."""
        key = jr.fold_in(jr.key(self.seed), 0)
        return fields.MLP(dim, self.widths, time=self.time, activation=self.activation, key=key)

    def draw_of(self, num: int | None) -> training.DrawBatch:
        """So many windows."""
        lengths = {"shortest": self.shortest, "longest": self.longest}
        return objectives.draw_windows(num, **lengths, rows=self.rows)

    def make_stages(self) -> list[Stage]:
        """Fitting windows, and L-BFGS where there are steps for it."""
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
        """What the training loss is measured in."""
        return "mean squared error"


def run(settings: Spiral) -> None:
    """Train, compare with the truth, draw the trajectories as they were learnt."""
    series = settings.make_series()
    gap = float(np.max(np.diff(series.times)))
    if not gap <= GAP:
        raise InputError(
            f"the widest gap in time is {gap:.3g} in units of t, too far to follow: give a larger "
            f"--time-unit than {series.unit:.3g}"
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
        warnings.append("no good fit: less than half of the variance is explained")
    title = f"learnt, from the first observation: {learner.caption(curve)}"
    if settings.held_out:
        metrics["rmse"] = root_mean_square(held_out)
    truth = learner.truth
    if truth is not None:
        curve, stats = learner.follow(field, truth[0])
        metrics["rmse"] = root_mean_square(curve - truth)
        title = f"learnt, from the true start: RMSE {metrics['rmse']:.3g} to the truth"
        # By the steps trained with, whose error the field has learnt to make up for.
        as_trained, own = learner.follow(field, truth[0], settings.make_solve())
        metrics["rmse_as_trained"] = root_mean_square(as_trained - truth)
        failures += int(stats.failed.sum() + own.failed.sum())
    if failures:
        warnings.append("a trajectory did not reach its end: its numbers are missing")
    numerics = {
        "nfe": int(stats.nfe),
        "solver_failures": failures,
        **fitted.numerics(),
    }
    run_dir.save_figures(
        fit=learner.picture(curve, title),
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units),
    )
    learner.draw_learning([r for r in fitted.records if SCORE in r])
    run_dir.finish(metrics, numerics, fitted.timing, warnings)


if __name__ == "__main__":
    main(run, Spiral)
