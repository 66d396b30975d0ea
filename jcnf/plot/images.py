"""Images in rows and columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from jcnf.plot import _style as c
from jcnf.plot._style import Figure

WIDTH_PER_COLUMN = 0.44  # inches
LETTERS_PER_INCH = 11  # of a title


@c.styled
def image_grid(
    groups: Sequence[tuple[str, ArrayLike]], shape: tuple[int, int, int], columns: int = 10
) -> Figure:
    """Show groups of images side by side, each group in rows of `columns` images.

    **Arguments:**

    - `groups`: pairs of a title and images (n, dim) in [0, 1], flattened in the order height,
      width, channels. Values outside [0, 1] are clipped; an image with NaN or inf is shown in red
      and counted in the title.
    - `shape`: height, width and channels (1 or 3) of an image.
    - `columns`: images in a row of each group.

    **Raises:** `ValueError` for no groups, columns or images, and for images of another shape.
    """
    if not groups or columns < 1:
        raise ValueError(f"expected groups and columns >= 1; got {len(groups)} groups, {columns=}")
    arrays = [c.array(x, "images", "(n, dim)") for _, x in groups]
    sheets = [_sheet(x, shape, columns) for x in arrays]
    width = WIDTH_PER_COLUMN * columns
    height = max(len(sheet) / sheet.shape[1] for sheet in sheets) * width
    figure = c.new_figure(len(groups) * width + 0.1, height + 0.4)
    for ax, sheet, x, (title, _) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], sheets, arrays, groups, strict=True
    ):
        ax.imshow(sheet, interpolation="nearest")
        ax.set(anchor="N")
        broken = np.count_nonzero(_broken(x))
        title += f", {broken:,} non-finite (red)" if broken else ""
        ax.set_title(textwrap.fill(title, int(LETTERS_PER_INCH * width)))
        ax.set_axis_off()
    return figure


def _broken(x):
    return ~np.isfinite(x).all(axis=1)


def _sheet(x, shape, columns):
    """Arrange all images in one RGB image (height, width, 3)."""
    if len(shape) != 3 or x.shape[1] != math.prod(shape) or shape[2] not in (1, 3) or not len(x):
        raise ValueError(
            f"expected images (n, height * width * channels) with 1 or 3 channels; got {x.shape} "
            f"for shape={shape}"
        )
    height = shape[0]
    images = np.clip(x, 0, 1).reshape(-1, *shape) * np.ones(3)
    images[_broken(x)] = (1, 0, 0)
    rows = -(-len(x) // columns)
    # Each image is followed by a white pixel on its right and below it.
    padding = (0, rows * columns - len(x)), (0, 1), (0, 1), (0, 0)
    cells = np.pad(images, padding, constant_values=1).reshape(rows, columns, height + 1, -1, 3)
    return cells.swapaxes(1, 2).reshape(rows * (height + 1), -1, 3)[:-1, :-1]
