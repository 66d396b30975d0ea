"""A figure of rotations of space, by the directions of three axes."""

from __future__ import annotations

from jax.typing import ArrayLike

from jcnf.plot import _style as c
from jcnf.plot._style import DATA, FIGURE_WIDTH, MODEL, Figure
from jcnf.plot.sphere import equal_area_view, outline_in, points_in


@c.styled
def rotations(data: ArrayLike, samples: ArrayLike, *, title: str | None = None) -> Figure:
    """Show where rotations take the three axes of a body, on maps of directions.

    A column has the directions of one axis, which are that column of the matrices. The maps are
    those of `jcnf.plot.world_map`: equal areas are equal, the third coordinate points up, and the
    first one to the middle.

    **Arguments:**

    - `data`, `samples`: rotation matrices row by row, (batch, 9).
    - `title`: a title of the whole figure.

    **Raises:** `ValueError` for wrong shapes.
    """
    tables = c.both(data, samples, "(batch, 9)", 9)
    view, size = equal_area_view(0.0, 0.0), (FIGURE_WIDTH, FIGURE_WIDTH / 3 + 0.6)
    figure = c.new_figure(*size, "compressed")
    axes = figure.subplots(2, 3)
    for row, (name, every), color in zip(axes, tables.items(), (DATA, MODEL), strict=True):
        kept = c.finite(every)
        drawn = c.thin(kept, c.MAX_DOTS).reshape(-1, 3, 3)
        lost = len(every) - len(kept)
        shown = f"\n{len(drawn):,} drawn" if len(drawn) < len(kept) else ""
        shown += f"\n{lost:,} non-finite dropped" if lost else ""
        for i, ax in enumerate(row):
            outline_in(ax, view)
            points_in(ax, view, drawn[:, :, i], color)
        row[0].text(
            *(-0.02, 0.5, f"{name}\n{len(kept):,} rotations{shown}"),
            **{"rotation": 90, "va": "center", "ha": "right", "transform": row[0].transAxes},
        )
    for ax, number in zip(axes[0], ("first", "second", "third"), strict=True):
        ax.set_title(f"{number} axis")
    figure.suptitle(title or "", fontsize=11)
    return figure
