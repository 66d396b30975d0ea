"""Learn a density of angles: on a torus, where both ends of each angle are the same.

    python -m experiments.torus
    python -m experiments.torus --data dihedrals.csv --unit degrees

By default the density is known, a mixture on the torus of two angles: narrow and wide parts, one
across the seam, and a ridge that winds around both angles. The gap is the held-out NLL minus that
of the true density. A table may have any number of columns of angles, of which all are learned;
NLLs are in nats with respect to radians.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import ResNet
from experiments._runner.objectives import Coupling
from experiments._tasks.manifold_density import (
    Data,
    Learned,
    ManifoldExperiment,
    ManifoldMeasure,
    Mixture,
    learn,
)
from jcnf import plot, training
from jcnf.data.tables import Table, load_table, write_rows
from jcnf.manifolds import Torus, WrappedNormal

TURN = {"degrees": 360.0, "radians": 2 * math.pi}
NAMES = ("first angle", "second angle")


class Sheared(NamedTuple):
    """The angles (x1, x2 + turns x1), for x of a wrapped normal distribution.

    With a whole number of turns this maps the torus to itself and preserves areas, so that the
    density is that of x.
    """

    normal: WrappedNormal
    turns: int

    @classmethod
    def of(cls, loc, scale, turns: int = 0) -> "Sheared":
        """Return the distribution with this mode."""
        first, second = loc
        return cls(WrappedNormal((first, second - turns * first), scale), turns)

    def sample(self, key, num_samples):
        return self._shear(self.normal.sample(key, num_samples), self.turns)

    def log_prob(self, x):
        return self.normal.log_prob(self._shear(x, -self.turns))

    def _shear(self, x, turns):
        first, second = x.T
        return Torus(2).project(jnp.stack([first, second + turns * first], axis=1))


# A scale of 20 makes an angle uniform.
DENSITY = Mixture(
    (
        (0.3, Sheared.of((-1.1, -0.8), (0.3, 0.3), turns=-1)),
        (0.25, Sheared.of((-2.0, 3.0), (0.5, 0.35))),
        (0.15, Sheared.of((3.1, 1.2), (0.25, 0.5), turns=1)),
        (0.1, Sheared.of((1.0, 0.8), (0.2, 0.2))),
        (0.2, Sheared.of((0.0, 1.5), (20.0, 0.3), turns=2)),
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorusFlow(ManifoldExperiment):
    """The angles and the flow that learns their density."""

    # your own table of angles to learn instead: .csv, .csv.gz, .npy or .npz (arrays train, val and
    # test keep their split)
    data: Path | None = None
    # unit of the table's angles
    unit: Literal["degrees", "radians"] = "degrees"
    # columns of the table to leave out, by name or number (from 1)
    drop: tuple[str, ...] = ()

    # how base samples are paired with data: exact is optimal transport in the batch
    coupling: Coupling = "exact"
    # how times on the path are drawn
    times: Literal["uniform", "stratified", "data_biased", "logit_normal"] = "data_biased"

    field: ResNet = ResNet()
    training: Training = Training(steps=8000)
    measure: ManifoldMeasure = ManifoldMeasure()
    loop: Loop = Loop()
    run: Run = Run()

    def make_manifold(self, dim: int) -> Torus:
        return Torus(dim)


def run(settings: TorusFlow) -> None:
    """Train the flow, measure it on held-out angles, and draw the figures."""
    if settings.data is None:
        data = Data.fresh(DENSITY, settings.run.seed, settings.measure.test_points)
        learn("torus", settings, data, lambda learned: draw_figures(learned, NAMES))
        return
    table = load_table(settings.data, seed=settings.run.seed, drop=settings.drop)
    learn_table(settings, table)


def learn_table(settings: TorusFlow, table: Table) -> None:
    """Learn the angles of a table, and write samples in its unit."""
    turn, columns = TURN[settings.unit], table.scale.columns
    train, val, test = (
        table.scale.unstandardize(part) for part in (table.train, table.val, table.test)
    )
    doubts = list(table.warnings)
    if turn == 360 and np.abs(train).max() < 2 * TURN["radians"]:
        doubts.append("all angles are below 13 degrees: add --unit radians if they are radians")
    unit = turn / TURN["radians"]
    data = Data(training.draw_rows, wrap(train / unit), wrap(val / unit), wrap(test / unit))
    learned, run_dir = learn(
        "torus",
        settings,
        data,
        lambda learned: draw_figures(learned, columns),
        doubts,
        lambda nll: {"test_nll_original": nll + len(columns) * math.log(unit)},
    )
    write_rows(run_dir.path / "samples.csv", learned.samples * unit, columns)


def wrap(angles: np.ndarray):
    """Return angles in [-pi, pi) in jax's precision."""
    return jnp.asarray((angles + math.pi) % (2 * math.pi) - math.pi, float)


def draw_figures(learned: Learned, columns) -> dict[str, Any]:
    """Draw the density of one or two angles, or pairs of more."""
    test, samples, density = learned.test, learned.samples, learned.report.quadrature
    if len(columns) > 2:
        return {"pairs": plot.pairs(test, samples, columns)}
    assert density is not None
    points = density.points
    if len(columns) == 1:
        figure = plot.histogram(test, samples, points[:, 0], np.exp(density.log_prob))
        return {"density": figure}
    n = math.isqrt(len(points))
    low = points.min() - math.pi / n  # the points are the middles of cells
    true = None
    if learned.truth is not None:
        true = np.asarray(learned.truth.log_prob(jnp.asarray(points, float))).reshape(n, n).T
    figure = plot.densities(
        (test - low) % (2 * math.pi) + low,
        (samples - low) % (2 * math.pi) + low,
        density.log_prob.reshape(n, n).T,
        (low, low + 2 * math.pi, low, low + 2 * math.pi),
        title=learned.title,
        true_log_density=true,
    )
    for ax in figure.axes[: 3 if true is None else 4]:
        ax.set_xlabel(f"{columns[0]} (radians)")
    figure.axes[0].set_ylabel(f"{columns[1]} (radians)")
    return {"densities": figure}


if __name__ == "__main__":
    main(run, TorusFlow)
