"""Images of noise, as a baseline for the scores of real images."""

import numpy as np
from jaxtyping import UInt8

from jcnf._checks import check_int


def uniform_noise(
    rng: np.random.Generator, n: int, dim: int, levels: int
) -> UInt8[np.ndarray, "n dim"]:
    """Draw pixels that are independent and uniform over the gray values 0 to `levels` - 1."""
    check_int(n=n, dim=dim)
    check_int(1, 256, levels=levels)
    return rng.integers(levels, size=(n, dim), dtype=np.uint8)


def shuffled(
    rng: np.random.Generator, pixels: UInt8[np.ndarray, "n dim"]
) -> UInt8[np.ndarray, "n dim"]:
    """Permute the pixels of each image independently: it keeps its gray values, not its shapes.

    The values of all channels are shuffled together.
    """
    return rng.permuted(pixels, axis=1)
