"""Pictures of flows: arrays in, a matplotlib `Figure` out; nothing here computes a flow.

Time t = 0 is the base, t = 1 the data. matplotlib is imported inside the functions, without pyplot
and without global state; the caller saves (`figure.savefig(path)`), except for the GIF, which is
written whole or not at all. Views follow robust quantiles, so that an outlier does not squash a
picture, and titles count what a panel leaves out: rows with a NaN or an infinity, and points
outside the view. Everywhere data are blue, samples of the model vermilion, the base grey. Arrays
are numpy's or jax's; a wrong shape raises ValueError.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jcnf import _canvas as c
from jcnf import require
from jcnf._canvas import BASE, DATA, MODEL, WIDTH, Extent, Figure

MAX_PATHS, MAX_COLUMNS = 300, 6
CURVES = {  # key of a record: (title with units, smoothed beside the raw line, logarithmic)
    "loss": ("training loss ({})", True, False),
    "val_nll": ("validation NLL (nats)", False, False),
    "val_bits": ("validation bits/dim", False, False),
    "val_kl": ("validation KL (nats)", False, True),
    "val_negative_elbo": ("validation $-$ELBO (nats)", False, False),
    "train_nll": ("NLL of all points (nats)", False, False),
    "train_rmse": ("RMSE of windows", False, True),
    "nfe": ("field evaluations (NFE)", False, False),
    "step_ms": ("time per step (ms)", True, False),
    "grad_norm": ("gradient norm", True, True),
    "skipped": ("skipped steps", False, False),
}


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

    data, samples: (batch, 2). log_density, true_log_density: (ny, nx) in nats, [i, j] for the cell
    in row i from below and column j of an even division of `extent`. One scale reaches `nats`
    below the maximum of the densities; what is lower, -inf too, gets its lowest colour; NaN and
    +inf are red and counted.
    """
    box = c.box_of(extent, np.empty(0))
    require.number("(0, inf)", nats=nats)
    grids = {"model": c.array(log_density, "log_density", "(ny, nx)")}
    if true_log_density is not None:
        grids["true"] = c.array(true_log_density, "true_log_density", "(ny, nx)")
    if min(n for grid in grids.values() for n in grid.shape) < 2:
        raise ValueError("expected log-densities on grids of at least 2 x 2 points")
    points, titles, images = c.both(data, samples, "(batch, 2)", 2), [], []
    clouds = [c.finite(x) for x in points.values()]
    for (name, every), kept in zip(points.items(), clouds, strict=True):
        titles.append([name, *c.notes("points", len(every), kept, *box)])
    for name, grid in grids.items():
        images.append(np.ma.masked_where(np.isnan(grid) | np.isposinf(grid), grid))
        bad = [f"{n:,} non-finite (red)"] if (n := np.ma.count_masked(images[-1])) else []
        titles.append([f"{name} log-density", f"cut {nats:g} nats below max", *bad])
    top = max(image.max(fill_value=-np.inf) for image in images)
    top = float(top) if np.isfinite(top) else 0.0

    number, lines = len(titles), max(map(len, titles)) + (1.3 if title else 0)
    tall = (box[1, 1] - box[0, 1]) / (box[1, 0] - box[0, 0])
    figure = c.new_figure(WIDTH, (WIDTH - 1.5) / number * tall + 0.45 + 0.16 * lines, "compressed")
    axes = figure.subplots(1, number, sharex=True, sharey=True)
    c.clouds_in(axes[:2], clouds, [box, box], [DATA, MODEL])
    for ax, image in zip(axes[2:], images, strict=True):
        edges = box.T.ravel()
        scale = {"vmin": top - nats, "vmax": top, "cmap": "viridis"}
        ax.imshow(image.clip(top - nats), extent=edges, origin="lower", **scale)
        ax.set_facecolor("#CC3311")  # seen where the image is masked
    bar = {"extend": "min", "aspect": 25, "pad": 0.02, "label": "log-density (nats)"}
    figure.colorbar(axes[-1].images[0], ax=axes, **bar)
    for ax, text in zip(axes, titles, strict=True):
        ax.set(aspect="equal", xlim=box[:, 0], ylim=box[:, 1])
        ax.set(xlabel="$x_1$", title="\n".join(text))
    axes[0].set_ylabel("$x_2$")
    figure.suptitle(title or "", fontsize=11)
    return figure


