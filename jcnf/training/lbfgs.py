"""Train by L-BFGS, whose line search compares losses of one batch with one noise draw."""

from collections.abc import Callable
from typing import Any

import jax.random as jr
import optax
from jaxtyping import Array, Key

from jcnf._checks import check_key
from jcnf.objectives import Objective, with_context
from jcnf.ode import Solve
from jcnf.training.batches import DrawBatch, prepare
from jcnf.training.fit import FitResult, fit


def fit_lbfgs(
    flow: Any,
    data: Any,
    *,
    key: Key[Array, ""],
    objective: Objective,
    steps: int,
    batch: int | DrawBatch | None = None,
    optimizer: optax.GradientTransformation = optax.lbfgs(),  # noqa: B008 (frozen)
    solve: Solve | None = None,
    validation: Callable[[Any], float] | None = None,
    **settings: Any,
) -> FitResult:
    """Train a flow by L-BFGS on one batch, by default all rows of `data`, and one noise draw.

    Use it to finish a training: near a minimum, some tens of its steps lower the loss more than
    thousands of steps on fresh batches do. It ends at the first step that cannot be taken, because
    the next one would fail as well.

    The arguments and the result are those of `jcnf.fit`, without `average` and `max_skips`. All
    solves have the step plan of `solve`, so that their losses can be compared.
    """
    check_key(key)
    batch_key, noise_key, fit_key, data_key = jr.split(key, 4)
    rows, draw_batch, paired, _ = prepare(data, batch, None, data_key)
    objective = with_context(objective) if paired else objective
    solving = {} if solve is None else {"solve": solve}
    return fit(
        flow,
        rows,
        key=fit_key,
        objective=lambda flow, batch, _: objective(flow, batch, noise_key, **solving),
        steps=steps,
        batch=lambda _, rows: draw_batch(batch_key, rows),
        optimizer=optimizer,
        validation=validation,
        average=0.0,
        max_skips=1,
        **settings,
    )
