"""Find columns that others determine: linearly, as a product of powers, or quadratically.

Each column is regressed by least squares on functions of the others, all from one Gram matrix. It
is determined if less than 1e-4 of its variance remains unexplained.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float

_MAX_UNEXPLAINED = 1e-4  # 1 - R^2 of a determined column, adjusted for the number of regressors
_RIDGE = 1e-10  # added to the correlation matrix, which is singular if columns are dependent
_MAX_QUADRATIC_COLUMNS = 30  # more columns have too many squares and products
_MAX_EXPLAINING_COLUMNS = 30  # no smaller explanation is searched for among more
_MAX_ROWS = 20_000
_MAX_REPORTED = 10


@dataclasses.dataclass(frozen=True)
class Dependence:
    """The finding that the column `target` is nearly a function of others: `how` says which."""

    target: str
    how: str
    unexplained: float  # 1 - R^2


@dataclasses.dataclass(frozen=True, eq=False)
class _Regressors:
    """Correlations of p functions of d columns; the first d are the columns themselves."""

    gram: Float[np.ndarray, "p p"]
    uses: Bool[np.ndarray, "p d"]  # the columns that each function depends on
    rows: int

    @classmethod
    def of(cls, functions: np.ndarray, uses: np.ndarray) -> "_Regressors":
        z = functions - functions.mean(axis=0)
        size = np.sqrt(np.mean(z**2, axis=0))
        z /= np.where(size > 0, size, 1.0)
        return cls(z.T @ z / len(z), uses, len(z))

    def fit(self, target: int, given: Sequence[int]) -> tuple[float, np.ndarray, np.ndarray]:
        """Regress a column on the functions of the columns `given`.

        Returns 1 - R^2 (adjusted), the coefficients, and the indices of the functions.
        """
        absent = np.ones(self.uses.shape[1], bool)
        absent[list(given)] = False
        chosen = np.flatnonzero(~self.uses[:, absent].any(axis=1))
        gram, right = self.gram[np.ix_(chosen, chosen)], self.gram[chosen, target]
        beta = np.linalg.solve(gram + _RIDGE * np.eye(len(chosen)), right)
        left = max(1 - 2 * right @ beta + beta @ gram @ beta, 0.0)
        return float(left * self.rows / (self.rows - len(chosen))), beta, chosen

    def determined(self, target: int, given: Sequence[int]) -> bool:
        return self.fit(target, given)[0] < _MAX_UNEXPLAINED

    def candidates(self, alive: Sequence[int]) -> list[int]:
        """Return the columns of `alive` that all the others determine, the last column first."""
        absent = np.ones(self.uses.shape[1], bool)
        absent[list(alive)] = False
        chosen = np.flatnonzero(~self.uses[:, absent].any(axis=1))
        if self.rows < 3 * len(chosen):
            return []
        precision = np.linalg.inv(self.gram[np.ix_(chosen, chosen)] + _RIDGE * np.eye(len(chosen)))
        found = []
        for column in alive:
            # The inverse of a block of the precision matrix is the covariance of the block's
            # functions, given all others.
            own = np.flatnonzero(self.uses[chosen, column])
            left = np.linalg.inv(precision[np.ix_(own, own)])[0, 0]
            found += [column] if left < _MAX_UNEXPLAINED else []
        return found[::-1]

    def shortest(self, target: int, given: Sequence[int]) -> list[int]:
        """Return a small subset of the columns `given` that still determines `target`.

        Columns are tried by the size of their coefficients; if the first 30 do not suffice, all of
        `given` are returned.
        """
        _, beta, chosen = self.fit(target, given)
        weight = np.where(self.uses[chosen], np.abs(beta)[:, None], 0).max(axis=0)
        order = sorted(given, key=lambda column: -weight[column])
        sizes = range(min(len(order), _MAX_EXPLAINING_COLUMNS) + 1)
        size = bisect.bisect_left(
            sizes, True, lo=1, key=lambda m: self.determined(target, order[:m])
        )
        if size == len(sizes):
            return list(given)
        kept = order[:size]
        for column in kept[::-1]:
            fewer = [other for other in kept if other != column]
            kept = fewer if self.determined(target, fewer) else kept
        return sorted(kept)


def dependences(rows: Float[np.ndarray, "rows dim"], columns: Sequence[str]) -> list[Dependence]:
    """Find columns that the others determine, each with few of the others; at most 10.

    A column that is found is not used to explain another. The relations tried are linear ones, then
    products of powers (linear in the logarithms of positive columns), then squares and products;
    the last two only up to 30 columns, and each only with at least 3 rows per regressor. At most
    20,000 evenly spaced rows are used, without those beyond 8 standard deviations, which would
    dominate R^2.
    """
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).astype(int)]
    found: list[Dependence] = []
    alive = list(range(rows.shape[1]))
    for kind, data, places in _kinds(rows):
        regressors = _regressors(kind, data)
        here = [i for i, place in enumerate(places) if place in alive]
        for target in regressors.candidates(here):
            given = [i for i in here if i != target]
            if len(found) == _MAX_REPORTED or not regressors.determined(target, given):
                continue
            chosen = regressors.shortest(target, given)
            names = [columns[places[i]] for i in chosen]
            how = _in_words(kind, data[:, chosen], data[:, target], names)
            left = regressors.fit(target, chosen)[0]
            found.append(Dependence(columns[places[target]], f"{how}, 1 - R2 = {left:.1g}", left))
            here.remove(target)
            alive.remove(places[target])
            if len(chosen) > _MAX_EXPLAINING_COLUMNS:  # one example of a lost rank is enough
                break
    return found


def _kinds(rows: np.ndarray) -> Iterator[tuple[str, np.ndarray, list[int]]]:
    """Yield the data for each kind of regression, and the table positions of its columns."""
    every = list(range(rows.shape[1]))
    yield "linear", _without_extremes(rows), every
    if len(every) <= _MAX_QUADRATIC_COLUMNS:
        positive = [i for i in every if rows[:, i].min() > 0]
        if len(positive) > 1:
            yield "log", _without_extremes(np.log(rows[:, positive])), positive
        yield "quadratic", _without_extremes(rows), every


def _without_extremes(rows: np.ndarray) -> np.ndarray:
    spread = np.std(rows, axis=0)
    near = (np.abs(rows - rows.mean(axis=0)) <= 8 * spread).all(axis=1)
    return rows[near] if near.mean() > 0.95 else rows


def _regressors(kind: str, data: np.ndarray) -> _Regressors:
    own = np.eye(data.shape[1], dtype=bool)
    if kind != "quadratic":
        return _Regressors.of(data, own)
    z = (data - data.mean(axis=0)) / np.maximum(data.std(axis=0), np.finfo(float).tiny)
    first, second = np.triu_indices(data.shape[1])
    functions = np.concatenate([z, z[:, first] * z[:, second]], axis=1)
    return _Regressors.of(functions, np.concatenate([own, own[first] | own[second]]))


def _in_words(kind: str, given: np.ndarray, target: np.ndarray, names: Sequence[str]) -> str:
    """Describe how the target follows from its regressors `given` (rows, few)."""
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} others" if len(names) > 6 else "")
    listed = f"{len(names)} others together" if len(names) > _MAX_EXPLAINING_COLUMNS else listed
    if kind == "linear":
        return f"{listed} (linear)"
    if kind == "log":
        powers = np.linalg.lstsq(given - given.mean(axis=0), target - target.mean(), rcond=None)[0]
        terms = [f"{name}^{power:.3g}" for name, power in zip(names, powers, strict=True)]
        return f"{' '.join(terms[:6]).replace('^1 ', ' ')} (a product of powers)"
    product = given.prod(axis=1)
    if len(names) == 2 and 1 - abs(np.corrcoef(product, target)[0, 1]) < _MAX_UNEXPLAINED:
        return f"{names[0]} x {names[1]} (a product)"
    return f"{listed} (squares and products)"
