"""Checks that a table suits density estimation: errors if no model can fit it, warnings otherwise.

A density is unbounded where values repeat (atoms, print resolution, duplicate rows) and where
columns determine one another, because there is mass on a set of volume zero. A model can then lower
its NLL without limit by narrowing spikes, which says nothing about the process behind the data.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError
from jcnf.data.tables.dependence import Dependence, dependences
from jcnf.data.tables.levels import Levels

_COPY_TOLERANCE = 1e-10  # on 1 - |correlation| of two columns
_COARSE_VARIETY = 0.5  # distinct values per row; with fewer, a model can learn the steps
_MAX_INSPECTED_CELLS = 10_000_000  # the rows of larger tables are subsampled
_MAX_LISTED_COLUMNS = 12  # in a message; its advice to drop columns always names all
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
            f"leave them out with {_drop(constant)}"
        )
    if copies := _copies(train):
        pairs = [f"{columns[copy]} of {columns[first]}" for copy, first in copies.items()]
        raise InputError(
            f"{path}: exact copies, up to shift and scale: {_listed(pairs)}: the density is "
            f"unbounded; leave them out with {_drop([columns[copy] for copy in copies])}"
        )


def warnings(
    rows: Float[np.ndarray, "rows dim"],
    columns: Sequence[str],
    steps: Float[np.ndarray, " dim"] | None = None,
) -> tuple[str, ...]:
    """Return one line, with advice, for each way in which a table does not suit density estimation.

    `rows` are the values before any dequantizing; `steps` are the widths of its noise, if any.
    """
    distinct = _without_duplicates(rows)
    with np.errstate(over="ignore", invalid="ignore"):  # squares of values beyond 1e154
        levels = [Levels.of(column) for column in _sample(distinct).T]
        lines = [
            _about_duplicates(len(rows) - len(distinct), len(rows), steps is not None),
            _about_atoms(levels, columns),
            _about_steps(levels, columns) if steps is None else _about_noise(steps, columns),
            *(_about_dependence(found) for found in dependences(distinct, columns)),
        ]
    return tuple(line for line in lines if line)


def _about_duplicates(count: int, of: int, dequantized: bool) -> str:
    if not count:
        return ""
    blur = "dequantizing only blurred" if dequantized else "dequantize=True only blurs"
    return (
        f"{count} of {of} rows repeat an earlier row: test rows may also be training rows, and "
        f"{_UNBOUNDED}; remove them from the file ({blur} them)"
    )


def _about_atoms(levels: Sequence[Levels], columns: Sequence[str]) -> str:
    found = {}
    for one, column in zip(levels, columns, strict=True):
        if len(peaks := one.atoms()):
            top = peaks[np.argmax(one.counts[peaks])]
            more = f" and {len(peaks) - 1} more such values" if len(peaks) > 1 else ""
            found[column] = f"{column} ({one.values[top]:.6g} in {one.counts[top]} rows{more})"
    if not found:
        return ""
    return (
        "many rows share one value of the otherwise continuous "
        f"{_columns(found)}: {_UNBOUNDED}; dequantizing does not remove an atom, "
        f"{_drop(list(found))} does"
    )


def _about_steps(levels: Sequence[Levels], columns: Sequence[str]) -> str:
    found = {
        column: f"{column} ({len(one.values)} distinct, steps of {one.step:.3g})"
        for one, column in zip(levels, columns, strict=True)
        if one.variety < _COARSE_VARIETY and one.step > 0
    }
    if not found:
        return ""
    return (
        f"values repeat within the {levels[0].counts.sum()} rows of {_columns(found)}: "
        f"{_UNBOUNDED}; add uniform noise one step wide with dequantize=True, or use "
        f"{_drop(list(found))}"
    )


def _about_noise(steps: np.ndarray, columns: Sequence[str]) -> str:
    moved = {c: f"{c} ({step:.3g})" for c, step in zip(columns, steps, strict=True) if step}
    if not moved:
        return "dequantizing changed nothing: no value occurs twice in a column"
    return (
        f"dequantized {_columns(moved)}: uniform noise of the width in parentheses was added, and "
        "the density is that of the noisy values"
    )


def _about_dependence(found: Dependence) -> str:
    return (
        f"column {found.target} follows from {found.how}: {_UNBOUNDED}; leave it out with "
        f"{_drop([found.target])}"
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


def _copies(rows: np.ndarray) -> dict[int, int]:
    """Map each column that equals an earlier one, up to shift, scale and rounding, to that one."""
    z = rows / np.abs(rows).max(axis=0)
    z -= z.mean(axis=0)
    z /= np.sqrt(np.mean(z**2, axis=0))
    near = np.triu(1 - np.abs(z.T @ z) / len(z) < _COPY_TOLERANCE, k=1)
    copies: dict[int, int] = {}
    for first, copy in np.argwhere(near):
        # One huge value in both makes any two columns correlate, so the bulk must agree as well.
        rest = z[:, copy] - np.sign(z[:, first] @ z[:, copy]) * z[:, first]
        if first not in copies and _middle_spread(rest) <= 1e-4 * _middle_spread(z[:, copy]):
            copies.setdefault(int(copy), int(first))
    return copies


def _middle_spread(values: np.ndarray) -> float:
    return float(np.median(np.abs(values - np.median(values))))


def _columns(described: dict[str, str]) -> str:
    return ("column " if len(described) == 1 else "columns ") + _listed(list(described.values()))


def _listed(items: Sequence[str]) -> str:
    tail = f", ... ({len(items)} in all)" if len(items) > _MAX_LISTED_COLUMNS else ""
    return ", ".join(items[:_MAX_LISTED_COLUMNS]) + tail


def _drop(columns: Sequence[str]) -> str:
    return f"drop={list(columns)}"
