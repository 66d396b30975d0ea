"""The parts of a training, each with an objective and an optimiser of its own."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Key

from jcnf import CNF, Solve, training

WARM_UP = 5  # steps before those that are timed
STUCK = 50  # steps in a row without an update, after which training does not go on as it is


class Stage(NamedTuple):
    """A part of training."""

    objective: training.Objective  # of a flow, a batch x or (x, context), and a key
    steps: int
    optimizer: optax.GradientTransformation
    solve: Solve | None  # of an objective that solves
    average: float  # decay of the parameters' moving average
    batch: int | None  # samples in a batch; None for all of a table
    fixed: bool = False  # whether every step has the same batch and the same noise


# Batches of a size, or of None for all of a table: `jcnf.training.draw_rows`, or what draws afresh.
DrawOf = Callable[[int | None], training.DrawBatch]


def drawing(sample: Callable[[Key[Array, ""], int], Any]) -> DrawOf:
    """Batches of fresh samples, `sample(key, num)`."""

    def of(num):
        assert num is not None, "there is no table to take all of"
        return lambda key, _: sample(key, num)

    return of


def compiled(
    model: Any, stage: Stage, draw_of: DrawOf, state: training.TrainState, data: Any
) -> tuple[jax.stages.Compiled, training.Totals]:
    """The program of a stage, `program(state, data, key, until, totals)`, and totals of no step."""
    run = training.make_run(
        model,
        stage.objective,
        draw_of(stage.batch),
        stage.optimizer,
        average=stage.average,
        solve=stage.solve,
        fixed=stage.fixed,
        # An optimiser that sees the same again would do the same again.
        stuck=1 if stage.fixed else STUCK,
    )
    arguments = (state, data, jr.key(0), 0)
    none = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run.program, *arguments)[1]
    )
    return run.program.lower(*arguments, none).compile(), none


class Trained(NamedTuple):
    """A flow and what it took."""

    flow: CNF  # with the averaged parameters
    steps: int
    seconds: float  # of training: no compilation
    skipped: int  # updates that were not applied


def train_stages(
    flow: CNF,
    stages: Sequence[Stage],
    draw_of: DrawOf,
    data: Any = None,
    seed: int = 0,
) -> Trained:
    """Train through `stages`, each from the averaged parameters of the one before.

    One that breaks down, `STUCK` steps in a row without an update, ends there, with a warning.
    """
    key, seconds = jr.fold_in(jr.key(seed), 1), 0.0
    state = training.init(flow, stages[0].optimizer)
    for number, stage in enumerate(stages):
        if number:
            state = training.restart(state, state.average, stage.optimizer)
        program, none = compiled(flow, stage, draw_of, state, data)
        until = int(state.step) + stage.steps
        tic = time.perf_counter()
        state, _ = jax.block_until_ready(program(state, data, key, until, none))
        seconds += time.perf_counter() - tic
        if state.step < until:
            print(f"warning: training broke down {until - int(state.step)} steps before its end")
    flow = training.with_params(flow, state.average)
    return Trained(flow, int(state.step), seconds, int(state.skipped))


def step_seconds(flow: CNF, stage: Stage, draw_of: DrawOf, steps: int) -> float:
    """Seconds of one of the first steps, without compilation and warm-up."""
    state = training.init(flow, stage.optimizer)
    program, none = compiled(flow, stage, draw_of, state, None)
    state, _ = jax.block_until_ready(program(state, None, jr.key(0), WARM_UP, none))
    tic = time.perf_counter()
    jax.block_until_ready(program(state, None, jr.key(0), WARM_UP + steps, none))
    return (time.perf_counter() - tic) / steps
