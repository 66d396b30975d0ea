"""Figures of a trained flow that several experiments draw, and of its samples."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.run_dir import RunDir
from jcnf import Solve, evaluate, plot
from jcnf.flows import ODE, Flow

FRAMES = 41
PARTICLES = 3000


def save_density_figures(
    run_dir: RunDir,
    flow: Flow,
    data: np.ndarray,
    samples: np.ndarray,
    grid: evaluate.Grid,
    *,
    key: Key[Array, ""],
    solve: Solve,
    title: str,
    true_log_density: np.ndarray | None = None,
    particles: int = PARTICLES,
    frames: int = FRAMES,
) -> None:
    """Draw densities beside data and samples, and base samples of a CNF as they become data.

    Only the first two dimensions are drawn. Consumes `key`.
    """
    figure = plot.densities(
        data,
        samples[:, :2],
        grid.log_prob,
        grid.extent,
        title=title,
        true_log_density=true_log_density,
    )
    run_dir.save_figures(densities=figure)
    if not isinstance(flow.bijection, ODE):
        return
    z = flow.base.sample(key, particles)
    times = jnp.linspace(0.0, flow.bijection.t1, frames)
    paths = evaluate.trajectory(flow, z, times, solve=solve, chunk=PARTICLES).x[..., :2]
    run_dir.save_figures(
        trajectories=plot.trajectories(paths, times, extent=grid.extent),
        snapshots=plot.snapshots(paths, times, extent=grid.extent),
    )
    plot.animation(run_dir.path / "figures" / "flow.gif", paths, times, extent=grid.extent)


def mmd_of(samples: evaluate.Trajectories, fresh: Array) -> float:
    """Return the MMD between samples, without failed ones, and `fresh` data; NaN for too few."""
    reached = samples.x[-1][~samples.failed]
    return evaluate.mmd(jnp.asarray(reached), fresh) if len(reached) > 1 else math.nan
