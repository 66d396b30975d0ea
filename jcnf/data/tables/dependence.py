"""Find columns that others determine: linearly, as a product of powers, or quadratically.

A rank-revealing QR finds linear relations, and between the logarithms of positive columns products
of powers. Quadratic relations are found by least squares, one fit for each column.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

_MAX_UNEXPLAINED = 1e-4  # 1 - R^2 of a determined column
_MIN_WEIGHT = 0.02  # of a term that is named as a reason; all terms are standardized
_MIN_SPARE_ROWS = 10  # rows beyond one for each term; with fewer, chance explains too much
_RIDGE = 1e-10  # the squares and products of a column with two values are dependent
_MAX_QUADRATIC_COLUMNS = 20  # more columns have too many squares and products
_MAX_ROWS = 20_000


class Dependence(NamedTuple):
    """The finding that the column `target` is nearly a function of `others`."""

    target: str
    others: list[str]  # with their powers, in a product
    how: str
    unexplained: float  # 1 - R^2


def dependences(rows: Float[np.ndarray, "rows dim"], columns: Sequence[str]) -> list[Dependence]:
    """Find columns that others determine in any of three ways; one that is found explains no other.

    At most 20,000 evenly spaced rows are used, and up to 20 columns for quadratic relations.
    """
    found = linear_dependences(rows, columns)
    rows = _some(rows)
    for find in (_products, _quadratic):
        targets = {one.target for one in found}
        left = [i for i, column in enumerate(columns) if column not in targets]
        found += find(rows[:, left], [columns[i] for i in left])
    return found


def linear_dependences(
    rows: Float[np.ndarray, "rows dim"], columns: Sequence[str]
) -> list[Dependence]:
    """Find columns that are linear functions of others, as `dependences` does."""
    return _linear(_some(rows), columns, "linear")


def _some(rows: np.ndarray) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).astype(int)]


def _products(rows: np.ndarray, columns: Sequence[str]) -> list[Dependence]:
    positive = np.flatnonzero(rows.min(axis=0) > 0).tolist()
    names = [columns[i] for i in positive]
    return _linear(np.log(rows[:, positive]), names, "a product of powers")


def _linear(values: np.ndarray, columns: Sequence[str], how: str) -> list[Dependence]:
    if not columns or len(values) < 1.1 * len(columns) + _MIN_SPARE_ROWS:
        return []
    z, std = _standardized(values)
    # Pivoting puts the column that the earlier ones explain least next. The preference is for the
    # first of columns that are equally good.
    preference = np.linspace(1, 0.999, len(columns))
    decomposed: Any = scipy.linalg.qr(z * preference, mode="r", pivoting=True)
    r, order = decomposed
    rank = int(np.sum(np.abs(np.diagonal(r)) >= np.sqrt(_MAX_UNEXPLAINED)))
    weights = scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank])
    scale, found = preference / std, []
    for place in rank + np.argsort(order[rank:]):
        target = int(order[place])
        others = [
            f"{columns[i]}{'' if how == 'linear' else f'^{w * scale[i] / scale[target]:.3g}'}"
            for i, w in zip(order[:rank].tolist(), weights[:, place], strict=True)
            if abs(w) > _MIN_WEIGHT
        ]
        left = float(np.sum(r[rank:, place] ** 2))
        found += [Dependence(columns[target], others, how, left)] if others else []
    return found


def _quadratic(rows: np.ndarray, columns: Sequence[str]) -> list[Dependence]:
    dim = len(columns)
    terms = [[i] for i in range(dim)] + [[i, j] for i in range(dim) for j in range(i, dim)]
    if dim > _MAX_QUADRATIC_COLUMNS or len(rows) < 1.1 * len(terms) + _MIN_SPARE_ROWS:
        return []
    z, _ = _standardized(rows)
    z, _ = _standardized(np.stack([z[:, term].prod(axis=1) for term in terms], axis=1))
    gram = z.T @ z + _RIDGE * np.eye(len(terms))
    found, gone = [], set()
    for target in reversed(range(dim)):
        given = [i for i, term in enumerate(terms) if not {target, *gone} & set(term)]
        weights = np.linalg.solve(gram[np.ix_(given, given)], gram[given, target])
        left = float(1 - gram[given, target] @ weights)
        used = [terms[i] for i, w in zip(given, weights, strict=True) if abs(w) > _MIN_WEIGHT]
        if left < _MAX_UNEXPLAINED:
            gone.add(target)
            others = [columns[i] for i in sorted({i for term in used for i in term})]
            found.append(Dependence(columns[target], others, "quadratic", left))
    return found


def _standardized(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return columns of mean 0 and norm 1, or all 0, and their standard deviations.

    A few far rows would dominate R^2, so they are left out.
    """
    unit = np.maximum(np.abs(values).max(axis=0), 1e-300)  # squares of values may overflow
    far = np.abs(values - np.median(values, axis=0))
    near = ((far <= 20 * np.median(far, axis=0)) | (np.median(far, axis=0) == 0)).all(axis=1)
    values = (values[near] if near.mean() >= 0.95 else values) / unit
    std = np.maximum(values.std(axis=0), 1e-300)
    return (values - values.mean(axis=0)) / (std * np.sqrt(len(values))), unit * std
