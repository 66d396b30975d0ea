"""The 8x8 digits that scikit-learn brings along, as pictures and as a table of 64 columns."""

from typing import Any, NamedTuple

import numpy as np

from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, Table

SIDE = 8
LEVELS = 17  # grey values 0 to 16


class Digits(NamedTuple):
    """One of the three parts."""

    pixels: np.ndarray  # uint8 (n, 64)
    labels: np.ndarray  # int (n,)
    noise: np.ndarray  # float64 (n, 64), uniform in [0, 1): what the table is dequantised by


def load_digits_parts() -> dict[str, Digits]:
    """1797 digits by part: train, val, test.

    Noise and split are always the same: a third is the test part, a tenth of the rest validation.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install scikit-learn") from None
    loaded: Any = load_digits()
    pixels, labels = loaded.data, loaded.target
    rng = np.random.default_rng(0)
    noise, order = rng.random(pixels.shape), rng.permutation(len(pixels))
    test, rest = np.split(order, [len(order) // 3])
    val, train = np.split(rest, [len(rest) // 10])
    pixels = pixels.astype(np.uint8)
    return {
        part: Digits(pixels[rows], labels[rows], noise[rows])
        for part, rows in {"train": train, "val": val, "test": test}.items()
    }


def load_digits_table() -> Table:
    """The digits as (pixel + noise) / 17, standardized by the training part; raises the same."""
    parts = load_digits_parts().values()
    rows = [(part.pixels.astype(np.float64) + part.noise) / LEVELS for part in parts]
    columns = tuple(f"pixel{row}{column}" for row in range(SIDE) for column in range(SIDE))
    scale = Standardizer(rows[0].mean(axis=0), rows[0].std(axis=0), columns)
    return Table(*map(scale.standardize, rows), scale=scale, warnings=())
