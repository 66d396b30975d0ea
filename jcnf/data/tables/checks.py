"""What makes a table unfit for density estimation: errors where no model fits, warnings else.

A density is unbounded where values repeat (atoms, print resolution, duplicate rows) and where
columns determine one another: mass on a set of volume zero. A model can then lower its NLL without
end by narrowing spikes, which says nothing of the process behind the data.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError
from jcnf.data.tables.dependence import Dependence, dependences
from jcnf.data.tables.levels import Levels

_EXACT = 1e-10  # 1 - |correlation| of columns that are the same but for rounding
_COARSE = 0.5  # distinct values over rows: below it, the steps between values are learnable
_CELLS = 10_000_000  # of the table, to look at the values of: wide tables are sampled by row
_NAMED = 12  # columns in a message; all of them stand behind its --drop
_UNBOUNDED = "the density is unbounded there (a better NLL is then no better model of the process)"


def require_usable(
    path: Path, train: Float[np.ndarray, "rows dim"], columns: Sequence[str]
) -> None:
    """Stop at what no model can fit.

    Raises:
        InputError: too few rows, constant columns, and columns that are another one to rounding,
            shifted or scaled.
    """
    if len(train) < max(10, train.shape[1] + 1):
        raise InputError(
            f"{path}: {len(train)} rows to train on with {train.shape[1]} columns are too few; "
            "give more rows than columns and at least 10, or --drop columns"
        )
    same = (train == train[0]).all(axis=0)
    if constant := [column for column, fixed in zip(columns, same, strict=True) if fixed]:
        raise InputError(
            f"{path}: constant in the {len(train)} training rows: {_listed(constant)}; "
            f"leave out with {_drop(constant)}"
        )
    if copies := _copies(train):
        pairs = [f"{columns[copy]} of {columns[first]}" for copy, first in copies.items()]
        raise InputError(
            f"{path}: exact copies, but for shift and scale: {_listed(pairs)}: the density is "
            f"unbounded; leave out with {_drop([columns[copy] for copy in copies])}"
        )


def warnings(
    rows: Float[np.ndarray, "rows dim"],
    columns: Sequence[str],
    steps: Float[np.ndarray, " dim"] | None = None,
) -> tuple[str, ...]:
    """One line for each way in which a table is unfit for density estimation, and what to do.

    `rows` are as they were before any dequantising; `steps` is how wide its noise is, if any.
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


def _about_duplicates(count: int, of: int, dequantised: bool) -> str:
    if not count:
        return ""
    blur = "dequantising only blurred them" if dequantised else "--dequantise only blurs them"
    return (
        f"{count} of {of} rows repeat an earlier one: test rows may be trained upon, and "
        f"{_UNBOUNDED}; remove them from the file ({blur})"
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
        f"{_columns(found)}: {_UNBOUNDED}; dequantising does not cure an "
        f"atom, {_drop(list(found))} does"
    )


def _about_steps(levels: Sequence[Levels], columns: Sequence[str]) -> str:
    found = {
        column: f"{column} ({len(one.values)} distinct, steps of {one.step:.3g})"
        for one, column in zip(levels, columns, strict=True)
        if one.variety < _COARSE and one.step > 0
    }
    if not found:
        return ""
    return (
        f"values repeat in {_columns(found)}, of "
        f"{levels[0].counts.sum()} rows: {_UNBOUNDED}; --dequantise adds uniform noise one step "
        f"wide, or {_drop(list(found))}"
    )


def _about_noise(steps: np.ndarray, columns: Sequence[str]) -> str:
    moved = {c: f"{c} ({step:.3g})" for c, step in zip(columns, steps, strict=True) if step}
    if not moved:
        return "dequantising changed nothing: no value occurs twice in a column"
    return (
        f"dequantised {_columns(moved)}: uniform noise of the width in brackets was added, and "
        "the density is that of the noisy values"
    )


def _about_dependence(found: Dependence) -> str:
    return (
        f"column {found.target} follows from {found.how}: {_UNBOUNDED}; leave it out with "
        f"{_drop([found.target])}"
    )


def _without_duplicates(rows: np.ndarray) -> np.ndarray:
    """The rows that repeat no earlier one; all, where one column or coarse steps make repeats."""
    hashes = [hash(row.tobytes()) for row in rows + 0.0]  # + 0.0: -0.0 is 0.0
    distinct = rows[np.sort(np.unique(hashes, return_index=True)[1])]
    lattice = all(Levels.of(column).variety < _COARSE for column in _sample(distinct).T)
    return rows if lattice or rows.shape[1] == 1 else distinct


def _sample(rows: np.ndarray) -> np.ndarray:
    size = min(len(rows), _CELLS // rows.shape[1])
    return rows[np.linspace(0, len(rows) - 1, size).astype(int)]


def _copies(rows: np.ndarray) -> dict[int, int]:
    """Each column that is an earlier one but for shift, scale and rounding, with that one."""
    z = rows / np.abs(rows).max(axis=0)
    z -= z.mean(axis=0)
    z /= np.sqrt(np.mean(z**2, axis=0))
    near = np.triu(1 - np.abs(z.T @ z) / len(z) < _EXACT, k=1)
    copies: dict[int, int] = {}
    for first, copy in np.argwhere(near):
        # One huge value in both makes any two columns correlate: the middle rows must agree too.
        rest = z[:, copy] - np.sign(z[:, first] @ z[:, copy]) * z[:, first]
        if first not in copies and _middle_spread(rest) <= 1e-4 * _middle_spread(z[:, copy]):
            copies.setdefault(int(copy), int(first))
    return copies


def _middle_spread(values: np.ndarray) -> float:
    return float(np.median(np.abs(values - np.median(values))))


def _columns(described: dict[str, str]) -> str:
    return ("column " if len(described) == 1 else "columns ") + _listed(list(described.values()))


def _listed(items: Sequence[str]) -> str:
    tail = f", ... ({len(items)} in all)" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + tail


def _drop(columns: Sequence[str]) -> str:
    return f"--drop {shlex.join(columns)}"
