"""Trajectories fitted to observations (over training, against time), and paths of particles.

Data are blue, learned trajectories vermilion, and the true one gray. Views of fitted trajectories
follow the data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jcnf._checks import check_int
from jcnf.plot import _style as c
from jcnf.plot._style import BASE, DATA, FIGURE_WIDTH, MODEL, Extent, Figure

CURVES_PER_ROW = 4
MAX_PATHS = 100
GIF_SIZE = 3.4, 3.6  # inches


class Scene(NamedTuple):
    """The background of learned curves: data and, if known, the true curve."""

    data: ArrayLike  # (batch, 2)
    truth: ArrayLike | None = None  # the true curve, (points, 2)
    labels: tuple[str, str] = ("$x_1$", "$x_2$")
    equal: bool = True  # one scale for both axes


@c.styled
def learning(curves: ArrayLike, titles: Sequence[str], scene: Scene) -> Figure:
    """Show each of the curves (curves, times, 2), for example over training, in a panel."""
    every = _curves(curves, titles)
    columns = min(len(every), CURVES_PER_ROW)
    lines = -(-len(every) // columns)
    side = FIGURE_WIDTH / CURVES_PER_ROW
    figure = c.new_figure(max(side * columns, 2 * side), (side + 0.2) * lines + 0.4)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, curve, title in zip(axes, every, titles, strict=False):
        _draw(ax, scene)
        ax.plot(*_near(ax, curve).T, color=MODEL, lw=1.2, label="learned")
        ax.set_title(title)
    for ax in axes[len(every) :]:
        ax.remove()
    for place, ax in enumerate(axes[: len(every)]):
        if place + columns >= len(every):
            ax.tick_params(labelbottom=True)
        ax.label_outer(remove_inner_ticks=False)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3)
    return figure


@c.styled
def against_time(
    times: ArrayLike,
    curve: ArrayLike,
    data_times: ArrayLike,
    data: ArrayLike,
    columns: Sequence[str],
    *,
    truth: ArrayLike | None = None,
    held_out: int = 0,
    title: str = "",
) -> Figure:
    """Show each component of a learned curve against time, with the data.

    **Arguments:**

    - `times`: (times,), the times of `curve` and `truth`.
    - `curve`, `truth`: (times, dim), the learned curve and, if known, the true one.
    - `data_times`, `data`: (batch,) and (batch, dim), the observations.
    - `columns`: the names of the time and of the components.
    - `held_out`: number of last observations that were held out; they have open markers.

    **Raises:** `ValueError` for shapes that do not agree.
    """
    x, t = c.array(data, "data", "(batch, dim)"), c.array(data_times, "data_times", "(batch,)")
    grid, line = c.array(times, "times", "(times,)"), c.array(curve, "curve", "(times, dim)")
    if (
        len(t) != len(x)
        or len(grid) != len(line)
        or not x.shape[1] == line.shape[1] == len(columns) - 1
    ):
        raise ValueError(
            "expected a time for each row, and a name for the time and for each component; got "
            f"{len(t)} times for data {x.shape}, {len(grid)} for a curve {line.shape}, and "
            f"{len(columns)} names"
        )
    dim, known = x.shape[1], len(x) - held_out
    figure = c.new_figure(FIGURE_WIDTH, 1.6 * dim + 0.9)
    for i, ax in enumerate(figure.subplots(dim, 1, sharex=True, squeeze=False)[:, 0]):
        if truth is not None:
            true = c.array(truth, "truth", "(times, dim)", dim)
            ax.plot(grid, true[:, i], color=BASE, lw=2.5, alpha=0.6, label="truth")
        style: Any = {"ls": "", "marker": "o", "ms": 3, "color": DATA}
        ax.plot(t[:known], x[:known, i], **style, label="data")
        if held_out:
            ax.plot(t[known:], x[known:, i], **style | {"mfc": "none"}, label="held out")
        ax.plot(grid, line[:, i], color=MODEL, lw=1.2, label="learned")
        ax.set(ylabel=columns[i + 1], ylim=c.limits_of(x[:, i]))
    figure.axes[-1].set_xlabel(columns[0])
    figure.suptitle(title)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    return figure


def learning_animation(
    path: str | os.PathLike[str],
    curves: ArrayLike,
    titles: Sequence[str],
    scene: Scene,
    *,
    fps: int = 8,
) -> Path:
    """Write a GIF with a frame for each of the curves, as in `learning`, and return its path.

    The last frame stays a second longer. A file next to `path` is written first, then moved.
    """
    import matplotlib

    check_int(fps=fps)
    every = _curves(curves, titles)
    with matplotlib.rc_context(c.RC):
        figure = c.new_figure(*GIF_SIZE)
        ax = figure.subplots()
        _draw(ax, scene)
        (line,) = ax.plot([], color=MODEL, lw=1.2)

        def draw(i):
            ax.set_title(titles[i])
            line.set_data(*_near(ax, every[i]).T)

        return c.save_gif(path, figure, draw, len(every), fps)


def _curves(curves, titles):
    every = c.array(curves, "curves", "(curves, times, 2)", 2)
    if not len(every) or len(titles) != len(every):
        raise ValueError(f"expected a title for each of {len(every)} curves; got {len(titles)}")
    return every


def _draw(ax, scene):
    """Draw the data and the true curve, and set the view around the data."""
    data = c.finite(c.array(scene.data, "data", "(batch, 2)", 2))
    if scene.truth is not None:
        truth = c.array(scene.truth, "truth", "(points, 2)", 2)
        ax.plot(*truth.T, color=BASE, lw=2.5, alpha=0.6, label="truth")
    ax.plot(*data.T, ls="", marker="o", ms=2.5, color=DATA, label="data")
    box = c.box_of(None, data) if scene.equal else np.array([c.limits_of(x) for x in data.T]).T
    ax.set(xlim=box[:, 0], ylim=box[:, 1], xlabel=scene.labels[0], ylabel=scene.labels[1])
    ax.set_aspect("equal" if scene.equal else "auto")


def _near(ax, curve):
    """Clip the curve far outside the view, because Agg cannot draw huge coordinates."""
    low, high = np.array([ax.get_xlim(), ax.get_ylim()]).T
    return np.clip(curve, 21 * low - 20 * high, 21 * high - 20 * low)


@c.styled
def trajectories(paths: ArrayLike, times: ArrayLike, *, extent: Extent | None = None) -> Figure:
    """Show the paths of particles from the base (gray, open) to the data (vermilion).

    The color of a path goes from gray to vermilion with time. `paths` is (times, batch, 2); `times`
    is (times,), increasing or decreasing. At most 100 paths, evenly spaced over the batch, are
    drawn; a path that is non-finite anywhere is dropped and counted.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    every, times = c.check_paths(paths, times)
    kept = c.finite(every.transpose(1, 0, 2))
    lines = c.thin(kept, MAX_PATHS)
    box = c.box_of(extent, lines)
    shown = np.clip(lines, 21 * box[0] - 20 * box[1], 21 * box[1] - 20 * box[0])  # as in `_near`
    figure = c.new_figure(6.0, 6.0)
    ax = figure.subplots()
    # Pieces in order of time, so that late ones lie above early ones of all paths.
    pieces = np.stack([shown[:, :-1], shown[:, 1:]], axis=2).swapaxes(0, 1).reshape(-1, 2, 2)
    ramp = LinearSegmentedColormap.from_list("", [BASE, MODEL])
    colored = LineCollection(list(pieces), cmap=ramp, linewidths=0.8, alpha=0.7)
    colored.set_array(np.repeat((times[:-1] + times[1:]) / 2, len(shown)))
    ax.add_collection(colored)
    ends: Any = ((0, BASE, "base", "none"), (-1, MODEL, "data end", MODEL))
    for end, color, name, face in ends:
        ax.scatter(
            *shown[:, end].T,
            s=16,
            facecolors=face,
            edgecolors=color,
            linewidths=0.9,
            zorder=3,
            label=f"t = {times[end]:g}, {name}",
        )
    notes = c.notes("paths", len(lines) + every.shape[1] - len(kept), lines, *box)
    if len(lines) < len(kept):
        notes[0] = f"{len(lines):,} of {every.shape[1]:,} paths"
    ax.set(title=", ".join(notes), xlabel="$x_1$", ylabel="$x_2$")
    ax.set(aspect="equal", xlim=box[:, 0], ylim=box[:, 1])
    figure.legend(loc="outside lower center", ncols=2, markerscale=1.5)
    return figure


