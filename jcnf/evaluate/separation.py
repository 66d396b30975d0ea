"""How well a score tells two sets apart."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Auroc(NamedTuple):
    """Area under the curve of true against false alarms, as its threshold goes down."""

    value: float  # 1/2 of a score that says nothing, 1 where all outside is above all inside
    stderr: float  # of `value` over draws of both sets; infinite for fewer than 2 points in one


def auroc(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> Auroc:
    """Probability that an outside score is above an inside one, half of ties included.

    The Mann-Whitney statistic, exact, from one sort: time (n + m) log(n + m). Its standard error is
    that of DeLong, DeLong and Clarke-Pearson 1988, which assumes no distribution; it is 0 where the
    sets do not overlap, and then says nothing.

    **Raises:** `ValueError` for no scores, and for a NaN among them.
    """
    inside, outside = np.asarray(inside), np.asarray(outside)
    for name, scores in {"inside": inside, "outside": outside}.items():
        if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
            raise ValueError(
                f"expected {name} scores of shape (n,) without NaN; got shape {scores.shape} with "
                f"{np.isnan(scores).sum()} NaN: leave out points whose solve failed, and say so"
            )
    above, below = _doubled_ranks(outside, inside), _doubled_ranks(inside, outside)
    pairs = 2 * len(inside) * len(outside)
    spread = [_variance_of_mean(above / (2 * len(inside)))]
    spread += [_variance_of_mean(below / (2 * len(outside)))]
    return Auroc(float(above.sum() / pairs), float(np.sqrt(sum(spread))))


def _doubled_ranks(scores, others):
    """Twice the number of `others` below each score, ties half: whole numbers."""
    ordered = np.sort(others)
    sides = [np.searchsorted(ordered, scores, side) for side in ("left", "right")]
    return sides[0] + sides[1]


def _variance_of_mean(x):
    return np.var(x, ddof=1) / len(x) if len(x) > 1 else np.inf
