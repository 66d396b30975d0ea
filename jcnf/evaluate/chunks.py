"""Many rows through one compiled program, a chunk at a time."""

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
from jcnf.ode import Solve, unknown

CHUNK = 10_000  # rows, enough for every core to be busy
MANY = 4  # chunks, among which a solve for the sake of its step plan pays

_REPORT: ContextVar[Callable[[int, int], None]] = ContextVar(
    "report", default=lambda done, number: None
)


@contextmanager
def reporting(report: Callable[[int, int], None]) -> Iterator[None]:
    """Call `report(done, number)` before the first of `number` chunks is solved, and after each.

    It holds for whatever is evaluated inside the `with` block, by any function of this package.
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
    """`in_chunks` of `program(solve, *chunk)`, whose solves are all alike.

    Many chunks all follow one step plan, that of a solve of as many rows from among all, so that
    the steps that a row takes do not depend on the chunks before its own. NFE count the steps that
    the chunks took, which are fewer with a step plan.
    """
    check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
    size, dtype = _size(n, size), jnp.result_type(float)
    if solve.step_plan is None and solve.heeds_step_plans:
        # With a step plan that tells nothing, for one program with and without.
        solve = dataclasses.replace(solve, step_plan=unknown(dtype))
        if n > (MANY - 1) * size:
            some = _filled(np.linspace(0, n - 1, size).astype(int))
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
    """`program(*chunk) -> (values, stats)` over `rows`, a pytree of arrays of `n` rows.

    By default a chunk has `CHUNK` rows. `enough(done)` is asked after each chunk, with the number
    of rows that are done; where it is true, the rest is left out.

    Returns the values of the rows, NaN where the solve failed, the mean NFE and the flags.
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
    """Of a chunk of `n` rows."""
    size = CHUNK if size is None else size
    check_int(chunk=size)
    return min(size, n)


def _filled(index):
    """With its last row, for the devices to share: its own rows depend on no number of these."""
    return np.pad(index, (0, -len(index) % sharding.devices()), mode="edge")


def _solve_chunk(program, rows, index):
    """Return the values of the rows at `index`, NaN where they failed, and the statistics."""
    chunk = jax.tree.map(lambda a: a[index], rows)
    values, stats = sharding.on_host(program(*sharding.split(chunk)))
    values = np.array(values)
    values[stats.failed] = np.nan
    return values, stats
