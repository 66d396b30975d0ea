"""Time the training step against `jax.vmap` of a per-sample solve: same work, one run, ratios.

Two forms of the peer, both compiled. "documented": `diffeqsolve` of one sample with diffrax's
defaults under `jax.vmap`, as continuous normalizing flows in diffrax are commonly written.
"tuned": the same, given this package's first step, `max_steps` and `throw=False`. Weights, batch,
solver, tolerances, closed-form divergence and optimiser are ours in both, and the losses and
gradients are compared before anything is timed. Per-sample solves choose their steps per sample,
so these agree to the tolerance, not to rounding; ours with `norm="worst"` holds every sample to the
tolerance as they do.

Then the step of flow matching (batch, noise, loss, gradient, AdamW, moving average) against the
bare forward and backward pass of its network on one batch, many of either in one dispatch.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from experiments.harness import main
from experiments.quick import toy_flow
from experiments.run_settings import RunSettings
from experiments.rundir import RunDir
from jcnf import CNF, Solve, distributions, fields, objectives, train
from jcnf.data.toys import toy

TOLERANCE = 1e-5
OURS = "jcnf"
MATCHING_BATCH = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(RunSettings):
    """What to time."""

    # optimiser steps before the "trained" case
    steps: int = 1000
    # timed rounds of each program, in turn
    rounds: int = 15

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        super().check()
        self.at_least(1, "steps", "rounds")


@dataclasses.dataclass(frozen=True)
class Case:
    """A flow and a batch."""

    name: str
    flow: CNF
    x: Array


def ours(flow: CNF, x: Array, norm: str) -> tuple[Array, Array]:
    """Loss and NFE by one solve for the batch."""
    solve = Solve(rtol=TOLERANCE, atol=TOLERANCE, norm=norm)
    loss, metrics = objectives.likelihood(flow, x, jr.key(0), solve=solve)
    return loss, metrics["nfe"]


def per_sample(flow: CNF, x: Array, **options) -> tuple[Array, Array]:
    """Loss and the samples' mean NFE by `jax.vmap` of a solve per sample."""

    def rates(t, state, field):
        return field.velocity_and_divergence(t, state[0])

    def log_prob(x):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            diffrax.Dopri5(),
            flow.t1,
            0.0,
            y0=(x, jnp.zeros((), x.dtype)),
            args=flow.field,
            stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
            **options,
        )
        z, logdet = jax.tree.map(lambda y: y[-1], solution.ys)
        return flow.base.log_prob(z[None])[0] + logdet, solution.stats["num_steps"]

    log_probs, steps = jax.vmap(log_prob)(x)
    return -jnp.mean(log_probs), jnp.mean(6 * steps + 1)


def programs(flow: CNF) -> dict[str, Callable]:
    """The losses to compare, ours first."""
    tuned = {
        "dt0": -Solve.first_step * flow.t1,
        "max_steps": Solve.max_steps,
        "throw": False,
    }
    return {
        OURS: functools.partial(ours, norm="batch"),
        f"{OURS}, norm=worst": functools.partial(ours, norm="worst"),
        "per-sample, documented": functools.partial(per_sample, dt0=None),
        "per-sample, tuned": functools.partial(per_sample, **tuned),
    }


