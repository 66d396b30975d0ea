"""Evaluation of many rows by one compiled program, a chunk at a time."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcnf import sharding
from jcnf._checks import check_instance, check_int
from jcnf.ode import Solve, unknown

CHUNK = 10_000  # rows, enough to keep every core busy
MIN_CHUNKS_FOR_STEP_PLAN = 4  # fewer do not repay the extra solve that makes the plan

_REPORT: ContextVar[Callable[[int, int], None]] = ContextVar(
    "report", default=lambda done, number: None
)


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """Return the indices of `count` evenly spaced rows out of `total`, or of all if fewer."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


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


def solve_in_chunks(
    program: Callable,
    solve: Solve,
    rows: Any,
    size: int | None = None,
    enough: Callable[[int], bool] = lambda done: False,
) -> tuple[np.ndarray, float, np.ndarray]:
    """Run `program(solve, *chunk) -> (values, stats)` over `rows`, a pytree of arrays of rows.

    By default a chunk has `CHUNK` rows. `enough(done)` is called after each chunk with the number
    of rows done; if it returns true, the remaining rows are left out.

    If `solve` has no step plan and there are many chunks, an extra solve of one chunk of rows,
    spread evenly over all of them, makes a plan for all chunks. The steps that a row takes
    therefore do not depend on the chunks before its own. The NFE counts the steps that the chunks
    took, which are fewer with a step plan.

    **Returns:** the values of the rows, NaN where the solve failed; the mean NFE over chunks; and
    which rows failed, (n,).
    """
    check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
    size = CHUNK if size is None else size
    check_int(chunk=size)
    n, dtype = len(jax.tree.leaves(rows)[0]), jnp.result_type(float)
    size = min(size, n)
    # The last row fills the last chunk.
    chunks = [np.arange(start, start + size).clip(max=n - 1) for start in range(0, n, size)]
    number, report, planning = len(chunks), _REPORT.get(), False
    if solve.step_plan is None and solve.heeds_step_plans:
        # An empty step plan, so that the same compiled program serves with and without a plan.
        solve = dataclasses.replace(solve, step_plan=unknown(dtype))
        planning = number >= MIN_CHUNKS_FOR_STEP_PLAN
    if planning:
        chunks.insert(0, evenly_spaced(n, size))
    results = []
    report(0, number)
    for index in chunks:
        # Repeat the last row until the devices can share the rows evenly. With the norm "worst",
        # repeated rows change nothing for the others.
        index = np.pad(index, (0, -size % sharding.num_devices()), mode="edge")
        chunk = sharding.shard(jax.tree.map(lambda a, index=index: a[index], rows))
        values, stats = sharding.to_host(program(solve, *chunk))
        if planning:
            planning = False
            solve = dataclasses.replace(solve, step_plan=jnp.asarray(stats.step_plan, dtype))
            continue
        values = np.array(values)
        values[stats.failed] = np.nan
        results.append((values[:size], stats.failed[:size], int(stats.nfe)))
        report(len(results), number)
        if enough(min(len(results) * size, n)):
            break
    values, failed, nfes = zip(*results, strict=True)
    return np.concatenate(values)[:n], float(np.mean(nfes)), np.concatenate(failed)[:n]
