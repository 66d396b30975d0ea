"""Straighten a flow: train by flow matching, join base and data by it, train on these pairs.

Rectified flow (Liu et al. 2023): how many Euler steps it takes to sample, before and after.
"""

import dataclasses
import functools

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.harness import main
from experiments.quick import train_stages
from experiments.rundir import RunDir
from experiments.settings import Stage
from experiments.toy2d import Toy2D
from jcnf import CNF, Solve, evaluate, objectives, plot, times, train
from jcnf.curves import Panel, scaling
from jcnf.data.toys import toy
from jcnf.errors import InputError

FRAMES = 21
PARTICLES = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflow(Toy2D):
    """A toy, the flow trained on it by flow matching, and its rectification."""

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
        self.at_least(2, "pairs", "mmd_points")
        self.at_least(1, "reflow_steps")
        if not self.euler_steps or min(self.euler_steps) < 1:
            raise InputError("--euler-steps must be whole numbers of at least 1")


def run(settings: Reflow) -> None:
    """Train, rectify, and sample both by few Euler steps."""
    density = toy(settings.data)
    run_dir = RunDir("reflow", settings)
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 2), 5)
    solve = settings.make_test_solve()
    trained = train_stages(
        settings.make_flow(2),
        settings.make_stages(),
        lambda key, _: density.sample(key, settings.batch),
        seed=settings.seed,
    )
    print(f"trained in {trained.seconds:.1f} s; joining {settings.pairs} pairs")
    joined = evaluate.draw(trained.flow, keys[0], settings.pairs, solve=solve)
    arrived = ~joined.failed
    pairs = (jnp.asarray(joined.x[0][arrived]), jnp.asarray(joined.x[-1][arrived]))
    optimizer = settings.make_optimizer(settings.reflow_steps, settings.learning_rate)
    objective = functools.partial(objectives.rectified, time=times.TIMES[settings.times])
    stage = Stage(objective, settings.reflow_steps, optimizer, train.by_reverse_mode)

    def draw_pairs(key, data):
        index = jr.randint(key, (settings.batch,), 0, len(data[0]))
        return tuple(part[index] for part in data)

    rectified = train_stages(trained.flow, [stage], draw_pairs, pairs, settings.seed)

    fresh = density.sample(keys[1], settings.mmd_points)
    floor = evaluate.mmd(density.sample(keys[2], settings.mmd_points), fresh)
    flows = {"before": trained.flow, "after": rectified.flow}
    metrics, series = {"mmd_floor": floor}, {}
    for name, flow in flows.items():
        z = flow.base.sample(keys[3], settings.mmd_points)
        found = [_euler_mmd(flow, z, n, fresh) for n in settings.euler_steps]
        accurate = evaluate.transport(flow, z, jnp.array([0.0, flow.t1]), solve=solve)
        metrics[f"mmd_{name}_exact"] = evaluate.mmd(jnp.asarray(accurate.x[-1]), fresh)
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
    panel = Panel(settings.data, "Euler steps", "MMD", series)
    run_dir.save_figures(mmd=scaling([panel]))
    timing = {"train_s": trained.seconds, "reflow_s": rectified.seconds}
    run_dir.finish(metrics, {}, timing)


def _euler_mmd(flow: CNF, z, steps: int, fresh) -> float:
    """MMD of samples by so many Euler steps."""
    solve = Solve(solver="euler", step=flow.t1 / steps, max_steps=steps + 1)
    carried = evaluate.transport(flow, z, jnp.array([0.0, flow.t1]), solve=solve, chunk=len(z))
    return evaluate.mmd(jnp.asarray(carried.x[-1]), fresh)


if __name__ == "__main__":
    main(run, Reflow)
