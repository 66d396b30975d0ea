"""Many rows through one compiled program, a chunk at a time.

A few rows that fail fail alone: the chunk is solved again without them, up to `ATTEMPTS` times.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcnf import parallel, require
from jcnf.runge_kutta import unknown
from jcnf.solve import Solve

CHUNK = 10_000  # rows, enough for every core to be busy
MANY = 4  # chunks, among which a solve for the sake of its step plan pays
ATTEMPTS = 3
FEW = 0.1  # the share of a chunk's rows that may fail, if not 10; with more the flow fails

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
    program: Callable, solve: Solve, rows: Any, n: int, size: int | None = None
) -> tuple[np.ndarray, float, np.ndarray]:
    """`in_chunks` of `program(solve, *chunk)`, whose solves are all alike.

    Many chunks all follow one step plan, that of a solve of as many rows from among all, so that
    the steps that a row takes do not depend on the chunks before its own. NFE count the steps that
    the chunks took, which are fewer with a step plan.
    """
    require.instance(Solve, "a jcnf.Solve(...)", solve=solve)
    size, dtype = _size(n, size), jnp.result_type(float)
    if solve.step_plan is None and solve.heeds_step_plans:
        # With a step plan that tells nothing, for one program with and without.
        solve = dataclasses.replace(solve, step_plan=unknown(dtype))
        if n > (MANY - 1) * size:
            some = _filled(np.linspace(0, n - 1, size).astype(int))
            _, stats, _ = _solve_chunk(partial(program, solve), rows, some)
            solve = dataclasses.replace(solve, step_plan=jnp.asarray(stats.step_plan, dtype))
    return in_chunks(partial(program, solve), rows, n, size)


def in_chunks(
    program: Callable, rows: Any, n: int, size: int | None = None
) -> tuple[np.ndarray, float, np.ndarray]:
    """`program(*chunk) -> (values, stats)` over `rows`, a pytree of arrays of `n` rows.

    By default a chunk has `CHUNK` rows.

    Returns the values of all rows, NaN where the solve failed, the mean NFE and the flags (n,).
    """
    size = _size(n, size)
    values, nfes, flags = [], [], []
    number, report = -(-n // size), _REPORT.get()
    report(0, number)
    for start in range(0, n, size):
        stop = min(start + size, n)
        index = _filled(np.minimum(np.arange(start, start + size), stop - 1))
        value, stats, failed = _solve_chunk(program, rows, index)
        values.append(value[: stop - start])
        nfes.append(int(stats.nfe))
        flags.append(failed[: stop - start])
        report(len(flags), number)
    return np.concatenate(values), float(np.mean(nfes)), np.concatenate(flags)


def _size(n, size):
    """Of a chunk of `n` rows."""
    size = CHUNK if size is None else size
    require.whole(chunk=size)
    return min(size, n)


def _filled(index):
    """With its last row, for the devices to share: its own rows depend on no number of these."""
    return np.pad(index, (0, -len(index) % parallel.devices()), mode="edge")


def _solve_chunk(program, rows, index):
    """Values, statistics, flags: rows at fault give their places to a good one; all is redone."""
    failed, attempts = np.zeros(len(index), bool), 0
    while True:
        good = np.argmin(failed)
        chosen = np.where(failed, index[good], index)
        chunk = jax.tree.map(lambda a, chosen=chosen: a[chosen], rows)
        values, stats = parallel.on_host(program(*parallel.split(chunk)))
        attempts += 1
        if not np.any(stats.failed):
            break
        failed = failed | stats.failed
        few = len(np.unique(index[failed])) <= max(10, FEW * len(np.unique(index)))
        if np.all(failed) or attempts == ATTEMPTS or not few:
            failed[:] = True
            break
    values = np.array(values)
    values[failed] = np.nan
    return values, stats, failed
