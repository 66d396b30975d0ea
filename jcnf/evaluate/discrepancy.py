"""How far two samples are from coming from one distribution."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf import require

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
    require.finite(x=x, y=y)
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
