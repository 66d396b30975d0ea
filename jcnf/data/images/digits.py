"""The 8x8 digits of scikit-learn, as images and as a table of 64 columns."""

from typing import Any, NamedTuple

import numpy as np

from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, Table

SIDE = 8
LEVELS = 17  # gray values 0 to 16


class Digits(NamedTuple):
    """One part of the digits: train, val or test."""

    pixels: np.ndarray  # uint8 (n, 64)
    labels: np.ndarray  # int (n,)
    noise: np.ndarray  # float64 (n, 64), uniform in [0, 1), to dequantize the table


def load_digits_parts() -> dict[str, Digits]:
    """Load the 1797 digits in three parts: train, val, test.

    Noise and split are always the same: test is a third of the digits, val a tenth of the rest.

    **Raises:** `InputError` if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits need scikit-learn: pip install scikit-learn") from None
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
    """Load the digits as (pixel + noise) / 17, standardized by the training part.

    **Raises:** `InputError` if scikit-learn is not installed.
    """
    parts = load_digits_parts().values()
    rows = [(part.pixels.astype(np.float64) + part.noise) / LEVELS for part in parts]
    columns = tuple(f"pixel{row}{column}" for row in range(SIDE) for column in range(SIDE))
    scale = Standardizer(rows[0].mean(axis=0), rows[0].std(axis=0), columns)
    return Table(*map(scale.standardize, rows), scale=scale, warnings=())
