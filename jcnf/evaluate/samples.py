"""Comparisons of two samples: MMD, AUROC of a score, and the NLL of a Gaussian fitted to one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import check_finite

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # in units of the median distance


def mmd(x: Float[Array, "n dim"], y: Float[Array, "m dim"]) -> float:
    """Maximum mean discrepancy of two samples, at least 0 (Gretton et al. 2012, eq. 5).

    The kernel is a mean of Gaussian kernels whose bandwidths are `BANDWIDTHS` times the median
    distance within `y`, which should be the data. The estimate is biased: for samples of the same
    distribution it is not 0, but below (1/n + 1/m)^(1/2) on average. The value for two samples of
    the data shows this floor.

    **Raises:** `ValueError` for unequal dimensions, fewer than 2 points, points that are not
    finite, and if most points of `y` are the same.
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
            "y must vary: most of its points are the same, so their median distance is 0 and gives "
            "no bandwidth"
        )
    return float(np.sqrt(max(square, 0.0)))  # rounding may make it negative


@jax.jit
def _mmd_squared(x, y):
    few = y[:: -(-len(y) // 1000)]
    median = jnp.median(_squares(few, few))

    def kernel_mean(a, b):
        def of_row(row):
            d = _squares(row[None], b)[0] / median
            kernels = [jnp.exp(-d / (2 * s**2)) for s in BANDWIDTHS]
            return jnp.mean(jnp.stack(kernels), axis=0).mean()

        return jnp.mean(jax.lax.map(of_row, a, batch_size=256))

    return kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y)


def _squares(a, b):
    return jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)


class Auroc(NamedTuple):
    """Area under the ROC curve, of true against false positives over all thresholds."""

    value: float  # 1/2 if the score says nothing, 1 if all outside scores are above all inside ones
    stderr: float  # of `value` over draws of both sets; inf if one has fewer than 2 points


def auroc(inside: Float[np.ndarray, " n"], outside: Float[np.ndarray, " m"]) -> Auroc:
    """Return the probability that an outside score is above an inside one; ties count half.

    This is the Mann-Whitney statistic, computed exactly by sorting, in time (n + m) log(n + m). Its
    standard error follows DeLong, DeLong and Clarke-Pearson 1988, without assuming a distribution;
    it is 0 if the sets do not overlap, and then says nothing.

    **Raises:** `ValueError` if either set is empty or has NaN.
    """
    inside, outside = np.asarray(inside), np.asarray(outside)
    for name, scores in {"inside": inside, "outside": outside}.items():
        if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
            raise ValueError(
                f"expected {name} scores of shape (n,), without NaN; got shape {scores.shape} with "
                f"{np.isnan(scores).sum()} NaN: leave out points whose solve failed"
            )
    above, below = _doubled_ranks(outside, inside), _doubled_ranks(inside, outside)
    pairs = 2 * len(inside) * len(outside)
    spread = [_variance_of_mean(above / (2 * len(inside)))]
    spread += [_variance_of_mean(below / (2 * len(outside)))]
    return Auroc(float(above.sum() / pairs), float(np.sqrt(sum(spread))))


def _doubled_ranks(scores, others):
    """Return twice the number of `others` below each score, ties counted half: whole numbers."""
    ordered = np.sort(others)
    sides = [np.searchsorted(ordered, scores, side) for side in ("left", "right")]
    return sides[0] + sides[1]


def _variance_of_mean(x):
    return np.var(x, ddof=1) / len(x) if len(x) > 1 else np.inf


def gaussian_nll(train: np.ndarray, test: np.ndarray) -> float:
    """Test NLL in nats of a full-covariance Gaussian fitted to `train`, the baseline to beat.

    It is NaN if the covariance is singular, because there is no density then.

    **Raises:** `ValueError` for shapes other than (rows, dim), and for rows that are not finite.
    """
    train, test = np.asarray(train, np.float64), np.asarray(test, np.float64)
    if train.ndim != 2 or train.shape[1:] != test.shape[1:] or not (len(train) and len(test)):
        raise ValueError(
            "expected train (n, dim) and test (m, dim), each with at least 1 row; got "
            f"{train.shape} and {test.shape}"
        )
    check_finite(train=train, test=test)
    covariance = np.atleast_2d(np.cov(train, rowvar=False, bias=True))
    if np.linalg.matrix_rank(covariance, hermitian=True) < len(covariance):
        return float("nan")
    factor = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(factor, (test - train.mean(0)).T)
    log_det = np.sum(np.log(np.diag(factor)))
    dim = train.shape[1]
    return float(np.mean(np.sum(whitened**2, 0)) / 2 + log_det + dim * np.log(2 * np.pi) / 2)
