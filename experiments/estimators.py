"""Measure the variance of estimated divergences for a budget of products, and time exact ones.

    python -m experiments.estimators --dim 24
    python -m experiments.estimators use --from RUN_DIR

The first command trains a field on a mixture of Gaussians and measures it; the second measures the
field of a finished run of density or tabular. The variances are of the trace at points along
trajectories, and of the log-density that a solve computes from it (with noise fixed within a
solve). The times are of a loss and its gradient through one evaluation of a field with two layers
of width 256 at batch 512, as ratios to the time with one Hutchinson probe.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import MAX_WIDTH, Points, Range, Settings, Steps, Whole, Widths
from experiments._tasks.pretrained import train_by_likelihood
from experiments._tasks.tables import TableRun
from jcnf import (
    CNF,
    Exact,
    Flow,
    Solve,
    distributions,
    evaluate,
    fields,
    objectives,
    plot,
    training,
    transform,
)
from jcnf.divergence import Estimator, ForwardMode, Hutchinson, HutchPlusPlus, XTrace

SOLVE = Solve(rtol=1e-4, atol=1e-4)
MAKERS = {
    "Hutchinson, Rademacher": Hutchinson,
    "Hutchinson, Gaussian": functools.partial(Hutchinson, noise="gaussian"),
    "Hutchinson, orthogonal": functools.partial(Hutchinson, noise="orthogonal"),
    "Hutch++": HutchPlusPlus,
    "XTrace": XTrace,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget(Settings):
    """How much to measure."""

    # points at which variances are measured
    points: Points = 64
    # draws of each estimated trace; log p gets a fifth as many
    draws: Points = 100
    # dimensions in which to time the divergences; none to skip
    time_dims: Widths = (43, 784)
    # timed rounds of each divergence
    rounds: Steps = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimators(Experiment):
    """A field that is trained on a mixture of Gaussians, and the budget to measure it with."""

    # dimension of the mixture
    dim: Annotated[int, Range(2, MAX_WIDTH)] = 24
    # optimizer steps on the mixture
    steps: Whole = 600

    budget: Budget = Budget()
    run: Run = Run()

    def flow_and_points(self, key: Key[Array, ""]) -> tuple[Flow, Array]:
        """Return the flow to measure and points (n, dim) at its data end."""
        draw, seed = mixture(self.dim), self.run.seed
        field = fields.MLP(self.dim, (128, 128), time="concat", key=jr.key(seed))
        flow = CNF(field, distributions.StandardNormal(self.dim))
        return train_by_likelihood(flow, draw, self.steps, seed), draw(key, self.budget.points)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseEstimators(Experiment):
    """A finished run, and the budget to measure its field with."""

    # finished run of density or tabular, without --context
    from_run: Annotated[Path, tyro.conf.arg(name="from")]

    budget: Budget = Budget()
    run: Run = Run()

    def trace(self) -> None:
        TableRun.load(self.from_run).require_all_columns("this measurement")

    def flow_and_points(self, key: Key[Array, ""]) -> tuple[Flow, Array]:
        """Return the run's flow and samples (n, dim) of it."""
        flow = TableRun.load(self.from_run).flow
        return flow, jnp.asarray(evaluate.sample(flow, key, self.budget.points).x[-1])


def mixture(dim: int):
    """Return `draw(key, n)` for 8 Gaussians with random axes and variances that fall as 1/k."""
    rng = np.random.default_rng(0)
    centers = jnp.asarray(rng.normal(size=(8, dim)), float)
    turns = np.stack([np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(8)])
    factors = jnp.asarray(turns / np.sqrt(1 + np.arange(dim)), float)

    def draw(key: Key[Array, ""], n: int) -> Array:
        which_key, noise_key = jr.split(key)
        which = jr.randint(which_key, (n,), 0, 8)
        noise = jr.normal(noise_key, (n, dim))
        return centers[which] + jnp.einsum("nij,nj->ni", factors[which], noise)

    return draw


def budgets(dim: int) -> list[int]:
    """Return the numbers of probes to measure: powers of two up to 32, at most `dim`."""
    return [k for k in (1, 2, 4, 8, 16, 32) if k <= dim]


@eqx.filter_jit
def trace_variance(flow: Flow, times: Array, x: Array, strategy: Estimator, keys: Array) -> Array:
    """Variance of the estimated trace over keys; mean over points `x` (n, dim) at `times` (n,)."""

    def at(key):
        noise = strategy.draw_noise(key, len(x), x.shape[1], x.dtype)
        one = functools.partial(strategy, flow.bijection.field)
        return jax.vmap(lambda t, x, noise: one(t, x, None, noise).divergence)(times, x, noise)

    return jnp.mean(jnp.var(jax.lax.map(at, keys), axis=0, ddof=1))


