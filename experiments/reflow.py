"""Straighten a flow: join base and data by a trained one, and train on these pairs.

Rectified flow (Liu et al. 2023): how many Euler steps it takes to sample, before and after.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from experiments._runner.cli import main
from experiments._runner.config import MANY
from experiments._runner.run_dir import RunDir, load_flow
from experiments._runner.stages import Stage, drawing, train_stages
from experiments._tasks.density2d import PlaneFlow, ToySettings
from experiments.flow_matching import mmd_of
from experiments.toy2d import Toy2D
from jcnf import CNF, Solve, evaluate, objectives, plot, training
from jcnf._checks import InputError
from jcnf.objectives import times
from jcnf.plot import CurvePanel, scaling

FRAMES = 21
PARTICLES = 300
MOST = 100_000  # Euler steps
ENOUGH = 1.5  # times the MMD of two samples of the data: what is as good


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflow(ToySettings, PlaneFlow):
    """A toy, the flow trained on it, and its rectification."""

    # finished run of toy2d on the same --data to rectify; by default a flow is trained here
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None

    # pairs of base and data, by the trained flow
    pairs: int = 50_000
    # steps of training on these pairs
    reflow_steps: int = 4000
    # Euler steps to sample with
    euler_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    # samples from which the discrepancy is found
    mmd_points: int = 10_000

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        super().check()
        self.at_least(2, "pairs", "mmd_points", most=MANY)
        self.at_least(1, "reflow_steps")
        if not self.euler_steps or not 1 <= min(self.euler_steps) <= max(self.euler_steps) <= MOST:
            raise InputError(f"--euler-steps must be whole numbers from 1 to {MOST}")
        if len(set(self.euler_steps)) < len(self.euler_steps):
            raise InputError("--euler-steps must not repeat a value")


def run(settings: Reflow) -> None:
    """Train, rectify, and sample both by few Euler steps."""
    density = settings.make_density()
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 2), 5)
    solve = settings.make_test_solve()
    # A run that cannot be read leaves no directory behind.
    original = None if settings.from_run is None else read_flow(settings)
    run_dir = RunDir("reflow", settings)
    original = original or trained_flow(settings)
    print(f"joining {settings.pairs} pairs")
    joined = evaluate.draw(original, keys[0], settings.pairs, solve=solve)
    arrived = ~joined.failed
    if arrived.sum() < 2:
        raise InputError(
            f"only {arrived.sum()} of {settings.pairs} pairs arrived: give a smaller "
            "--learning-rate or --clip, or a looser --test-tolerance"
        )
    pairs = (jnp.asarray(joined.x[0][arrived]), jnp.asarray(joined.x[-1][arrived]))
    optimizer = settings.make_optimizer(settings.reflow_steps, settings.learning_rate)
    objective = functools.partial(objectives.rectified, time=times.TIMES[settings.times])
    stage = Stage(
        objective,
        settings.reflow_steps,
        optimizer,
        None,
        settings.average,
        settings.batch,
    )
    rectified = train_stages(original, [stage], training.draw_rows, pairs, settings.seed)
    run_dir.save_flow(rectified.flow, {})

    fresh = density.sample(keys[1], settings.mmd_points)
    floor = evaluate.mmd(density.sample(keys[2], settings.mmd_points), fresh)
    flows = {"before": original, "after": rectified.flow}
    metrics, series, failures = {"mmd_floor": floor}, {}, int(joined.failures)
    for name, flow in flows.items():
        z = flow.base.sample(keys[3], settings.mmd_points)
        found = [_euler_mmd(flow, z, n, fresh) for n in settings.euler_steps]
        accurate = evaluate.transport(flow, z, jnp.array([0.0, flow.t1]), solve=solve)
        metrics[f"mmd_{name}_exact"] = mmd_of(accurate, fresh)
        failures += accurate.failures
        metrics[f"euler_steps_{name}"] = next(
            (
                n
                for n, value in zip(settings.euler_steps, found, strict=True)
                if value <= ENOUGH * floor
            ),
            np.nan,
        )
        metrics |= {
            f"mmd_{name}_{n}": value for n, value in zip(settings.euler_steps, found, strict=True)
        }
        metrics[f"nfe_{name}"] = accurate.nfe
        test = density.sample(keys[4], settings.test_points)
        gaps = np.asarray(density.log_prob(test)) - evaluate.score(flow, test, solve=solve).log_prob
        metrics[f"nll_gap_{name}"] = float(np.mean(gaps))
        series[f"{name} reflow"] = (settings.euler_steps, found)
        extent = (-density.extent, density.extent) * 2
        paths = evaluate.transport(
            flow, z[:PARTICLES], jnp.linspace(0.0, flow.t1, FRAMES), solve=solve
        )
        figure = plot.trajectories(paths.x, np.linspace(0, flow.t1, FRAMES), extent=extent)
        run_dir.save_figures(**{f"paths_{name}": figure})
    panel = CurvePanel(settings.data, "Euler steps", "MMD", series)
    run_dir.save_figures(mmd=scaling([panel]))
    timing = {"reflow_s": rectified.seconds}
    run_dir.finish(metrics, {"solver_failures": failures}, timing)


def read_flow(settings: Reflow) -> CNF:
    """The flow of --from."""
    assert settings.from_run is not None
    flow, trained, _ = load_flow(settings.from_run, Toy2D)
    if trained.augment:
        raise InputError(f"{settings.from_run} has extra dimensions: give one without --augment")
    if trained.data != settings.data:
        raise InputError(
            f"{settings.from_run} has learnt {trained.data}: give --data {trained.data}"
        )
    return flow


def trained_flow(settings: Reflow) -> CNF:
    """A flow trained by the settings."""
    density = settings.make_density()
    trained = train_stages(
        settings.make_flow(2),
        settings.make_stages(),
        drawing(density.sample),
        seed=settings.seed,
    )
    print(f"trained in {trained.seconds:.1f} s")
    return trained.flow


def _euler_mmd(flow: CNF, z, steps: int, fresh) -> float:
    """MMD of samples by so many Euler steps."""
    solve = Solve(solver="euler", step=flow.t1 / steps, max_steps=steps + 1)
    carried = evaluate.transport(flow, z, jnp.array([0.0, flow.t1]), solve=solve, chunk=len(z))
    return mmd_of(carried, fresh)


if __name__ == "__main__":
    main(run, Reflow)
