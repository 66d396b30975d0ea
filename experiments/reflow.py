"""Straighten a trained flow by training on the pairs of base and data that it joins.

    python -m experiments.reflow --data 8gaussians
    python -m experiments.reflow --data 8gaussians --from RUN_DIR

This is rectified flow (Liu et al. 2023). The figures show how many Euler steps sampling takes
before and after.
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
from experiments._runner.config import PointMeasure, Run, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.objectives import FlowMatching, Objective
from experiments._runner.run_dir import RunDir, load_flow
from experiments._runner.settings import Points, Range, Steps
from experiments._runner.stages import fresh_batches, train_stages
from experiments._tasks.density2d import ToyFlow, ToyName, reference_points
from experiments._tasks.figures import mmd_of
from jcnf import Flow, Solve, evaluate, objectives, plot, training
from jcnf._checks import InputError
from jcnf.data.toys import toy
from jcnf.objectives.times import data_biased
from jcnf.plot import CurvePanel, scaling

FRAMES = 21
PARTICLES = 300
# Samples count as good as data up to this multiple of the MMD of two samples of the data.
GOOD_MMD_RATIO = 1.5

EulerSteps = Annotated[tuple[int, ...], Range(1, 100_000, min_length=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflow(FlowExperiment):
    """A toy density, the flow trained on it, and its rectification."""

    # toy density
    data: ToyName = "8gaussians"
    # finished run of toy2d on the same --data to rectify (default: train a flow first)
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # pairs of base and data to join by the trained flow
    pairs: Points = 50_000
    # training steps on these pairs
    reflow_steps: Steps = 4000
    # numbers of Euler steps to sample with
    euler_steps: EulerSteps = (1, 2, 4, 8, 16, 32, 64)
    # samples for the maximum mean discrepancy (MMD)
    mmd_points: Points = 10_000

    objective: Objective = FlowMatching()
    flow: FlowSettings = FlowSettings()
    training: Training = Training()
    measure: PointMeasure = PointMeasure(test_points=20_000)
    run: Run = Run()

    def check(self) -> None:
        super().check()
        if len(set(self.euler_steps)) < len(self.euler_steps):
            raise ValueError("--euler-steps must not repeat a value")

    def trace(self) -> None:
        self.trace_objectives(2)


def run(settings: Reflow) -> None:
    """Train and rectify a flow, and sample before and after by few Euler steps."""
    density = toy(settings.data)
    keys = jr.split(jr.fold_in(jr.key(settings.run.seed), 2), 5)
    solve = settings.measure.make_solve()
    # Read the run before creating a directory, so that a bad one leaves none behind.
    original = None if settings.from_run is None else read_flow(settings)
    run_dir = RunDir("reflow", settings)
    original = original or trained_flow(settings)
    print(f"joining {settings.pairs} pairs")
    joined = evaluate.sample(original, keys[0], settings.pairs, solve=solve)
    solved = ~joined.failed
    if solved.sum() < 2:
        raise InputError(
            f"the solve failed for {joined.failures} of {settings.pairs} pairs: give a smaller "
            "--learning-rate or --clip, or a looser --test-tolerance"
        )
    pairs = (jnp.asarray(joined.x[0][solved]), jnp.asarray(joined.x[-1][solved]))
    objective = functools.partial(objectives.rectified, time=data_biased)
    stage = settings.training.make_stage(objective, None, steps=settings.reflow_steps)
    rectified = train_stages(original, [stage], training.draw_rows, pairs, settings.run.seed)
    run_dir.save_flow(rectified.flow, {})

    fresh = density.sample(keys[1], settings.mmd_points)
    floor = evaluate.mmd(density.sample(keys[2], settings.mmd_points), fresh)
    flows = {"before": original, "after": rectified.flow}
    metrics, series, failures = {"mmd_floor": floor}, {}, int(joined.failures)
    for name, flow in flows.items():
        z = flow.base.sample(keys[3], settings.mmd_points)
        found = [_euler_mmd(flow, z, n, fresh) for n in settings.euler_steps]
        accurate = evaluate.trajectory(flow, z, jnp.array([0.0, flow.bijection.t1]), solve=solve)
        metrics[f"mmd_{name}_exact"] = mmd_of(accurate, fresh)
        failures += accurate.failures
        metrics[f"euler_steps_{name}"] = next(
            (
                n
                for n, value in zip(settings.euler_steps, found, strict=True)
                if value <= GOOD_MMD_RATIO * floor
            ),
            np.nan,
        )
        metrics |= {
            f"mmd_{name}_{n}": value for n, value in zip(settings.euler_steps, found, strict=True)
        }
        metrics[f"nfe_{name}"] = accurate.nfe
        test = density.sample(keys[4], settings.measure.test_points)
        gaps = (
            np.asarray(density.log_prob(test)) - evaluate.log_prob(flow, test, solve=solve).log_prob
        )
        metrics[f"nll_gap_{name}"] = float(np.mean(gaps))
        series[f"{name} reflow"] = (settings.euler_steps, found)
        extent = (-density.extent, density.extent) * 2
        paths = evaluate.trajectory(
            flow, z[:PARTICLES], jnp.linspace(0.0, flow.bijection.t1, FRAMES), solve=solve
        )
        figure = plot.trajectories(
            paths.x, np.linspace(0, flow.bijection.t1, FRAMES), extent=extent
        )
        run_dir.save_figures(**{f"paths_{name}": figure})
    panel = CurvePanel(settings.data, "Euler steps", "MMD", series)
    run_dir.save_figures(mmd=scaling([panel]))
    timing = {"reflow_s": rectified.seconds}
    run_dir.finish(metrics, {"solver_failures": failures}, timing)


def read_flow(settings: Reflow) -> Flow:
    """Load the flow of --from; raise `InputError` if it does not fit the settings."""
    assert settings.from_run is not None
    flow, trained, _ = load_flow(settings.from_run, ToyFlow)
    if trained.augment:
        raise InputError(
            f"{settings.from_run} was trained with --augment: give --from a run without it"
        )
    if trained.data != settings.data:
        raise InputError(
            f"{settings.from_run} was trained on {trained.data}: give --data {trained.data}"
        )
    return flow


def trained_flow(settings: Reflow) -> Flow:
    """Train a flow by the settings, without checkpoints."""
    density = toy(settings.data)
    trained = train_stages(
        settings.make_flow(2, data=reference_points(density.sample, settings.run.seed)),
        settings.make_stages(),
        fresh_batches(density.sample),
        seed=settings.run.seed,
    )
    print(f"trained in {trained.seconds:.1f} s")
    return trained.flow


def _euler_mmd(flow: Flow, z, steps: int, fresh) -> float:
    """MMD to `fresh` data of samples from `z` by `steps` Euler steps."""
    solve = Solve(solver="euler", step=flow.bijection.t1 / steps, max_steps=steps + 1)
    carried = evaluate.trajectory(
        flow, z, jnp.array([0.0, flow.bijection.t1]), solve=solve, chunk=len(z)
    )
    return mmd_of(carried, fresh)


if __name__ == "__main__":
    main(run, Reflow)
