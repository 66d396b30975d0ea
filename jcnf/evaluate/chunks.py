"""Evaluation of many rows by one compiled program, a chunk at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcnf import sharding
from jcnf._checks import check_instance, check_int
from jcnf._rows import evenly_spaced
from jcnf.ode import Solve, unknown

CHUNK = 10_000  # rows, enough to keep every core busy
MIN_CHUNKS_FOR_STEP_PLAN = 4  # fewer do not repay the extra solve that makes the plan

_REPORT: ContextVar[Callable[[int, int], None]] = ContextVar(
    "report", default=lambda done, number: None
)


@contextmanager
def reporting(report: Callable[[int, int], None]) -> Iterator[None]:
    """Call `report(done, number)` before the first of `number` chunks is solved and after each.

    This applies to everything evaluated inside the `with` block, by any function of this package.
    """
    token = _REPORT.set(report)
    try:
        yield
    finally:
        _REPORT.reset(token)


def solved_in_chunks(
    program: Callable,
    solve: Solve,
    rows: Any,
    n: int,
    size: int | None = None,
    enough: Callable[[int], bool] = lambda done: False,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Return `in_chunks` of `program(solve, *chunk)`, with one step plan for all chunks.

    If there are many chunks, an extra solve of one chunk of rows, spread evenly over all of them,
    makes the plan. The steps that a row takes therefore do not depend on the chunks before its own.
    The NFE counts the steps that the chunks took, which are fewer with a step plan.
    """
    check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
    size, dtype = _size(n, size), jnp.result_type(float)
    if solve.step_plan is None and solve.heeds_step_plans:
        # An empty step plan, so that the same compiled program serves with and without a plan.
        solve = dataclasses.replace(solve, step_plan=unknown(dtype))
        if n > (MIN_CHUNKS_FOR_STEP_PLAN - 1) * size:
            some = _filled(evenly_spaced(n, size))
            _, stats = _solve_chunk(partial(program, solve), rows, some)
            solve = dataclasses.replace(solve, step_plan=jnp.asarray(stats.step_plan, dtype))
    return in_chunks(partial(program, solve), rows, n, size, enough)


def in_chunks(
    program: Callable,
    rows: Any,
    n: int,
    size: int | None = None,
    enough: Callable[[int], bool] = lambda done: False,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Run `program(*chunk) -> (values, stats)` over `rows`, a pytree of arrays of `n` rows.

    By default a chunk has `CHUNK` rows. `enough(done)` is called after each chunk with the number
    of rows done; if it returns true, the remaining rows are left out.

    **Returns:** the values of the rows, NaN where the solve failed; the mean NFE over chunks; and
    which rows failed, (n,).
    """
    size = _size(n, size)
    values, nfes, flags = [], [], []
    number, report = -(-n // size), _REPORT.get()
    report(0, number)
    for start in range(0, n, size):
        stop = min(start + size, n)
        index = _filled(np.minimum(np.arange(start, start + size), stop - 1))
        value, stats = _solve_chunk(program, rows, index)
        values.append(value[: stop - start])
        nfes.append(int(stats.nfe))
        flags.append(stats.failed[: stop - start])
        report(len(flags), number)
        if enough(stop):
            break
    return np.concatenate(values), float(np.mean(nfes)), np.concatenate(flags)


def _size(n, size):
    """Return the number of rows in a chunk, `size` or the default, at most `n`."""
    size = CHUNK if size is None else size
    check_int(chunk=size)
    return min(size, n)


def _filled(index):
    """Repeat the last index until the devices can share the rows evenly.

    With the norm "worst" the repeated rows change nothing for the others.
    """
    return np.pad(index, (0, -len(index) % sharding.num_devices()), mode="edge")


def _solve_chunk(program, rows, index):
    """Return the values of the rows at `index`, NaN where they failed, and the solve's stats."""
    chunk = jax.tree.map(lambda a: a[index], rows)
    values, stats = sharding.to_host(program(*sharding.shard(chunk)))
    values = np.array(values)
    values[stats.failed] = np.nan
    return values, stats
