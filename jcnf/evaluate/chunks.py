"""Many rows through one compiled program, a chunk at a time.

A few rows that fail fail alone: the chunk is solved again without them, up to `ATTEMPTS` times.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jcnf import parallel, require

CHUNKS = {"cpu": 1000}  # rows by platform, such that a core's cache holds the work on them
CHUNK = 10_000  # rows elsewhere
ATTEMPTS = 3
FEW = 0.1  # the share of a chunk's rows that may fail, if not 10; with more the flow fails


def in_chunks(
    program: Callable, rows: Any, n: int, size: int | None = None
) -> tuple[np.ndarray, float, np.ndarray]:
    """`program(*chunk) -> (values, stats)` over `rows`, a pytree of arrays of `n` rows.

    By default a chunk has `CHUNKS` rows.

    Returns the values of all rows, NaN where the solve failed, the mean NFE and the flags (n,).
    """
    if size is None:
        size = CHUNKS.get(jax.default_backend(), CHUNK)
    require.whole(chunk=size)
    size, devices = min(size, n), parallel.devices()
    filled = -(-size // devices) * devices
    values, nfes, flags = [], [], []
    for start in range(0, n, size):
        # A chunk is filled up with its last row: its own rows depend on no number of devices.
        stop = min(start + size, n)
        index = np.minimum(np.arange(start, start + filled), stop - 1)
        value, nfe, failed = _solve_chunk(program, rows, index)
        values.append(value[: stop - start])
        nfes.append(nfe)
        flags.append(failed[: stop - start])
    return np.concatenate(values), float(np.mean(nfes)), np.concatenate(flags)


def _solve_chunk(program, rows, index):
    """Values, NFE and flags: rows at fault give their places to a good one, and all is redone."""
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
    return values, int(stats.nfe), failed
