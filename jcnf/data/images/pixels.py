"""Dequantizing: from whole gray values to real numbers, which can have a density."""

import jax.numpy as jnp
import jax.random as jr
from jax.core import Tracer
from jaxtyping import Array, Float, Integer, Key

from jcnf._checks import check_int, check_key


def dequantize(
    key: Key[Array, ""], pixels: Integer[Array, "*shape"], levels: int
) -> Float[Array, "*shape"]:
    """Return x = (pixel + u) / levels in [0, 1), with u uniform in [0, 1); consumes `key`.

    `pixels` are whole numbers from 0 to `levels` - 1. The mean log-density of x minus
    dim log `levels` is a lower bound on the log-probability of the gray values: see
    `bits_per_dim`. Rounding never moves x to the next gray value or to 1, so floor(`levels` x) is
    the pixel (exactly if `levels` is a power of two, otherwise up to rounding of x).

    **Raises:** `ValueError` for pixels that are not of an integer type, or `levels` below 1; and,
    outside compiled functions, for pixels that are not from 0 to `levels` - 1.
    """
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        raise ValueError(
            f"expected pixels of an integer type; got {pixels.dtype}: pass gray values from 0 to "
            f"{levels - 1}, not scaled ones"
        )
    check_int(levels=levels)
    check_key(key)
    if not isinstance(pixels, Tracer) and pixels.size:
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high >= levels:
            raise ValueError(
                f"expected pixels from 0 to {levels - 1}, for {levels} levels; got {low} to "
                f"{high}: pass the number of gray values, such as levels={high + 1}"
            )
    u = jr.uniform(key, pixels.shape)
    whole = pixels.astype(u.dtype)
    return jnp.minimum(whole + u, jnp.nextafter(whole + 1, whole)) / levels