def cases(steps: int) -> list[Case]:
    """The toy at initial and at trained weights, and a table of 43 columns."""
    points = toy("8gaussians").sample(jr.key(2), 100)
    wide = fields.MLP(43, (256, 256), time="concat", activation="softplus", key=jr.key(3))
    return [
        Case("2-D, 64-64-64 tanh, batch 100, initial", toy_flow(0), points),
        Case(f"the same after {steps} steps", toy_flow(steps), points),
        Case(
            "43-D, 256-256 softplus, batch 512, initial",
            CNF(wide, distributions.StandardNormal(43)),
            jr.normal(jr.key(4), (512, 43)),
        ),
    ]


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step of each program, and how its loss and gradient compare."""
    optimizer = optax.adamw(1e-3)
    params: Any
    params, static = train.partition(case.flow)
    opt_state = optimizer.init(params)
    steps, gradients, results = {}, {}, {}
    for name, loss_of in programs(case.flow).items():

        def step(params, opt_state, x, loss_of=loss_of):
            value_and_grad = jax.value_and_grad(
                lambda p: loss_of(eqx.combine(p, static), x), has_aux=True
            )
            (loss, nfe), grads = value_and_grad(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss, nfe, grads

        tic = time.perf_counter()
        steps[name] = jax.jit(step).lower(params, opt_state, case.x).compile()
        seconds = time.perf_counter() - tic
        *_, loss, nfe, grads = steps[name](params, opt_state, case.x)
        gradients[name] = ravel_pytree(grads)[0]
        error = jnp.linalg.norm(gradients[name] - gradients[OURS])
        results[name] = {
            "compile_s": seconds,
            "loss": float(loss),
            "nfe": float(nfe),
            "gradient_difference": float(error / jnp.linalg.norm(gradients[OURS])),
        }

    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            tic = time.perf_counter()
            jax.block_until_ready(step(params, opt_state, case.x))
            times[name].append(1e3 * (time.perf_counter() - tic))
    for name, series in times.items():
        low, middle, high = np.quantile(series, [0.25, 0.5, 0.75])
        ratio = float(np.median(np.array(series) / np.array(times[OURS])))
        results[name] |= {"ms": middle, "ms_q1": low, "ms_q3": high, "ratio": ratio}
    return results


def matching_cases() -> list[Case]:
    """Networks as they are trained by flow matching, each with the table it draws from."""
    key = jr.key(5)
    return [
        Case(
            f"flow matching, {dim}-D, 2 blocks of {width}, batch {MATCHING_BATCH}",
            CNF(
                fields.ResNet(dim, width, 2, frequencies=8, key=key),
                distributions.StandardNormal(dim),
            ),
            jr.normal(key, (40_000, dim)),
        )
        for dim, width in ((2, 96), (8, 128), (8, 256))
    ]


def measure_matching(case: Case, rounds: int) -> dict[str, float]:
    """Milliseconds of a training step and of the passes in it, in rounds that alternate."""
    optimizer = train.make_optimizer(1e-3, 10**6)
    params: Any
    params, static = train.partition(case.flow)
    batch, per_dispatch = case.x[:MATCHING_BATCH], 50

    def loss(params, x, t):
        v = jax.vmap(eqx.combine(params, static).field)(t, x)
        return jnp.mean(jnp.sum((v - batch) ** 2, axis=-1))

    @jax.jit
    def passes(params, x, t):
        def body(_, carry):
            # The gradient takes the parameters' place, so that no pass can be left out.
            value, grads = jax.value_and_grad(loss)(carry[0], x, t)
            return grads, value

        return jax.lax.fori_loop(0, per_dispatch, body, (params, jnp.zeros(())))

    t = jr.uniform(jr.key(6), (MATCHING_BATCH,))
    steps = train.make_run(
        case.flow, objectives.flow_matching, train.draw_rows(MATCHING_BATCH), optimizer
    )
    state = train.init(case.flow, optimizer)
    state, _ = steps(state, case.x, jr.key(7), per_dispatch)
    jax.block_until_ready(passes(params, batch, t))
    ours, bare = [], []
    for round_number in range(rounds):
        until = (round_number + 2) * per_dispatch
        tic = time.perf_counter()
        state, _ = jax.block_until_ready(steps(state, case.x, jr.key(7), until))
        ours.append(1e3 * (time.perf_counter() - tic) / per_dispatch)
        tic = time.perf_counter()
        jax.block_until_ready(passes(params, batch, t))
        bare.append(1e3 * (time.perf_counter() - tic) / per_dispatch)
    low, middle, high = np.quantile(ours, [0.25, 0.5, 0.75])
    ratio = float(np.median(np.array(ours) / np.array(bare)))
    bare_ms = float(np.median(bare))
    return {"ms": middle, "ms_q1": low, "ms_q3": high, "bare_ms": bare_ms, "ratio": ratio}


def run(settings: Benchmark) -> None:
    """Time every case and print a table."""
    # A program loaded from the cache would not show what compiling it takes.
    jax.config.update("jax_enable_compilation_cache", False)
    run_dir = RunDir("benchmark", settings)
    matching = {case.name: measure_matching(case, settings.rounds) for case in matching_cases()}
    for name, r in matching.items():
        print(
            f"{name}: {r['ms']:.2f} ms ({r['ms_q1']:.2f} to {r['ms_q3']:.2f}), bare passes "
            f"{r['bare_ms']:.2f} ms, x{r['ratio']:.2f}"
        )
    results = {}
    for case in cases(settings.steps):
        results[case.name] = measure(case, settings.rounds)
        print(f"{case.name} ({case.x.dtype}, {jax.devices()[0].device_kind})")
        for name, r in results[case.name].items():
            print(
                f"  {name:24} {r['ms']:8.1f} ms ({r['ms_q1']:.1f} to {r['ms_q3']:.1f})"
                f"  x{r['ratio']:5.2f}  NFE {r['nfe']:.0f}  loss {r['loss']:.6f}"
                f"  gradient off by {r['gradient_difference']:.0e}  compile {r['compile_s']:.1f} s"
            )
    run_dir.write_json("benchmark.json", {"likelihood": results, "flow matching": matching})
    ratios = {
        f"{case}: {name} / {OURS}": r["ratio"]
        for case, programs in results.items()
        for name, r in programs.items()
        if name != OURS
    }
    ratios |= {f"{name}: step / bare passes": r["ratio"] for name, r in matching.items()}
    run_dir.finish(ratios, {}, {})


if __name__ == "__main__":
    main(run, Benchmark)