@c.styled
def trajectories(paths: ArrayLike, times: ArrayLike, *, extent: Extent | None = None) -> Figure:
    """Show the particles' paths from the base (grey) to the data's end (vermilion).

    paths: (times, batch, 2); times: (times,), rising or falling. At most 300 paths, evenly spaced
    over the batch, are drawn; a path that is non-finite anywhere is dropped and counted.
    """
    from matplotlib.collections import LineCollection

    every, times = c.check_paths(paths, times)
    kept = c.finite(every.transpose(1, 0, 2))
    lines = c.thin(kept, MAX_PATHS)
    box = c.box_of(extent, lines)
    shown = np.clip(lines, 21 * box[0] - 20 * box[1], 21 * box[1] - 20 * box[0])  # for Agg's sake
    figure = c.new_figure(6.0, 6.0)
    ax = figure.subplots()
    ax.add_collection(LineCollection(list(shown), colors="black", alpha=0.25, linewidths=0.5))
    for end, colour, name in ((0, BASE, "base"), (-1, MODEL, "data end")):
        label = f"t = {times[end]:g}, {name}"
        ax.scatter(*shown[:, end].T, s=9, color=colour, linewidths=0, zorder=3, label=label)
    notes = c.notes("paths", len(lines) + every.shape[1] - len(kept), lines, *box)
    if len(lines) < len(kept):
        notes[0] = f"{len(lines):,} of {every.shape[1]:,} paths"
    ax.set(title=", ".join(notes), xlabel="$x_1$", ylabel="$x_2$")
    ax.set(aspect="equal", xlim=box[:, 0], ylim=box[:, 1])
    figure.legend(loc="outside lower center", ncols=2, markerscale=1.5)
    return figure


@c.styled
def snapshots(paths: ArrayLike, times: ArrayLike, *, extent: Extent | None = None) -> Figure:
    """Show the particles at the five saved times that are nearest to evenly spaced ones.

    paths: (times, batch, 2); times: (times,), rising or falling; drawn base first, in one view.
    """
    every, times = c.check_paths(paths, times)
    wanted = np.linspace(times[0], times[-1], 5)
    chosen = np.unique(np.abs(times[:, None] - wanted).argmin(axis=0))
    number, clouds = len(chosen), [c.finite(x) for x in every[chosen]]
    box = c.box_of(extent, np.concatenate(clouds))
    notes = [c.notes("points", every.shape[1], x, *box) for x in clouds]
    height = (WIDTH - 0.5) / number + 0.45 + 0.16 * max(map(len, notes))
    figure = c.new_figure(WIDTH, height, "compressed")
    axes = figure.subplots(1, number, sharex=True, sharey=True, squeeze=False)[0]
    c.clouds_in(axes, clouds, [box] * number, [BASE, *[MODEL] * (number - 1)])
    for ax, t, note in zip(axes, times[chosen], notes, strict=True):
        ax.set(aspect="equal", xlabel="$x_1$")
        ax.set_title("\n".join([f"t = {t:.2f}", *note]), fontsize=8)
        ax.locator_params(nbins=5, steps=[1, 2, 5, 10])
    axes[0].set_ylabel("$x_2$")
    return figure


def animation(
    path: str | os.PathLike[str],
    paths: ArrayLike,
    times: ArrayLike,
    *,
    extent: Extent | None = None,
    fps: int = 20,
) -> Path:
    """Write a GIF of the base turning into data, a frame for each time, and return its path.

    paths: (times, batch, 2); times: (times,), rising or falling. The last frame stays for 1.5 s. At
    most 5,000 particles are drawn; those that are non-finite anywhere are dropped and counted. The
    file is written beside `path`, then moved there. Raises OSError where that cannot be done.
    """
    require.number("(0, inf)", fps=fps)
    every, times = c.check_paths(paths, times)
    kept = c.finite(every.transpose(1, 0, 2))
    drawn = c.thin(kept, c.MAX_DOTS)
    box = c.box_of(extent, drawn)
    lost = every.shape[1] - len(kept)
    note = "\n".join(c.notes("particles", len(drawn) + lost, drawn, *box))
    frames = c.film(drawn, times, box, note)
    return c.save_gif(path, frames, fps)


