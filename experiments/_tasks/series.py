"""Trajectories that are learned from a series: saved at every validation, and drawn."""

import functools
import io
import math
import time
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments._runner.metrics_log import read_records
from experiments._runner.run_dir import RunDir
from jcnf import Solve, objectives, plot, training
from jcnf._checks import InputError
from jcnf.data.series import Series
from jcnf.flows import solve_trajectory
from jcnf.ode import Stats
from jcnf.training import checkpoint

SpiralName = Literal["linear", "cubic"]
CURVE_POINTS = 400  # of a learned trajectory that is drawn and compared with the truth
PANELS = 8
DRAWING_SECONDS = 3.0  # minimum time between two drawings in training
SCORE = "train_rmse"


class LearnedSeries:
    """A series, and the trajectories learned from it so far, which are saved on disk.

    **Arguments:**

    - `held_out`: number of observations at the end that are not trained on.
    - `draw_all`: draws the windows of the other observations that validations use.
    - `solve`: the ODE solve of trajectories.
    - `val_solve`: the ODE solve of these windows.
    """

    def __init__(
        self,
        run_dir: RunDir,
        series: Series,
        *,
        held_out: int,
        draw_all: training.DrawBatch,
        solve: Solve,
        val_solve: Solve,
    ):
        self.run_dir, self.series, self.solve, self.val_solve = run_dir, series, solve, val_solve
        self.known = len(series.times) - held_out
        self.data = tuple(
            jnp.asarray(a[: self.known], float) for a in (series.times, series.values)
        )
        self.windows = draw_all(jr.key(0), self.data)
        # The times of a drawn trajectory; those of the observations have the indices `observed`.
        self.times = np.union1d(np.linspace(0, series.times[-1], CURVE_POINTS), series.times)
        self.observed = np.searchsorted(self.times, series.times)
        self.file = run_dir.path / "trajectories.npy"  # (validations, times, dim)
        self.drawn = -math.inf  # time of the last drawing

    def follow(
        self, field: Any, start: np.ndarray, own: Solve | None = None
    ) -> tuple[np.ndarray, Stats]:
        """Return the trajectory (times, dim) from `start` (dim,) and its cost.

        The trajectory is NaN if it failed. It is one solve by `solve` or, if `own` is given, one
        solve by `own` from each time to the next.
        """
        times = jnp.asarray(self.times, float)
        if own is not None:
            times = times[:, None]
        xs, stats = solved(field, jnp.asarray(start, float)[None], times, own or self.solve)
        curve = np.asarray(xs[:, 0], np.float64)
        return (np.full_like(curve, np.nan) if np.any(stats.failed) else curve), stats

    def validate(self, field: Any) -> float:
        """Return the RMSE over the windows; save and sometimes draw the whole trajectory.

        Windows say more about a field than a long trajectory, whose phase may be off. The
        trajectory from the first observation is row n of the file for validation n of the log.
        """
        curve, _ = self.follow(field, self.series.values[0])
        done = sum(SCORE in record for record in read_records(self.run_dir.log))
        curves = np.concatenate([self.curves()[:done], curve[None]])
        buffer = io.BytesIO()
        np.save(buffer, curves.astype(np.float32))
        checkpoint.write_atomically(self.file, buffer.getvalue())
        if time.monotonic() > self.drawn + DRAWING_SECONDS:
            title = f"learned so far, from the first observation: {self.caption(curve)}"
            self.run_dir.save_figures(fit=self.against_time(curve, title))
            self.drawn = time.monotonic()
        _, metrics = _fit(field, self.windows, self.val_solve)
        return math.nan if metrics["failed_rows"] else float(metrics["rmse"])

    def curves(self) -> np.ndarray:
        """Return the saved trajectories, (validations, times, dim)."""
        if self.file.exists():
            try:
                return np.load(self.file)
            except (ValueError, EOFError):
                raise InputError(f"{self.file} is damaged: restore it, or remove it") from None
        return np.zeros((0, len(self.times), self.series.values.shape[1]), np.float32)

    def errors(self, curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a trajectory minus the observations: those trained on, and those held out."""
        known, held_out = np.split(curve[self.observed] - self.series.values, [self.known])
        return known, held_out

    def caption(self, curve: np.ndarray) -> str:
        """Return a caption with the RMSE of a trajectory to the observations trained on."""
        return f"RMSE {root_mean_square(self.errors(curve)[0]):.3g} to the data"

    @functools.cached_property
    def truth(self) -> np.ndarray | None:
        """The true trajectory, if it is known."""
        return self.series.truth(self.times) if self.series.truth else None

    def against_time(self, curve: np.ndarray, title: str) -> Any:
        """Plot a trajectory against time, in the units of the file."""
        series, scale = self.series, self.series.scale
        return plot.against_time(
            series.begin + series.unit * self.times,
            scale.unstandardize(curve),
            series.begin + series.unit * series.times,
            scale.unstandardize(series.values),
            (series.time_name, *scale.columns),
            truth=None if self.truth is None else scale.unstandardize(self.truth),
            held_out=len(series.times) - self.known,
            title=title,
        )

    def draw_learning(self, validations: list[dict]) -> None:
        """Draw some of the validations' trajectories in one figure, and all of them in a GIF."""
        series, truth = self.series, self.truth
        names, planar = series.scale.columns, len(series.scale.columns) > 1

        def in_plane(rows, times):
            """The first two components of rows (..., times, dim), or time and the only one."""
            if planar:
                return rows[..., :2]
            return np.concatenate([np.broadcast_to(times[:, None], rows.shape), rows], axis=-1)

        scene = plot.Scene(
            in_plane(series.values, series.times),
            None if truth is None else in_plane(truth, self.times),
            labels=(names[0], names[1]) if planar else ("t", names[0]),
            equal=planar,
        )
        curves = self.curves()[: len(validations)]
        titles = [
            f"step {record['step']}\n{self.caption(curve)}"
            for record, curve in zip(validations, curves, strict=True)
        ]
        curves = in_plane(curves, self.times)
        # Most of the change comes early.
        shown = np.unique(np.geomspace(1, len(curves), PANELS).round().astype(int) - 1)
        figure = plot.learning(curves[shown], [titles[i] for i in shown], scene)
        self.run_dir.save_figures(learning=figure)
        plot.learning_animation(
            self.run_dir.path / "figures" / "learning.gif", curves, titles, scene
        )


@eqx.filter_jit
def _fit(field, windows, solve):
    return objectives.trajectory_fit(field, windows, solve=solve)


@eqx.filter_jit
def solved(field, x, times, solve):
    """Call `jcnf.flows.solve_trajectory`, compiled."""
    return solve_trajectory(field, x, times, solve=solve)


def root_mean_square(errors: np.ndarray) -> float:
    """Return the root mean square over all rows and components."""
    return float(np.sqrt(np.mean(np.square(errors))))
