"""The data of a training: batches drawn from them, and rows held out to validate on."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from jcnf import sharding
from jcnf._checks import check_int
from jcnf.flows import transform
from jcnf.ode import Solve
from jcnf.training.reports import check_data

SAMPLER_DRAWS = 1000  # validation points, if the data come from a sampler
VALIDATION_CHUNK_ROWS = 10_000
VALIDATION_SOLVE = Solve(rtol=1e-4, atol=1e-4)
MAX_FAILED_VALIDATION_SHARE = 0.1  # the NLL is NaN if the solve fails for more of the rows

DrawBatch = Callable[[Key[Array, ""], Any], Any]


class Prepared(NamedTuple):
    """The data as the training loop takes them."""

    rows: Any  # to train on
    draw_batch: DrawBatch
    paired: bool  # whether a batch is a pair (x, context)
    score: Callable[[Any], float] | None  # of a flow, lower is better


def draw_rows(batch: int | None) -> DrawBatch:
    """Return a `draw_batch(key, data)` that draws `batch` rows at random, with replacement.

    `data` is a table or a pytree of tables; the same rows are drawn from each. With `batch=None`,
    `draw_batch` returns all rows in order and does not consume its key.

    **Raises:** `ValueError` if `batch` is not a positive integer. `draw_batch` raises `ValueError`
    for tables without rows or with unequal numbers of rows.
    """
    if batch is not None:
        check_int(batch=batch)

    def draw(key, data):
        rows = {table.shape[0] for table in jax.tree.leaves(data)}
        if len(rows) != 1 or min(rows) < 1:
            raise ValueError(
                f"data must be tables with equal numbers of rows, at least 1; got {sorted(rows)}"
            )
        if batch is None:
            return data
        index = jr.randint(key, (batch,), 0, *rows)
        return jax.tree.map(lambda table: table[index], data)

    return draw


def prepare(
    data: Any, batch: int | DrawBatch | None, validation: Any, key: Key[Array, ""]
) -> Prepared:
    """Prepare the arguments of `jcnf.fit` of these names for the training loop; consumes `key`."""
    split_key, fresh_key = jr.split(key)
    held_out: Any = validation
    if callable(data):
        check_int(batch=batch)
        rows, draw = None, lambda key, _: data(key, batch)
        like = jax.eval_shape(draw, split_key, None)
        _check_rows(like, "what data(key, num) returns")
        paired = isinstance(like, tuple)
        if isinstance(validation, float):
            held_out = data(fresh_key, SAMPLER_DRAWS)
    else:
        if not callable(batch):
            _check_rows(data, "data")
        like = rows = jax.tree.map(jnp.asarray, data)
        check_data(rows)
        draw = batch if callable(batch) else draw_rows(batch)
        paired = isinstance(rows, tuple) and not callable(batch)
        if isinstance(validation, float):
            _check_rows(rows, f"with validation={validation}, data")
            rows, held_out = _split(rows, validation, split_key)
    score: Any = partial(_number, score=held_out) if callable(held_out) else None
    if not (held_out is None or callable(held_out)):
        _check_rows(held_out, "validation")
        held_out = jax.tree.map(jnp.asarray, held_out)
        check_data(held_out, "validation")
        if not callable(batch) and _form(held_out) != _form(like):
            raise ValueError(
                f"validation must be of the form of data, {_form(like)}; got {_form(held_out)}"
            )
        score = partial(_nll, rows=held_out)
    return Prepared(rows, draw, paired, score)


def _check_rows(rows, name):
    """Raise `ValueError` unless `rows` is an array or a pair, all of as many rows."""
    parts = rows if isinstance(rows, tuple) and len(rows) == 2 else (rows,)
    shapes: list[Any] = [getattr(part, "shape", None) for part in parts]
    if not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        got = f"a {type(rows).__name__}" if None in shapes else f"shapes {shapes}"
        raise ValueError(
            f"{name} must be an array (n, dim) or a pair of arrays (x, context) with equal numbers "
            f"of rows; got {got}"
        )


def _form(rows):
    return jax.tree.map(lambda leaf: ("rows", *leaf.shape[1:]), rows)


def _split(rows, share, key):
    """Return the rows to train on, and those held out."""
    n = len(jax.tree.leaves(rows)[0])
    held_out = max(1, round(share * n))
    if held_out == n:
        raise ValueError(
            f"validation={share} leaves none of the {n} rows of data for training: give more "
            "rows, a smaller share, or validation=None"
        )
    order = jr.permutation(key, n)
    take = lambda index: jax.tree.map(lambda table: table[index], rows)  # noqa: E731
    return take(order[held_out:]), take(order[:held_out])


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
    if np.mean(~solved) > MAX_FAILED_VALIDATION_SHARE:
        return math.nan
    return -float(np.mean(log_prob[solved]))


def _number(flow, score):
    """Return the score of the flow as a number."""
    value = score(flow)
    try:
        return float(value)
    except TypeError:
        raise ValueError(f"validation must return a number; got {value!r:.100}") from None
