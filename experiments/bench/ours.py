"""The timed programs of jcnf, and other JAX objectives inside the same training step."""

import dataclasses
import functools
import time

import equinox as eqx
import jax
import jax.random as jr
import optax

from experiments.bench.cases import Case
from experiments.bench.timing import Program
from jcnf import Solve, objectives, training

NAME = "jcnf"
LEARNING_RATE = 1e-3
SETTLING_STEPS = 8  # until the step plan that is carried from solve to solve has settled
AVERAGED_STEPS = 40  # after these, for the mean NFE
DISPATCH_SECONDS = 0.05


def training_step(
    case: Case,
    objective: objectives.Objective | None = None,
    *,
    fresh: bool = False,
    carried: Solve | None = None,
    **settings,
) -> Program:
    """Return our training step (loss, gradient, Adam, average, guards) on an objective.

    As in training, a dispatch takes many steps: about `DISPATCH_SECONDS`. The default objective is
    likelihood under the case's solve; `settings` go to the objective. For every step to be the same
    work, updates have a factor of 0, so that the weights do not change, and neither does the
    batch unless it is `fresh`. An objective that takes a solve gets `carried`, with the step plan
    of the step before.
    """
    solve = carried
    if objective is None:
        solve = settings.pop("solve", case.solve)
        objective = objectives.likelihood
    objective = functools.partial(objective, **settings)
    optimizer = optax.adam(LEARNING_RATE)
    state = training.init(case.flow, optimizer)
    state = dataclasses.replace(state, rate=0 * state.rate)

    def draw(key, x):
        return case.draw(key, case.batch) if fresh else x

    run = training.make_train_loop(case.flow, objective, draw, optimizer, solve=solve)
    x, key, taken = case.x, jr.key(0), 0
    tic = time.perf_counter()
    compiled = run.program.lower(state, x, key, 0).compile()
    seconds = time.perf_counter() - tic

    def take(steps):
        nonlocal state, taken
        taken += steps
        state, totals = jax.block_until_ready(compiled(state, x, key, taken))
        return totals

    take(SETTLING_STEPS)
    tic = time.perf_counter()
    totals = training.means(take(AVERAGED_STEPS))
    steps = max(1, round(DISPATCH_SECONDS * AVERAGED_STEPS / (time.perf_counter() - tic)))
    figures = {name: float(totals[name]) for name in ("loss", "nfe", "grad_norm")}
    figures |= {"compile_s": seconds} | temporary_memory(compiled)
    return Program(functools.partial(take, steps), figures, steps)


def loss(case: Case, **settings) -> float:
    """Return the mean negative log-likelihood of the batch under the case's solve."""
    objective = eqx.filter_jit(objectives.likelihood)
    return float(objective(case.flow, case.x, jr.key(0), solve=case.solve, **settings)[0])


def temporary_memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """Return the MiB that a program needs beside its arguments; {} if XLA does not say."""
    analysis = compiled.memory_analysis()
    return {} if analysis is None else {"xla_mb": analysis.temp_size_in_bytes / 2**20}