@eqx.filter_jit
def log_prob_variance(flow: Flow, x: Array, strategy: Estimator, keys: Array) -> Array:
    """Variance of the log-density over keys, nats^2; mean over points `x` (n, dim)."""

    def at(key):
        result = transform(flow, x, key=key, solve=SOLVE, divergence=strategy)
        return flow.base.log_prob(result.value) + result.logdet

    return jnp.mean(jnp.var(jax.lax.map(at, keys), axis=0, ddof=1))


def variances(settings: Estimators | UseEstimators) -> dict[str, Any]:
    """Measure both variances for each strategy and number of products."""
    seed = jr.key(settings.run.seed)
    flow, x = settings.flow_and_points(jr.fold_in(seed, 2))
    times = jnp.linspace(0.0, flow.bijection.t1, len(x))
    paths = evaluate.trajectory(flow, x, times[::-1]).x[::-1]
    along = jnp.asarray(paths[np.arange(len(x)), np.arange(len(x))])
    keys = jr.split(jr.fold_in(seed, 3), settings.budget.draws)
    fewer = keys[: max(2, len(keys) // 5)]
    found: dict[str, Any] = {}
    for name, make in MAKERS.items():
        row = {"products": [], "trace": [], "log_prob": []}
        for probes in budgets(x.shape[1]):
            strategy = make(probes)
            row["products"].append(strategy.products)
            row["trace"].append(float(trace_variance(flow, times, along, strategy, keys)))
            row["log_prob"].append(float(log_prob_variance(flow, x, strategy, fewer)))
            print(
                f"  {name:24} {strategy.products:3} products: variance of the trace "
                f"{row['trace'][-1]:.2e}, of log p {row['log_prob'][-1]:.2e}"
            )
        found[name] = row
    return found


def seconds(dim: int, rounds: int, key: Key[Array, ""]) -> dict[str, float]:
    """Median seconds of a loss and its gradient through one evaluation, by divergence."""
    field = fields.MLP(dim, (256, 256), time="concat", activation="softplus", key=key)
    params, static = training.partition(CNF(field, distributions.StandardNormal(dim)))
    x, solve = jr.normal(key, (512, dim)), Solve(solver="euler", step=1.0)
    programs = {}
    for strategy in (Hutchinson(), Exact(), ForwardMode()):

        def loss(params, x, strategy=strategy):
            flow = eqx.combine(params, static)
            return objectives.likelihood(flow, x, key, solve=solve, divergence=strategy)[0]

        programs[type(strategy).__name__] = jax.jit(jax.value_and_grad(loss))
        jax.block_until_ready(programs[type(strategy).__name__](params, x))
    series: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name, program in programs.items():
            if name == "ForwardMode" and turn >= 2:
                continue  # slow: two rounds are enough
            tic = time.perf_counter()
            jax.block_until_ready(program(params, x))
            series[name].append(time.perf_counter() - tic)
    return {name: float(np.median(values)) for name, values in series.items()}


def run(settings: Estimators | UseEstimators) -> None:
    """Measure variances and times; print and draw them."""
    run_dir = RunDir("estimators", settings)
    found = variances(settings)
    panels = [
        plot.CurvePanel(
            f"variance of {what}",
            "products with the Jacobian",
            units,
            {name: (row["products"], row[of]) for name, row in found.items()},
        )
        for what, units, of in (
            ("the trace", "mean over points and times", "trace"),
            ("log p(x), one draw a solve", "nats$^2$, mean over points", "log_prob"),
        )
    ]
    run_dir.save_figures(variance=plot.scaling(panels))
    ratios = {}
    for dim in settings.budget.time_dims:
        taken = seconds(dim, settings.budget.rounds, jr.key(settings.run.seed))
        for name in ("Exact", "ForwardMode"):
            ratios[f"time of {name} over one probe, dim {dim}"] = taken[name] / taken["Hutchinson"]
        print(f"  dim {dim}: " + ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in taken.items()))
    run_dir.write_json("estimators.json", found)
    metrics = {
        f"variance of log p, {name}, {products} products": variance
        for name, row in found.items()
        for products, variance in zip(row["products"], row["log_prob"], strict=True)
    }
    run_dir.finish(metrics | ratios, {}, {})


if __name__ == "__main__":
    main(run, {"train": Estimators, "use": UseEstimators})
