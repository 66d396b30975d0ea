"""Grey values, which are whole, and densities, which are of reals."""

import math
from typing import TypeVar

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from jcnf import require

Nats = TypeVar("Nats", float, np.ndarray, Array)


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
    require.whole(levels=levels)
    require.one_key(key)
    u = jr.uniform(key, pixels.shape)
    whole = pixels.astype(u.dtype)
    return jnp.minimum(whole + u, jnp.nextafter(whole + 1, whole)) / levels


def bits_per_dim(log_prob: Nats, dim: int, levels: int) -> Nats:
    """-(log_prob / dim - log levels) / log 2, in bits a dimension; elementwise.

    `log_prob` is in nats, of x = (pixel + u) / `levels` in [0, 1]^dim as `dequantise` makes it. In
    its mean over u this is an upper bound of -log2 P(pixels) / dim, the length of a code for the
    grey values under the model P(pixels) that the density's integral over the pixels' cell is
    (Theis, van den Oord and Bethge 2016, "A note on the evaluation of generative models",
    section 3.1). The uniform density on [0, 1]^dim gives log2 levels.
    """
    require.whole(dim=dim, levels=levels)
    return -(log_prob / dim - math.log(levels)) / math.log(2)