@c.styled
def training_curves(records: Sequence[Mapping[str, Any]], *, loss_units: str = "nats") -> Figure:
    """Show what a run logged against its steps: a panel for each key of `CURVES` that occurs.

    records: the lines of metrics.jsonl, each with "step"; keys that are absent, null or unknown
    are passed over. Records of one step are merged, the later winning, as after a resume. Raises
    ValueError where a record has no step or none has a known key.
    """
    merged: dict[float, dict[str, Any]] = {}
    for record in records:
        if "step" not in record:
            raise ValueError(f'expected "step" in each record; got only {sorted(record)}')
        merged.setdefault(record["step"], {}).update(record)
    rows = [merged[step] for step in sorted(merged)]
    keys = [key for key in CURVES if any(row.get(key) is not None for row in rows)]
    if not keys:
        raise ValueError(f"no curve to draw: log one of {', '.join(CURVES)} in some record")
    columns = len(keys) if len(keys) < 4 else -(-len(keys) // 2)
    lines = -(-len(keys) // columns)
    figure = c.new_figure(WIDTH, 2.3 * lines + 0.2)
    axes = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
    for ax in axes[len(keys) :]:
        ax.remove()
    for place, (ax, key) in enumerate(zip(axes, keys, strict=False)):
        name, smooth, logarithmic = CURVES[key]
        every = np.array([[r["step"], r[key]] for r in rows if r.get(key) is not None], np.float64)
        kept = c.finite(every)
        x, y = kept.T
        half = len(y) // 40 if smooth else 0
        raw: Any = {"lw": 0.6, "alpha": 0.6} if half else {"marker": "." if len(y) < 60 else ""}
        ax.plot(x, y, color=DATA, label="logged", **raw)
        if half:
            windows = np.lib.stride_tricks.sliding_window_view(y, 2 * half + 1)
            label = f"median of {2 * half + 1}"
            ax.plot(x[half:-half], np.median(windows, axis=1), color=DATA, label=label)
            ax.legend()
        logarithmic = logarithmic and bool((y > 0).all())
        low, high = np.exp(c.limits_of(np.log(y))) if logarithmic else c.limits_of(y)
        notes = c.notes("", len(every), kept, [-np.inf, low], [np.inf, high])[1:]
        ax.set(yscale="log" if logarithmic else "linear", ylim=(low, high))
        ax.set_title("\n".join([name.format(loss_units), *notes]))
        if place + columns >= len(keys):
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("step")
    return figure


@c.styled
def pairs(data: ArrayLike, samples: ArrayLike, columns: Sequence[str]) -> Figure:
    """Show a table's columns against each other: data below the diagonal, samples above.

    data, samples: (batch, columns); columns: their names, of which the first 6 are drawn. Limits
    follow the data's quantiles and hold for both; the diagonal has densities on common bins.
    """
    if len(columns) < 2:
        raise ValueError("expected the names of two columns or more: draw one with histogram")
    tables = c.both(data, samples, f"(batch, {len(columns)})", len(columns))
    number = min(len(columns), MAX_COLUMNS)
    ours, theirs = (c.finite(x[:, :number]) for x in tables.values())
    limits = np.array([c.limits_of(x) for x in ours.T])
    notes = [f"first {number} of {len(columns)} columns"] if number < len(columns) else []
    for (name, every), kept in zip(tables.items(), (ours, theirs), strict=True):
        notes.append(f"{name}: {', '.join(c.notes('rows', len(every), kept, *limits.T))}")
    side = min(WIDTH, 1.9 * number + 0.6)
    figure = c.new_figure(side, side)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(number, number, sharex="col")
    for i in range(number):
        c.histograms_in(axes[i, i], ours[:, i], theirs[:, i], limits[i])
        for j in range(i):
            clouds, boxes = (
                [ours[:, [j, i]], theirs[:, [i, j]]],
                [limits[[j, i]].T, limits[[i, j]].T],
            )
            c.clouds_in([axes[i, j], axes[j, i]], clouds, boxes, [DATA, MODEL])
        axes[i, 0].set_ylabel(columns[i])
        axes[-1, i].set_xlabel(columns[i])
    for i, j in np.ndindex(number, number):
        scale = j == 0 and i > 0  # the diagonal is a density: the first row's scale is on the right
        axes[i, j].tick_params(left=scale, labelleft=scale)
    axes[0, -1].tick_params(right=True, labelright=True)
    figure.suptitle("\n".join(notes))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@c.styled
def histogram(
    data: ArrayLike,
    samples: ArrayLike,
    grid: ArrayLike | None = None,
    density: ArrayLike | None = None,
    column: str | None = None,
) -> Figure:
    """Show one column of data and samples on common bins, and the model's density if given.

    data, samples: (batch,) or (batch, 1); grid, density: (points,), the density itself, not its
    logarithm, per unit of the column; column: its name.
    """
    data, samples = (np.asarray(x) for x in (data, samples))
    data, samples = (x[:, 0] if x.shape[1:] == (1,) else x for x in (data, samples))
    tables = c.both(data, samples, "(batch,)")
    ours, theirs = (c.finite(x) for x in tables.values())
    limits, notes = c.limits_of(ours), []
    for (name, every), kept in zip(tables.items(), (ours, theirs), strict=True):
        notes.append(f"{name}: {', '.join(c.notes('values', len(every), kept, *limits))}")
    figure = c.new_figure(6.0, 3.8)
    ax = figure.subplots()
    c.histograms_in(ax, ours, theirs, limits)
    if grid is not None or density is not None:
        if grid is None or density is None or np.shape(grid) != np.shape(density):
            raise ValueError("expected grid and density together, both of shape (points,)")
        curve = np.stack([c.array(x, "grid", "(points,)") for x in (grid, density)], axis=1)
        kept = c.finite(curve[np.argsort(curve[:, 0])])
        ax.plot(*kept.T, color="black", lw=1.2, label="model density")
        if len(kept) < len(curve):
            notes.append(f"density: {len(curve) - len(kept):,} non-finite dropped")
    ax.set(title="\n".join(notes), xlabel=column or "$x$", ylabel="density")
    ax.set_ylim(bottom=0)
    ax.legend()
    return figure
