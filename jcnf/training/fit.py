"""Train a flow in one call, with validation, early stopping and a progress bar."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Key

from jcnf import sharding
from jcnf._checks import check_callable, check_int, check_key, check_number
from jcnf.flows import transform
from jcnf.objectives import flow_matching, with_context
from jcnf.ode import Solve
from jcnf.training.loop import (
    draw_rows,
    init,
    make_train_loop,
    means,
    with_params,
)
from jcnf.training.optimizers import make_optimizer

SAMPLER_DRAWS = 1000  # validation points, if the data come from a sampler
DEFAULT_VALIDATIONS = 50
DISPATCH_SECONDS = 1.0  # about; the progress bar is updated after each dispatch
VALIDATION_CHUNK_ROWS = 10_000
VALIDATION_SOLVE = Solve(rtol=1e-4, atol=1e-4)
MAX_FAILED_VALIDATION_SHARE = 0.1  # the NLL is NaN if the solve fails for more of the rows

Rows = Array | np.ndarray | tuple[Array | np.ndarray, Array | np.ndarray]


class Progress(NamedTuple):
    """The argument of a callback: where training stands."""

    step: int  # optimizer steps taken so far
    steps: int  # optimizer steps of the whole training
    metrics: dict[str, float]  # means since the last call; "val_nll" (nats) if there is validation
    flow: Any  # the flow with the averaged parameters of this step


class FitResult(NamedTuple):
    """The trained flow and its history."""

    flow: Any  # has the averaged parameters of the best validation, or of the last step without one
    history: list[dict[str, float]]  # "step", "seconds", "loss" and other metrics, "val_nll"


def fit(
    flow: Any,
    data: Rows | Callable[[Key[Array, ""], int], Any],
    *,
    key: Key[Array, ""],
    objective: Callable = flow_matching,
    steps: int = 5000,
    batch: int = 512,
    optimizer: optax.GradientTransformation | None = None,
    validation: float | Rows | Callable[[Any], float] | None = 0.1,
    every: int | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callable[[Progress], bool | None]] = (),
    average: float = 0.999,
    solve: Solve | None = None,
    devices: int | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a flow on an array or a sampler; return the flow and the history of its training.

    ```python
    result = jcnf.fit(flow, x, key=jr.key(0))
    jcnf.log_prob(result.flow, x)
    ```

    **Arguments:**

    - `flow`: the flow, or any other model that `objective` takes.
    - `data`: an array (n, dim); a pair of arrays `(x, context)` for a conditional density; or a
      sampler `data(key, num)` that returns either.
    - `key`: consumed once. It determines the batches, the noise, and the rows held out.
    - `objective`: a function like those in `jcnf.objectives`; set its options with
      `functools.partial`.
    - `steps`, `batch`: the number of optimizer steps, and the number of samples in each.
    - `optimizer`: an optax optimizer; by default AdamW at 1e-3 with warm-up, cosine decay and
      clipping.
    - `validation`: how the best parameters are chosen. A float is the share of the rows of `data`
      to hold out (for a sampler, any float stands for 1000 new points). An array or a pair like
      `data` is the validation set. In both cases the score is the NLL in nats, from solves at a
      tolerance of 1e-4. A function of the flow returns a score of your own, lower is better. With
      None, the last parameters are returned.
    - `every`: number of steps between validations, log entries and calls of the callbacks; by
      default a fiftieth of `steps`.
    - `patience`: stop after this many validations in a row without a new best one.
    - `callbacks`: each is called with a `Progress`; training stops early if one returns True.
    - `average`: decay of the moving average of the parameters. The average is what is returned.
    - `solve`: how to solve the ODE, for objectives that do. Each solve reuses the step plan of the
      one before.
    - `devices`: number of devices that share each batch; by default those of the current mesh.
    - `progress`: whether to show a progress bar.

    **Raises:** `ValueError` for arguments that are out of range or do not fit together, and for
    data with NaN or inf; `RuntimeError` if nothing was learned, as `TrainLoop` does. Warns about
    skipped updates.
    """
    check_key(key)
    check_int(steps=steps, batch=batch)
    every = max(1, steps // DEFAULT_VALIDATIONS) if every is None else every
    check_int(every=every)
    if isinstance(validation, int | float):
        check_number("(0, 1)", validation=validation)
    if patience is not None:
        check_int(patience=patience)
        if validation is None:
            raise ValueError(
                "patience counts validations, so it needs some; got validation=None: "
                "give validation=0.1, or leave out patience"
            )
    for callback in callbacks:
        check_callable("a sequence of functions that take a Progress", callbacks=callback)
    if optimizer is None:
        optimizer = make_optimizer(1e-3, steps, warmup=min(200, steps // 10), clip=10.0)
    split_key, fresh_key, train_key = jr.split(key, 3)
    rows, draw, conditional, held_out = _prepared(data, batch, validation, split_key, fresh_key)
    score = validation if callable(validation) else partial(_nll, rows=held_out)
    validated = validation is not None
    if conditional:
        objective = with_context(objective)
    loop = make_train_loop(flow, objective, draw, optimizer, average=average, solve=solve)
    mesh = (
        contextlib.nullcontext() if devices is None else jax.set_mesh(sharding.make_mesh(devices))
    )
    history, here, best, lowest, worse = [], flow, None, math.inf, 0
    start = time.monotonic()
    with mesh, _bar(steps, progress) as bar:
        train_key, rows = sharding.replicate((train_key, rows))
        state, pace = sharding.replicate(init(flow, optimizer)), 1
        while (step := int(state.step)) < steps:
            sums, due = None, min(steps, step + every)
            while step < due:
                until, tic = min(due, step + pace), time.monotonic()
                state, sums = loop(state, rows, train_key, until, sums)
                taken, seconds = int(state.step) - step, time.monotonic() - tic
                pace = min(max(1, int(DISPATCH_SECONDS / max(seconds, 1e-9) * taken)), 10 * pace)
                step += taken
                bar.update(taken)
            assert sums is not None
            record = {name: float(value) for name, value in means(sums).items()}
            here = with_params(flow, state.average)
            if validated:
                record["val_nll"] = float(score(here))
                worse += 1
                if record["val_nll"] < lowest:
                    best, lowest, worse = here, record["val_nll"], 0
            bar.set_postfix({k: f"{record[k]:.4g}" for k in ("loss", "val_nll") if k in record})
            history.append({"step": step, "seconds": time.monotonic() - start, **record})
            told = [callback(Progress(step, steps, record, here)) for callback in callbacks]
            if any(told) or (patience is not None and worse >= patience):
                break
    return FitResult(here if best is None else best, history)


def _prepared(data, batch, validation, split_key, fresh_key):
    """Return the training rows, `draw_batch`, whether there is a context, and the held-out rows."""
    if callable(data):
        drawn = jax.eval_shape(lambda key: data(key, batch), split_key)
        held_out = data(fresh_key, SAMPLER_DRAWS) if isinstance(validation, float) else validation
        return None, lambda key, _: data(key, batch), isinstance(drawn, tuple), held_out
    rows = jax.tree.map(jnp.asarray, data)
    conditional = isinstance(rows, tuple)
    lengths = {len(leaf) for leaf in jax.tree.leaves(rows)}
    if len(lengths) != 1 or (conditional and len(rows) != 2):
        raise ValueError(
            "data must be an array (n, dim), a pair (x, context) with equal numbers of rows, or a "
            f"sampler data(key, num); got shapes {jax.tree.map(jnp.shape, rows)}"
        )
    held_out = validation
    if isinstance(validation, float):
        (n,) = lengths
        order = jr.permutation(split_key, n)
        kept = max(1, round(validation * n))
        if kept == n:
            raise ValueError(
                f"validation={validation} leaves none of the {n} rows of data for training: "
                "give more rows, a smaller share, or validation=None"
            )
        held_out, rows = (
            jax.tree.map(lambda a, i=i: a[i], rows) for i in (order[:kept], order[kept:])
        )
    return rows, draw_rows(batch), conditional, held_out


def _nll(flow, rows):
    """Return the mean NLL of the rows in nats, without failed rows; NaN if too many failed."""
    x, context = rows if isinstance(rows, tuple) else (rows, None)
    found = []
    for start in range(0, len(x), VALIDATION_CHUNK_ROWS):
        part = slice(start, start + VALIDATION_CHUNK_ROWS)
        here = None if context is None else context[part]
        carried = transform(flow, x[part], context=here, solve=VALIDATION_SOLVE)
        found.append(sharding.to_host(flow.base.log_prob(carried.value) + carried.logdet))
    log_prob = np.concatenate(found)
    solved = np.isfinite(log_prob)
    failed_share = np.mean(~solved)
    return -np.mean(log_prob[solved]) if failed_share <= MAX_FAILED_VALIDATION_SHARE else math.nan


@contextlib.contextmanager
def _bar(steps, progress):
    """Show a progress bar, in the first process only."""
    from tqdm import tqdm

    with tqdm(
        total=steps,
        unit="step",
        dynamic_ncols=True,
        disable=not progress or jax.process_index() > 0,
    ) as bar:
        yield bar
