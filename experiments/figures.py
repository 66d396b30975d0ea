"""Figures that experiments share, drawn from a trained flow."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from experiments.rundir import RunDir
from jcnf import CNF, Solve, evaluate, plot

FRAMES = 41
PARTICLES = 3000


def plane(
    run_dir: RunDir,
    flow: CNF,
    data: np.ndarray,
    samples: np.ndarray,
    grid: evaluate.Grid,
    *,
    key: Key[Array, ""],
    solve: Solve,
    title: str,
    true_log_density: np.ndarray | None = None,
) -> None:
    """Densities beside data and samples; base samples turning into data. Consumes `key`."""
    figure = plot.densities(
        data,
        samples,
        grid.log_prob,
        grid.extent,
        title=title,
        true_log_density=true_log_density,
    )
    z = flow.base.sample(key, PARTICLES)
    times = jnp.linspace(0.0, flow.t1, FRAMES)
    paths = evaluate.transport(flow, z, times, solve=solve, chunk=PARTICLES).x
    run_dir.save_figures(
        densities=figure,
        trajectories=plot.trajectories(paths, times, extent=grid.extent),
        snapshots=plot.snapshots(paths, times, extent=grid.extent),
    )
    plot.animation(run_dir.path / "figures" / "flow.gif", paths, times, extent=grid.extent)
