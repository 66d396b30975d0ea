"""Learning a density on a manifold by flow matching, as several experiments do."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from experiments._runner.config import LoopExperiment, Measure
from experiments._runner.fields import ResNet
from experiments._runner.loop import fit
from experiments._runner.objectives import Coupling
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Count, Points
from experiments._runner.stages import MakeDraw, Stage, fresh_batches
from jcnf import CNF, Flow, Solve, evaluate, objectives, plot
from jcnf.manifolds import EmbeddedCoupling, Geodesic, Manifold, TangentField, Uniform
from jcnf.objectives import couplings, times

VALIDATION_POINTS = 2000
SAMPLING = Solve(rtol=1e-3, atol=1e-3)
# Checks of the accuracy may take this share of the training time, and at least these seconds.
MEASURING_SHARE, MIN_MEASURING_SECONDS = 0.5, 40.0

Rows = Float[Array, "n dim"]


class Part(Protocol):
    """A distribution on a manifold that can be a part of a mixture."""

    def sample(self, key: Key[Array, ""], num_samples: int) -> Rows:
        """Draw points; consumes `key`."""
        ...

    def log_prob(self, x: Rows) -> Float[Array, " n"]:
        """Return the log-density of each point with respect to the volume, in nats."""
        ...


class Mixture(NamedTuple):
    """A mixture of distributions, each with its weight."""

    parts: Sequence[tuple[float, Part]]

    def sample(self, key: Key[Array, ""], num_samples: int) -> Rows:
        """Draw points; consumes `key`."""
        which_key, *keys = jr.split(key, len(self.parts) + 1)
        weights = jnp.array([weight for weight, _ in self.parts])
        which = jr.categorical(which_key, jnp.log(weights), shape=(num_samples,))
        drawn = jnp.stack(
            [part.sample(k, num_samples) for k, (_, part) in zip(keys, self.parts, strict=True)]
        )
        return drawn[which, jnp.arange(num_samples)]

    def log_prob(self, x: Rows) -> Float[Array, " n"]:
        """Return the log-density of each point, in nats."""
        terms = [part.log_prob(x) + jnp.log(weight) for weight, part in self.parts]
        return jax.nn.logsumexp(jnp.stack(terms), axis=0)


class Data(NamedTuple):
    """What a flow learns from and is measured on."""

    make_draw: MakeDraw  # of training batches
    train: Rows | None  # the rows that they are drawn from, None for fresh points
    val: Rows
    test: Rows
    truth: Part | None = None  # the true distribution, if it is known

    @classmethod
    def fresh(cls, truth: Part, seed: int, test_points: int) -> "Data":
        """Return data of a known distribution: fresh points in every batch."""
        val_key, test_key = jr.split(jr.fold_in(jr.key(seed), 2))
        draw, sample = fresh_batches(truth.sample), jax.jit(truth.sample, static_argnums=1)
        val, test = sample(val_key, VALIDATION_POINTS), sample(test_key, test_points)
        return cls(draw, None, val, test, truth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifoldMeasure(Measure):
    """Held-out numbers, samples and figures."""

    # number of fresh points for the held-out NLL, if the density is known
    test_points: Points = 10_000
    # number of points per axis at which the density is integrated
    cells: Count = 100
    # number of samples to draw
    samples: Count = 10_000


class ManifoldExperiment(LoopExperiment):
    """The settings of an experiment that learns a density on a manifold."""

    coupling: Coupling
    times: Literal["uniform", "stratified", "data_biased", "logit_normal"]
    field: ResNet
    measure: ManifoldMeasure

    def make_manifold(self, dim: int) -> Manifold:
        """Return the manifold of points with `dim` coordinates."""
        raise NotImplementedError

    def make_flow(self, dim: int, context_dim: int = 0) -> Flow:
        """Return the untrained flow, whose base is uniform."""
        manifold = self.make_manifold(dim)
        key = jr.fold_in(jr.key(self.run.seed), 0)
        net = self.field.make(manifold.embedding_dim, context_dim, key)
        return CNF(TangentField(net, manifold), Uniform(manifold))

    def make_stages(self) -> list[Stage]:
        stage = self.training.make_stage(self._match, None)
        return self.training.then_lbfgs([stage])

    def _match(self, flow, x, key):
        manifold: Any = flow.bijection.manifold
        coupling = couplings.COUPLINGS[self.coupling]
        return objectives.flow_matching(
            flow,
            x,
            key,
            path=Geodesic(manifold),
            coupling=EmbeddedCoupling(manifold, coupling),
            time=times.TIMES[self.times],
        )


class Learned(NamedTuple):
    """What was found with a trained flow, for figures."""

    report: evaluate.AccuracyReport
    test: np.ndarray  # the points of the report
    samples: np.ndarray
    truth: Part | None
    title: str


def learn(
    name: str,
    settings: ManifoldExperiment,
    data: Data,
    draw_figures: Callable[[Learned], dict[str, Any]],
    doubts: Sequence[str] = (),
    more_metrics: Callable[[float], dict[str, float]] = lambda nll: {},
) -> tuple[Learned, RunDir]:
    """Train the flow of the settings, measure it on held-out points and draw it.

    `more_metrics(nll)` returns further figures for the summary, and `doubts` are its first
    warnings.
    """
    run_dir, measure = RunDir(name, settings), settings.measure
    solve, val_solve = measure.make_solve(), measure.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(data.test.shape[1]),
        make_draw=data.make_draw,
        data=data.train,
        validate=lambda flow: evaluate.log_prob(flow, data.val, solve=val_solve).nll,
    )
    flow = fitted.flow
    manifold: Any = flow.bijection.manifold
    run_dir.save_flow(flow, {})

    with progress(f"measuring on {len(data.test)} points"):
        report = evaluate.accuracy_report(
            flow,
            data.test,
            solve=solve,
            cells=measure.cells,
            seconds=max(MIN_MEASURING_SECONDS, MEASURING_SHARE * fitted.timing["train_s"]),
        )
        if report.quadrature is None and data.truth is not None:
            found = evaluate.quadrature(flow, measure.cells, solve=val_solve)
            report = report._replace(quadrature=found)
    scores, test = report.scores, data.test[report.points]
    with progress(f"drawing {measure.samples} samples"):
        key = jr.fold_in(jr.key(settings.run.seed), 3)
        drawn = evaluate.sample(flow, key, measure.samples, solve=SAMPLING)
    samples = drawn.x[-1][~drawn.failed]
    off = samples - np.asarray(jax.vmap(manifold.project)(jnp.asarray(samples)))
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "uniform_nll": manifold.log_volume,
    }
    title = f"held-out NLL {scores.nll:.3f} ± {scores.stderr:.3f} nats"
    if data.truth is not None:
        gaps = np.asarray(data.truth.log_prob(test)) - scores.log_prob
        gap, stderr = float(np.mean(gaps)), evaluate.standard_error(gaps)
        metrics |= {"nll_gap": gap, "nll_gap_stderr": stderr}
        title += f", paired gap {gap:.4f} ± {stderr:.4f}"
    learned = Learned(report, np.asarray(test), samples, data.truth, title)
    with progress("drawing figures"):
        curves = plot.training_curves(fitted.records, loss_units="no unit")
        run_dir.save_figures(**draw_figures(learned), training=curves)
    numerics = report.numerics() | fitted.numerics()
    numerics["solver_failures"] += drawn.failures
    numerics |= {"nfe_sample": drawn.nfe, "off_manifold": float(np.abs(off).max(initial=0))}
    run_dir.finish(
        metrics | more_metrics(scores.nll),
        numerics,
        fitted.timing,
        [*doubts, *report.warnings()],
    )
    return learned, run_dir
