"""The 8x8 digits that scikit-learn brings along, as a table of 64 columns."""

import numpy as np

from jcnf.data.tables import Standardizer, Table
from jcnf.errors import InputError

SIDE = 8
LEVELS = 17  # grey values 0 to 16


def load_digits_table() -> Table:
    """1797 digits as (pixel + u) / 17, u uniform in [0, 1), standardized by the training part.

    Noise and split are always the same: a third is the test part, a tenth of the rest validation.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits come with scikit-learn: pip install scikit-learn") from None
    pixels = np.asarray(load_digits(return_X_y=True)[0], np.float64)
    rng = np.random.default_rng(0)
    rows = rng.permutation((pixels + rng.random(pixels.shape)) / LEVELS)
    test, rest = np.split(rows, [len(rows) // 3])
    val, train = np.split(rest, [len(rest) // 10])
    columns = tuple(f"pixel{row}{column}" for row in range(SIDE) for column in range(SIDE))
    scale = Standardizer(train.mean(axis=0), train.std(axis=0), columns)
    parts = (scale.standardize(part) for part in (train, val, test))
    return Table(*parts, scale=scale, warnings=())
