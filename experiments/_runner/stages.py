"""The stages of a training, each with its own objective and optimizer."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Key

from jcnf import Flow, Solve, training

WARM_UP_STEPS = 5  # not timed
MAX_STUCK_STEPS = 50  # steps in a row without an update, after which a stage rolls back or ends


class Stage(NamedTuple):
    """A stage of training."""

    objective: training.Objective  # of the flow, a batch (x or (x, context)) and a key
    steps: int
    optimizer: optax.GradientTransformation
    solve: Solve | None  # for an objective that solves an ODE
    average: float  # decay of the moving average of the parameters
    batch: int | None  # samples per batch; None for all rows of a table
    fixed: bool = False  # whether all steps use one batch and one noise draw


# Makes a function that draws batches of a given size (None for all rows of a table):
# `jcnf.training.draw_rows`, or `drawing(sample)` for fresh samples.
DrawOf = Callable[[int | None], training.DrawBatch]


def drawing(sample: Callable[[Key[Array, ""], int], Any]) -> DrawOf:
    """Return a `DrawOf` for batches of fresh samples `sample(key, num)`."""

    def of(num):
        assert num is not None, "fresh samples need a batch size; got None"
        return lambda key, _: sample(key, num)

    return of


def compiled(
    model: Any, stage: Stage, draw_of: DrawOf, state: training.TrainState, data: Any
) -> tuple[jax.stages.Compiled, training.MetricSums]:
    """Compile a stage to `program(state, data, key, until, totals)`; also return zero totals."""
    run = training.make_train_loop(
        model,
        stage.objective,
        draw_of(stage.batch),
        stage.optimizer,
        average=stage.average,
        solve=stage.solve,
        fixed=stage.fixed,
        # On the same batch and noise, a skipped step would only be skipped again.
        stuck=1 if stage.fixed else MAX_STUCK_STEPS,
    )
    arguments = (state, data, jr.key(0), 0)
    none = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run.program, *arguments)[1]
    )
    return run.program.lower(*arguments, none).compile(), none


class Trained(NamedTuple):
    """A trained flow and the cost of training it."""

    flow: Flow  # with the averaged parameters
    steps: int
    seconds: float  # without compilation
    skipped: int  # updates that were not applied


def train_stages(
    flow: Flow,
    stages: Sequence[Stage],
    draw_of: DrawOf,
    data: Any = None,
    seed: int = 0,
) -> Trained:
    """Train through `stages`, each from the averaged parameters of the one before.

    A stage that breaks down (`MAX_STUCK_STEPS` in a row without an update) ends early, with a
    warning.
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


def step_seconds(flow: Flow, stage: Stage, draw_of: DrawOf, steps: int) -> float:
    """Return the mean seconds of one of the first steps, without compilation and warm-up."""
    state = training.init(flow, stage.optimizer)
    program, none = compiled(flow, stage, draw_of, state, None)
    state, _ = jax.block_until_ready(program(state, None, jr.key(0), WARM_UP_STEPS, none))
    tic = time.perf_counter()
    jax.block_until_ready(program(state, None, jr.key(0), WARM_UP_STEPS + steps, none))
    return (time.perf_counter() - tic) / steps
