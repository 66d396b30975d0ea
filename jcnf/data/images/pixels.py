"""Grey values, which are whole, and densities, which are of reals."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Integer, Key

from jcnf._checks import check_int, check_key


def dequantise(
    key: Key[Array, ""], pixels: Integer[Array, "*shape"], levels: int
) -> Float[Array, "*shape"]:
    """x = (pixel + u) / levels in [0, 1), with u uniform in [0, 1); consumes `key`.

    The mean log-density of x bounds that of the grey values from below: see `bits_per_dim`.
    `pixels` are whole numbers from 0 to `levels` - 1. Rounding never takes x to the next grey value
    or to 1, so that floor(`levels` x) is the pixel (but for rounding of x where `levels` is no
    power of two).

    **Raises:** `ValueError` for pixels that are not of a type of whole numbers, and no levels.
    """
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        raise ValueError(
            f"expected pixels of a type of whole numbers; got {pixels.dtype}: they are grey values "
            f"0 to {levels - 1}, not yet scaled"
        )
    check_int(levels=levels)
    check_key(key)
    u = jr.uniform(key, pixels.shape)
    whole = pixels.astype(u.dtype)
    return jnp.minimum(whole + u, jnp.nextafter(whole + 1, whole)) / levels
