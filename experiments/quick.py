"""Flows trained on the spot, for experiments that measure something else about them."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.random as jr
from jaxtyping import Array, Key

from experiments.settings import Stage
from jcnf import CNF, Solve, distributions, fields, objectives, train
from jcnf.data.toys import toy

WARM_UP = 5  # steps before those that are timed


class Trained(NamedTuple):
    """A flow and what it took."""

    flow: CNF  # with the averaged parameters
    steps: int
    seconds: float  # of training: no compilation


def train_stages(
    flow: CNF, stages: Sequence[Stage], draw: train.DrawBatch, data: Any = None, seed: int = 0
) -> Trained:
    """Train through `stages`, each from the averaged parameters of the one before."""
    steps, seconds = 0, 0.0
    for number, stage in enumerate(stages):
        key = jr.fold_in(jr.fold_in(jr.key(seed), 1), number)
        state, program = _compiled(flow, stage, draw, data)
        tic = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, data, key, stage.steps))
        seconds += time.perf_counter() - tic
        steps += stage.steps
        flow = train.with_params(flow, state.average)
    return Trained(flow, steps, seconds)


def step_seconds(
    flow: CNF, stage: Stage, draw: train.DrawBatch, data: Any = None, steps: int = 100
) -> float:
    """Seconds of one of the first steps, without compilation and warm-up."""
    state, program = _compiled(flow, stage, draw, data)
    state, _ = jax.block_until_ready(program(state, data, jr.key(0), WARM_UP))
    tic = time.perf_counter()
    jax.block_until_ready(program(state, data, jr.key(0), WARM_UP + steps))
    return (time.perf_counter() - tic) / steps


def _compiled(flow, stage, draw, data):
    program = train.make_run(
        flow, stage.objective, draw, stage.optimizer, differentiate=stage.differentiate
    )
    state = train.init(flow, stage.optimizer)
    return state, program.lower(state, data, jr.key(0), 0).compile()


def train_quickly(
    flow: CNF, draw: Callable[[Key[Array, ""]], Array], steps: int, seed: int = 0
) -> CNF:
    """`flow` after `steps` of maximum likelihood on batches `draw(key)`."""
    objective = functools.partial(objectives.likelihood, solve=Solve(rtol=1e-4, atol=1e-4))
    optimizer = train.make_optimizer(2e-3, max(steps, 1))
    stage = Stage(objective, steps, optimizer, train.by_reverse_mode)
    return train_stages(flow, [stage], lambda key, _: draw(key), seed=seed).flow


def toy_flow(steps: int, seed: int = 0) -> CNF:
    """2-D, 64-64-64 tanh, after `steps` steps on 8gaussians."""
    field = fields.MLP(2, (64, 64, 64), time="concat", key=jr.key(seed))
    flow = CNF(field, distributions.StandardNormal(2))
    data = toy("8gaussians")
    return train_quickly(flow, lambda key: data.sample(key, 256), steps, seed)
