"""Find columns that others determine, linearly or as a product of powers, by a pivoted QR."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

_MAX_UNEXPLAINED = 1e-4  # 1 - R^2 of a determined column
_MIN_WEIGHT = 0.02  # of a column that is named as a reason; both columns are standardized
_MIN_SPARE_ROWS = 10  # rows beyond one for each column; with fewer, chance explains too much
_MAX_ROWS = 20_000


class Dependence(NamedTuple):
    """The finding that the column `target` follows from `others`, each with its coefficient."""

    target: str
    others: dict[str, float]  # powers, if `is_product`
    unexplained: float  # 1 - R^2
    is_product: bool


def dependences(rows: Float[np.ndarray, "rows dim"], columns: Sequence[str]) -> list[Dependence]:
    """Find columns that others determine: linearly, or as products of powers of positive columns.

    A column that is found explains no other. At most 20,000 evenly spaced rows are used.
    """
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_ROWS)).astype(int)]
    found = _linear(rows / np.maximum(np.abs(rows).max(axis=0), 1e-300), columns, False)
    targets = {one.target for one in found}
    positive = [i for i, name in enumerate(columns) if rows[:, i].min() > 0 and name not in targets]
    return found + _linear(np.log(rows[:, positive]), [columns[i] for i in positive], True)


def _linear(values: np.ndarray, columns: Sequence[str], is_product: bool) -> list[Dependence]:
    # A few far rows would dominate R^2, so they are left out.
    far = np.abs(values - np.median(values, axis=0))
    spread = np.median(far, axis=0)
    near = ((far <= 20 * spread) | (spread == 0)).all(axis=1)
    values = values[near] if near.mean() >= 0.95 else values
    std = values.std(axis=0)
    varied = np.flatnonzero(std > 0)
    if len(values) < len(varied) + _MIN_SPARE_ROWS:
        return []
    # Pivoting puts the column that the earlier ones explain least next. The factor makes it prefer
    # the first of columns that are equally good.
    scale = np.linspace(1, 0.999, len(varied)) / std[varied]
    z = (values - values.mean(axis=0))[:, varied] * scale / np.sqrt(len(values))
    r, order = scipy.linalg.qr(z, mode="r", pivoting=True)
    rank = int(np.sum(np.abs(np.diagonal(r)) >= np.sqrt(_MAX_UNEXPLAINED)))
    weights = scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank])
    found = []
    for place in rank + np.argsort(order[rank:]):
        target = order[place]
        others = {
            columns[varied[i]]: float(w * scale[i] / scale[target])
            for w, i in zip(weights[:, place], order[:rank], strict=True)
            if abs(w) > _MIN_WEIGHT
        }
        left = float(np.sum(r[rank:, place] ** 2))
        found.append(Dependence(columns[varied[target]], others, left, is_product))
    return found
