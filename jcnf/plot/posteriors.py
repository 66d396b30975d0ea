"""Figures of posteriors over two latent variables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from jcnf.plot import _style as c
from jcnf.plot._style import Figure


@c.styled
def posteriors(
    images: ArrayLike,
    shape: tuple[int, int, int],
    log_densities: ArrayLike,
    names: Sequence[str],
    views: Sequence[c.Extent],
) -> Figure:
    """Show images in a row, and below each image the densities of its two latents.

    **Arguments:**

    - `images`: gray images (n, dim) in [0, 1], flattened from `shape`.
    - `shape`: height, width and channels of an image.
    - `log_densities`: (n, kinds, m, m) on grids like those of `jcnf.evaluate.grid`, normalized or
      not. Each density is shown relative to its largest value.
    - `names`: the names of the kinds of densities.
    - `views`: the extent of each image's grid, (xmin, xmax, ymin, ymax).

    **Raises:** `ValueError` for shapes that do not agree.
    """
    images = c.array(images, "images", "(n, dim)", int(np.prod(shape)))
    logs = c.array(log_densities, "log_densities", "(n, kinds, m, m)")
    if len(logs) != len(images) or len(views) != len(logs) or len(names) != logs.shape[1]:
        raise ValueError(
            f"expected a grid and a view for each of {len(images)} images, and a name for each "
            f"kind; got grids {logs.shape}, {len(views)} views and {len(names)} names"
        )
    side = c.FIGURE_WIDTH / max(len(logs), 4)
    figure = c.new_figure(side * len(logs) + 0.3, side * (1 + len(names)))
    axes = figure.subplots(1 + len(names), len(logs), squeeze=False)
    for column, (image, kinds, view) in enumerate(zip(images, logs, views, strict=True)):
        axes[0, column].imshow(image.reshape(shape[:2]), "gray", vmin=0, vmax=1)
        axes[0, column].set_axis_off()
        for ax, log in zip(axes[1:, column], kinds, strict=True):
            density = np.exp(log - np.nanmax(log))
            ax.imshow(density, c.DENSITY_MAP, origin="lower", extent=view, vmin=0, vmax=1)
            ax.tick_params(labelsize=6)
    for ax, name in zip(axes[1:, 0], names, strict=True):
        ax.set_ylabel(name)
    return figure
