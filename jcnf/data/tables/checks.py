"""Checks that a table suits density estimation: errors if no model can fit it, warnings otherwise.

A density is unbounded where values repeat (atoms, print resolution, duplicate rows) and where
columns determine one another, because there is mass on a set of volume zero. A model can then lower
its NLL without limit by narrowing spikes, which says nothing about the process behind the data.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError
from jcnf.data.tables.dependence import dependences, linear_dependences
from jcnf.data.tables.files import RawTable
from jcnf.data.tables.levels import Levels

_MAX_COPY_UNEXPLAINED = 1e-10  # 1 - R^2 of a column that equals another up to rounding
_COARSE_VARIETY = 0.5  # distinct values per row; with fewer, a model can learn the steps
_MAX_INSPECTED_CELLS = 10_000_000  # the rows of larger tables are subsampled
_MAX_LISTED = 12  # columns in a message; its advice to drop columns always names all
_UNBOUNDED = (
    "the density is unbounded there (a better NLL does not mean a better model of the process)"
)


def require_usable(
    path: Path, train: Float[np.ndarray, "rows dim"], columns: Sequence[str]
) -> None:
    """Raise an error if no model can fit the training rows.

    **Raises:** `InputError` for too few rows, constant columns, and columns that equal another one
    up to shift, scale and rounding.
    """
    if len(train) < (needed := max(10, train.shape[1] + 1)):
        raise InputError(
            f"{path}: expected at least {needed} training rows for {train.shape[1]} columns; got "
            f"{len(train)}: add rows, or leave out columns with drop=[...]"
        )
    same = (train == train[0]).all(axis=0)
    if constant := [column for column, fixed in zip(columns, same, strict=True) if fixed]:
        raise InputError(
            f"{path}: constant in the {len(train)} training rows: {_listed(constant)}; "
            f"leave out with {_drop(constant)}"
        )
    copies = {
        one.target: f"{one.target} of {one.others[0]}"
        for one in linear_dependences(train, columns)
        if len(one.others) == 1 and one.unexplained < _MAX_COPY_UNEXPLAINED
    }
    if copies:
        raise InputError(
            f"{path}: exact copies, up to shift and scale: {_listed(copies.values())}: the density "
            f"is unbounded; leave out with {_drop(copies)}"
        )


def is_index(raw: RawTable, places: Sequence[int]) -> bool:
    """Whether the first of several columns is the index that pandas wrote beside them."""
    if len(places) < 2 or raw.columns[places[0]] not in ("Unnamed: 0", "index"):
        return False
    first = np.concatenate([rows[:, places[0]] for rows in raw.parts.values()])
    return bool((first == np.round(first)).all()) and len(np.unique(first)) == len(first)


def warnings(
    rows: Float[np.ndarray, "rows dim"],
    columns: Sequence[str],
    steps: Float[np.ndarray, " dim"] | None = None,
) -> Iterator[str]:
    """Yield one line, with advice, for each way in which a table does not suit density estimation.

    `rows` are the values before any dequantizing; `steps` are the widths of its noise, if any.
    """
    distinct = _without_duplicates(rows)
    if repeated := len(rows) - len(distinct):
        blurs = "dequantize=True only blurs" if steps is None else "dequantizing only blurred"
        yield (
            f"{repeated} of {len(rows)} rows repeat an earlier row: test rows may also be training "
            f"rows, and {_UNBOUNDED}; remove them from the file ({blurs} them)"
        )
    steady = (np.diff(rows, axis=0) == 1).all(axis=0)
    if counters := [column for column, counts in zip(columns, steady, strict=True) if counts]:
        yield f"{_listed(counters)} counts the rows: leave it out with {_drop(counters)}"
    levels = {c: Levels.of(x) for c, x in zip(columns, _sample(distinct).T, strict=True)}
    if atoms := {column: atom for column, one in levels.items() if (atom := one.largest_atom())}:
        found = [f"{column} ({value:.6g} in {n} rows)" for column, (value, n) in atoms.items()]
        yield (
            f"many rows share one value of the otherwise continuous {_listed(found)}: "
            f"{_UNBOUNDED}; dequantizing does not remove an atom, {_drop(atoms)} does"
        )
    if steps is not None:
        moved = [f"{c} ({step:.3g})" for c, step in zip(columns, steps, strict=True) if step]
        yield (
            f"dequantized {_listed(moved)}: uniform noise of the width in parentheses was added, "
            "and the density is that of the noisy values"
            if moved
            else "dequantizing changed nothing: no value occurs twice in a column"
        )
    elif coarse := {c: one for c, one in levels.items() if one.variety < _COARSE_VARIETY}:
        found = [
            f"{c} ({len(o.values)} distinct, steps of {o.step:.3g})" for c, o in coarse.items()
        ]
        yield (
            f"values repeat within {_listed(found)}: {_UNBOUNDED}; add uniform noise one step "
            f"wide with dequantize=True, or use {_drop(coarse)}"
        )
    for one in dependences(distinct, columns):
        yield (
            f"{one.target} follows from {_listed(one.others)} ({one.how}, 1 - R2 = "
            f"{one.unexplained:.1g}): {_UNBOUNDED}; leave it out with {_drop([one.target])}"
        )


def _without_duplicates(rows: np.ndarray) -> np.ndarray:
    """Return the rows that do not repeat an earlier one.

    Return all rows if the table has one column or only coarse ones, where chance repeats rows.
    """
    hashes = [hash(row.tobytes()) for row in rows + 0.0]  # + 0.0 turns -0.0 into 0.0
    distinct = rows[np.sort(np.unique(hashes, return_index=True)[1])]
    lattice = all(Levels.of(column).variety < _COARSE_VARIETY for column in _sample(distinct).T)
    return rows if lattice or rows.shape[1] == 1 else distinct


def _sample(rows: np.ndarray) -> np.ndarray:
    size = min(len(rows), _MAX_INSPECTED_CELLS // rows.shape[1])
    return rows[np.linspace(0, len(rows) - 1, size).astype(int)]


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    tail = f", ... ({len(items)} in all)" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + tail


def _drop(columns: Iterable[str]) -> str:
    return f"drop={list(columns)}"
