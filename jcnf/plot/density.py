"""Figures of densities and of tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from jcnf._checks import check_number
from jcnf.plot import _style as c
from jcnf.plot._style import DATA, FIGURE_WIDTH, MODEL, Extent, Figure

MAX_COLUMNS = 6


@c.styled
def densities(
    data: ArrayLike,
    samples: ArrayLike,
    log_density: ArrayLike,
    extent: Extent,
    *,
    title: str | None = None,
    true_log_density: ArrayLike | None = None,
    nats: float = 8.0,
) -> Figure:
    """Show data, samples and the model's log-density, and the true one if known, in one view.

    **Arguments:**

    - `data`, `samples`: (batch, 2).
    - `log_density`, `true_log_density`: (ny, nx) in nats; [i, j] is the cell in row i from below
      and column j of an even division of `extent`. NaN and +inf are shown in red and counted.
    - `extent`: e for the view [-e, e]^2, or (xmin, xmax, ymin, ymax).
    - `nats`: the common color scale reaches from the maximum of the densities to this far below;
      lower values, including -inf, have its lowest color.

    **Raises:** `ValueError` for wrong shapes, and for an `extent` or `nats` out of range.
    """
    box = c.box_of(extent, np.empty(0))
    check_number("(0, inf)", nats=nats)
    grids = {"model": c.array(log_density, "log_density", "(ny, nx)")}
    if true_log_density is not None:
        grids["true"] = c.array(true_log_density, "true_log_density", "(ny, nx)")
    if min(n for grid in grids.values() for n in grid.shape) < 2:
        shapes = [grid.shape for grid in grids.values()]
        raise ValueError(f"expected log-densities on grids of at least 2 x 2 points; got {shapes}")
    points, titles, images = c.both(data, samples, "(batch, 2)", 2), [], []
    clouds = [c.finite(x) for x in points.values()]
    for (name, every), kept in zip(points.items(), clouds, strict=True):
        titles.append([name, *c.notes("points", len(every), kept, *box)])
    for name, grid in grids.items():
        images.append(np.ma.masked_where(np.isnan(grid) | np.isposinf(grid), grid))
        bad = [f"{n:,} cells non-finite (red)"] if (n := np.ma.count_masked(images[-1])) else []
        titles.append([f"{name} log-density", f"cut {nats:g} nats below max", *bad])
    top = max(image.max(fill_value=-np.inf) for image in images)
    top = float(top) if np.isfinite(top) else 0.0

    number, lines = len(titles), max(map(len, titles)) + (1.3 if title else 0)
    tall = (box[1, 1] - box[0, 1]) / (box[1, 0] - box[0, 0])
    figure = c.new_figure(
        FIGURE_WIDTH, (FIGURE_WIDTH - 1.5) / number * tall + 0.45 + 0.16 * lines, "compressed"
    )
    axes = figure.subplots(1, number, sharex=True, sharey=True)
    c.clouds_in(axes[:2], clouds, [box, box], [DATA, MODEL])
    for ax, image in zip(axes[2:], images, strict=True):
        edges = box.T.ravel()
        scale = {"vmin": top - nats, "vmax": top, "cmap": c.DENSITY_MAP}
        ax.imshow(image.clip(top - nats), extent=edges, origin="lower", **scale)
        ax.set_facecolor(c.BROKEN)  # visible where the image is masked
    bar = {"extend": "min", "aspect": 25, "pad": 0.02, "label": "log-density (nats)"}
    figure.colorbar(axes[-1].images[0], ax=axes, **bar)
    for ax, text in zip(axes, titles, strict=True):
        ax.set(aspect="equal", xlim=box[:, 0], ylim=box[:, 1])
        ax.set(xlabel="$x_1$", title="\n".join(text))
    axes[0].set_ylabel("$x_2$")
    figure.suptitle(title or "", fontsize=11)
    return figure


@c.styled
def pairs(data: ArrayLike, samples: ArrayLike, columns: Sequence[str]) -> Figure:
    """Show a table's columns against each other: data below the diagonal, samples above.

    Limits follow the quantiles of the data, also for the samples. Scatter plots have as many points
    of one as of the other: of the larger table, evenly spaced rows are drawn. The diagonal has
    histograms of all rows of both on common bins.

    **Arguments:**

    - `data`, `samples`: (batch, columns).
    - `columns`: the names of the columns; the first 6 are drawn.

    **Raises:** `ValueError` for fewer than 2 columns, and for other shapes.
    """
    if len(columns) < 2:
        raise ValueError("expected the names of at least two columns: use histogram for one")
    tables = c.both(data, samples, f"(batch, {len(columns)})", len(columns))
    number = min(len(columns), MAX_COLUMNS)
    ours, theirs = (c.finite(x[:, :number]) for x in tables.values())
    limits = np.array([c.limits_of(x) for x in ours.T])
    notes = [f"first {number} of {len(columns)} columns"] if number < len(columns) else []
    for (name, every), kept in zip(tables.items(), (ours, theirs), strict=True):
        notes.append(f"{name}: {', '.join(c.notes('rows', len(every), kept, *limits.T))}")
    fewest = min(len(ours), len(theirs)) or max(len(ours), len(theirs))
    dots = [c.thin(x, fewest) for x in (ours, theirs)]
    if len(ours) != len(theirs):
        notes.append(f"scatter plots: {fewest:,} rows of each")
    side = min(FIGURE_WIDTH, 1.9 * number + 0.6)
    figure = c.new_figure(side, side)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(number, number, sharex="col")
    for i in range(number):
        c.histograms_in(axes[i, i], ours[:, i], theirs[:, i], limits[i])
        for j in range(i):
            clouds, boxes = (
                [dots[0][:, [j, i]], dots[1][:, [i, j]]],
                [limits[[j, i]].T, limits[[i, j]].T],
            )
            c.clouds_in([axes[i, j], axes[j, i]], clouds, boxes, [DATA, MODEL])
        axes[i, 0].set_ylabel(columns[i])
        axes[-1, i].set_xlabel(columns[i])
    for i, j in np.ndindex(number, number):
        scale = j == 0 and i > 0  # the first row shows its scale on the right
        axes[i, j].tick_params(left=scale, labelleft=scale)
    axes[0, -1].tick_params(right=True, labelright=True)
    figure.suptitle("\n".join(notes))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
