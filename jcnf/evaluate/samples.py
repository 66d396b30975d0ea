"""Two samples compared: maximum mean discrepancy, and how well a score tells them apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import check_finite

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # bandwidths, in medians of the distances


def mmd(x: Float[Array, "n dim"], y: Float[Array, "m dim"]) -> float:
    """Maximum mean discrepancy of two samples (Gretton et al. 2012, eq. 5), positive.

    Under a mean of Gaussian kernels whose bandwidths are `SCALES` times the median distance within
    `y`, which should be the data. The estimate is biased: for samples of one distribution it
    is not 0 but, on average, below (1/n + 1/m)^(1/2): two samples of the data show its floor.

    **Raises:** `ValueError` for unequal dimensions, fewer than 2 points, points that are not
    finite, and a `y` of which most points are the same.
    """
    x, y = (jnp.asarray(sample, float) for sample in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"expected two samples (n, dim) of at least 2 points; got {x.shape} and {y.shape}"
        )
    check_finite(x=x, y=y)
    square = float(_mmd_squared(x, y))
    if not np.isfinite(square):
        raise ValueError(
            "no discrepancy: most points of y are the same, and it has no scale; give data that "
            "vary"
        )
    return float(np.sqrt(max(square, 0.0)))  # rounding may take it below 0


@jax.jit
def _mmd_squared(x, y):
    few = y[:: -(-len(y) // 1000)]
    median = jnp.median(_squares(few, few))

    def kernel_mean(a, b):
        def of_row(row):
            d = _squares(row[None], b)[0] / median
            return jnp.mean(jnp.stack([jnp.exp(-d / (2 * s**2)) for s in SCALES]), axis=0).mean()

        return jnp.mean(jax.lax.map(of_row, a, batch_size=256))

    return kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y)


def _squares(a, b):
    return jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)


# How well a score tells two sets apart.


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