@c.styled
def snapshots(paths: ArrayLike, times: ArrayLike, *, extent: Extent | None = None) -> Figure:
    """Show the particles at the five saved times that are closest to evenly spaced ones.

    `paths` is (times, batch, 2); `times` is (times,), increasing or decreasing. The base comes
    first, and all panels share one view.
    """
    every, times = c.check_paths(paths, times)
    wanted = np.linspace(times[0], times[-1], 5)
    chosen = np.unique(np.abs(times[:, None] - wanted).argmin(axis=0))
    number, clouds = len(chosen), [c.finite(x) for x in every[chosen]]
    box = c.box_of(extent, np.concatenate(clouds))
    notes = [c.notes("points", every.shape[1], x, *box) for x in clouds]
    height = (FIGURE_WIDTH - 0.5) / number + 0.45 + 0.16 * max(map(len, notes))
    figure = c.new_figure(FIGURE_WIDTH, height, "compressed")
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

    `paths` is (times, batch, 2); `times` is (times,), increasing or decreasing. The last frame
    stays a second longer. At most 5,000 particles are drawn; those that are non-finite anywhere are
    dropped and counted. A file next to `path` is written first and then moved there.

    **Raises:** `OSError` if the file cannot be written, and `ValueError` for wrong shapes.
    """
    import matplotlib

    check_int(fps=fps)
    every, times = c.check_paths(paths, times)
    kept = c.finite(every.transpose(1, 0, 2))
    drawn = c.thin(kept, c.MAX_DOTS)
    box = c.box_of(extent, drawn)
    lost = every.shape[1] - len(kept)
    note = "\n".join(c.notes("particles", len(drawn) + lost, drawn, *box))
    with matplotlib.rc_context(c.RC):
        figure = c.new_figure(*GIF_SIZE)
        ax = figure.subplots()
        ax.set(aspect="equal", xlim=box[:, 0], ylim=box[:, 1], xlabel="$x_1$", ylabel="$x_2$")
        dots = c.dots_in(ax, drawn[:, 0], MODEL)

        def draw(i):
            ax.set_title(f"t = {times[i]:.2f}\n{note}")
            dots.set_offsets(drawn[:, i])

        return c.save_gif(path, figure, draw, len(times), fps)
