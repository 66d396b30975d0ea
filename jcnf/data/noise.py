"""Pictures of nothing, to hold against those of something."""

import numpy as np
from jaxtyping import UInt8

from jcnf._checks import check_int


def uniform_noise(
    rng: np.random.Generator, n: int, dim: int, levels: int
) -> UInt8[np.ndarray, "n dim"]:
    """Pixels that are independent and uniform over the grey values 0 to `levels` - 1."""
    check_int(n=n, dim=dim)
    check_int(1, 256, levels=levels)
    return rng.integers(levels, size=(n, dim), dtype=np.uint8)


def shuffled(
    rng: np.random.Generator, pixels: UInt8[np.ndarray, "n dim"]
) -> UInt8[np.ndarray, "n dim"]:
    """Each picture's pixels by a permutation of its own: its grey values without its form.

    The values of all channels are shuffled together.
    """
    return rng.permuted(pixels, axis=1)
