"""Estimated divergences: variance for a budget of products, and the time of the exact ones.

Variances are of the trace at points along trajectories, and of the log-density that a solve makes
of it (noise fixed within a solve), on a trained field: a run of `experiments.density` by --from, or
a mixture of Gaussians in --dim dimensions, learnt on the spot. Times are of a loss and its
gradient through one evaluation of a field 2 x 256 wide for a batch of 512, in ratios to one
Hutchinson probe.
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
from experiments._runner.config import MANY, WIDEST, RunSettings
from experiments._runner.run_dir import RunDir, load_flow, read_flow_notes
from experiments._tasks.pretrained import train_quickly
from experiments.density import Density
from jcnf import (
    CNF,
    Exact,
    Solve,
    distributions,
    evaluate,
    fields,
    objectives,
    plot,
    training,
    transform,
)
from jcnf._checks import InputError
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
class Estimators(RunSettings):
    """What to measure."""

    # finished density run whose field is measured; by default one is trained on a mixture
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # dimension of that mixture
    dim: int = 24
    # optimiser steps on it
    steps: int = 600
    # points at which variances are measured
    points: int = 64
    # draws of each estimated trace; of log p a fifth of them
    draws: int = 100
    # dimensions in which divergences are timed; none to skip
    time_dims: tuple[int, ...] = (43, 784)
    # timed rounds
    rounds: int = 9

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        super().check()
        self.at_least(2, "dim", most=WIDEST)
        self.at_least(2, "points", "draws", most=MANY)
        self.at_least(0, "steps")
        self.at_least(1, "rounds")
        self.sizes("time_dims")
        if self.from_run is not None:
            read_flow_notes(self.from_run)


def mixture(dim: int):
    """`draw(key, n)` of 8 Gaussians, each with its own directions, of scales that fall as 1/k."""
    rng = np.random.default_rng(0)
    centres = jnp.asarray(rng.normal(size=(8, dim)), float)
    turns = np.stack([np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(8)])
    factors = jnp.asarray(turns / np.sqrt(1 + np.arange(dim)), float)

    def draw(key: Key[Array, ""], n: int) -> Array:
        which_key, noise_key = jr.split(key)
        which = jr.randint(which_key, (n,), 0, 8)
        noise = jr.normal(noise_key, (n, dim))
        return centres[which] + jnp.einsum("nij,nj->ni", factors[which], noise)

    return draw


def subject(settings: Estimators) -> tuple[CNF, Array]:
    """The flow measured, and its points at the end of the data."""
    key = jr.fold_in(jr.key(settings.seed), 2)
    if settings.from_run is not None:
        flow, _, notes = load_flow(settings.from_run, Density)
        if notes["context_dim"]:
            raise InputError(f"{settings.from_run} is a density with a --context: give another")
        return flow, jnp.asarray(evaluate.draw(flow, key, settings.points).x[-1])
    draw = mixture(settings.dim)
    field = fields.MLP(settings.dim, (128, 128), time="concat", key=jr.key(settings.seed))
    flow = CNF(field, distributions.StandardNormal(settings.dim))
    flow = train_quickly(flow, draw, settings.steps, settings.seed)
    return flow, draw(key, settings.points)


def budgets(dim: int) -> list[int]:
    """Numbers of probes, doubling, as far as orthogonal directions go."""
    return [k for k in (1, 2, 4, 8, 16, 32) if k <= dim]


@eqx.filter_jit
def trace_variance(flow: CNF, times: Array, x: Array, strategy: Estimator, keys: Array) -> Array:
    """Variance of the estimate over keys, averaged over points `x` (n, dim) at `times` (n,)."""

    def at(key):
        noise = strategy.draw(key, len(x), x.shape[1], x.dtype)
        one = functools.partial(strategy, flow.field)
        return jax.vmap(lambda t, x, noise: one(t, x, None, noise).divergence)(times, x, noise)

    return jnp.mean(jnp.var(jax.lax.map(at, keys), axis=0, ddof=1))


@eqx.filter_jit
def log_prob_variance(flow: CNF, x: Array, strategy: Estimator, keys: Array) -> Array:
    """Variance of the log-density over keys, averaged over points `x` (n, dim), nats^2."""

    def at(key):
        result = transform(flow, x, key=key, solve=SOLVE, divergence=strategy)
        return flow.base.log_prob(result.x) + result.logdet

    return jnp.mean(jnp.var(jax.lax.map(at, keys), axis=0, ddof=1))


def variances(settings: Estimators) -> dict[str, Any]:
    """Variances by strategy, against products."""
    flow, x = subject(settings)
    times = jnp.linspace(0.0, flow.t1, len(x))
    paths = evaluate.transport(flow, x, times[::-1]).x[::-1]
    along = jnp.asarray(paths[np.arange(len(x)), np.arange(len(x))])
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 3), settings.draws)
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
    """Median seconds of loss and gradient through one evaluation, by divergence."""
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
                continue  # slow enough to be told from two rounds
            tic = time.perf_counter()
            jax.block_until_ready(program(params, x))
            series[name].append(time.perf_counter() - tic)
    return {name: float(np.median(values)) for name, values in series.items()}


def run(settings: Estimators) -> None:
    """Measure, draw, print."""
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
    for dim in settings.time_dims:
        taken = seconds(dim, settings.rounds, jr.key(settings.seed))
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
    main(run, Estimators)
