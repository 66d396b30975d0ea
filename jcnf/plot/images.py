"""Galleries: pictures in rows and columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from jcnf.plot import _style as c

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # a name that run-time type checkers can resolve without matplotlib

GAP = 1  # pixels between pictures
BREADTH = 4.4  # inches of a gallery of ten columns


@c.styled
def gallery(
    groups: Sequence[tuple[str, ArrayLike]], shape: tuple[int, int, int], columns: int = 10
) -> Figure:
    """Show groups of pictures side by side, each in rows of `columns`.

    groups: a title and pictures (n, dim) in [0, 1], flattened in the order height, width, channels
    of `shape`. What is outside [0, 1] is cut off there; a picture that is not finite is red.

    **Raises:** `ValueError` for no groups, columns or pictures, and for those of another shape.
    """
    if not groups or columns < 1:
        raise ValueError(f"give groups of pictures and columns; got {len(groups)} and {columns}")
    sheets = [_sheet(c.array(x, "pictures", "(n, dim)"), shape, columns) for _, x in groups]
    scale = BREADTH * columns / 10 / sheets[0].shape[1]
    heights = max(len(sheet) for sheet in sheets) * scale
    figure = c.new_figure(len(groups) * BREADTH * columns / 10 + 0.1, heights + 0.4)
    for ax, sheet, (title, _) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], sheets, groups, strict=True
    ):
        ax.imshow(sheet, interpolation="nearest")
        # About eleven letters an inch.
        ax.set(anchor="N")
        ax.set_title(textwrap.fill(title, int(11 * BREADTH * columns / 10)))
        ax.set_axis_off()
    return figure


def _sheet(x, shape, columns):
    """One RGB picture (height, width, 3) of all of them."""
    if len(shape) != 3 or x.shape[1] != math.prod(shape) or shape[2] not in (1, 3) or not len(x):
        raise ValueError(
            f"expected pictures (n, height * width * channels) with 1 or 3 channels; got {x.shape} "
            f"for {shape}"
        )
    height, width, _ = shape
    pictures = np.clip(x, 0, 1).reshape(-1, *shape) * np.ones(3)
    pictures[~np.isfinite(x).all(axis=1)] = (1, 0, 0)
    rows = -(-len(x) // columns)
    sheet = np.ones((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3))
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet
