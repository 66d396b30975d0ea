"""Choice of some rows out of many."""

import numpy as np


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """Return the indices of `count` evenly spaced rows out of `total`, or of all if fewer."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)
