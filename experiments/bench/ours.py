"""The programs of jcnf that are timed, and JAX programs of other kinds in the same surroundings."""

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
SETTLING = 8  # steps until the step plan that is carried from solve to solve has settled
AVERAGED = 40  # steps after these, for their mean NFE
DISPATCH = 0.05


def training_step(
    case: Case,
    objective: training.Objective | None = None,
    *,
    fresh: bool = False,
    carried: Solve | None = None,
    **settings,
) -> Program:
    """Our training step (loss, gradient, Adam, average, guards) by an objective.

    As in training, a dispatch takes steps for some time: `DISPATCH` seconds.
    Without one it is likelihood under the case's solve; `settings` are the objective's. The weights
    stay where they are: the factor of the updates is 0. So does the batch, that every step is the
    same work, if it is not to be a `fresh` one each time. An objective that takes a solve is given
    `carried`, with the step plan of the step before.
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

    run = training.make_run(case.flow, objective, draw, optimizer, solve=solve)
    x, key, taken = case.x, jr.key(0), 0
    tic = time.perf_counter()
    compiled = run.program.lower(state, x, key, 0).compile()
    seconds = time.perf_counter() - tic

    def take(steps):
        nonlocal state, taken
        taken += steps
        state, totals = jax.block_until_ready(compiled(state, x, key, taken))
        return totals

    take(SETTLING)
    tic = time.perf_counter()
    totals = training.means(take(AVERAGED))
    steps = max(1, round(DISPATCH * AVERAGED / (time.perf_counter() - tic)))
    figures = {name: float(totals[name]) for name in ("loss", "nfe", "grad_norm")}
    figures |= {"compile_s": seconds} | temporary_memory(compiled)
    return Program(functools.partial(take, steps), figures, steps)


def loss(case: Case, **settings) -> float:
    """Mean negative log-likelihood of the batch under the case's solve."""
    objective = eqx.filter_jit(objectives.likelihood)
    return float(objective(case.flow, case.x, jr.key(0), solve=case.solve, **settings)[0])


def temporary_memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """MiB that XLA sets aside for a program beside its arguments; {} where it does not say."""
    analysis = compiled.memory_analysis()
    return {} if analysis is None else {"xla_mb": analysis.temp_size_in_bytes / 2**20}
