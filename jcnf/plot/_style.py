"""Shared parts of figures: style, checks, robust views, counts, clouds of points."""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any  # a name that run-time type checkers can resolve without matplotlib

P = ParamSpec("P")
Extent = float | int | Sequence[float | int]  # e for [-e, e]^2, or (xmin, xmax, ymin, ymax)

# The palette of Okabe and Ito, which the color-blind can tell apart: blue, vermilion, bluish green,
# reddish purple, orange, sky blue, black, yellow.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"),
)
DATA, MODEL, BASE = COLORS[0], COLORS[1], "#7F7F7F"
MARKERS = "osD^vPX*"
DENSITY_MAP = "viridis"  # even in lightness, so that it survives color blindness and gray printing
BROKEN = "#CC3311"  # cells and images that are not finite
MAX_DOTS = 5_000
FIGURE_WIDTH = 9.33  # inches: 1400 pixels at 150 dpi
RC: Any = (
    dict.fromkeys(["figure.dpi", "savefig.dpi"], 150)
    | dict.fromkeys(["font.size", "axes.titlesize", "axes.labelsize", "figure.titlesize"], 9)
    | dict.fromkeys(["xtick.labelsize", "ytick.labelsize", "legend.fontsize"], 8)
    | dict.fromkeys(["axes.linewidth", "xtick.major.width", "ytick.major.width"], 0.6)
    | {"legend.framealpha": 0.8, "legend.edgecolor": "none"}
    | {"image.cmap": DENSITY_MAP, "grid.alpha": 0.3, "grid.linewidth": 0.5}
)


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Wrap `draw` in this module's style, and fix ticks and layout before the style is reset."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        import matplotlib

        with matplotlib.rc_context(RC):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            return figure

    return drawn


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """Return an empty Figure, in inches, on an Agg canvas, which pyplot does not manage.

    Notebooks show it as the result of a cell, although they do not know it from pyplot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = FigureCanvasAgg(Figure((width, height), layout=layout)).figure
    figure._repr_png_ = functools.partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def color_of(place: int) -> str:
    """Return the color of the series in this place."""
    return COLORS[place % len(COLORS)]


def panels_in(figure: Any, number: int, most: int, share: bool = False) -> list[Any]:
    """Return axes in rows of at most `most`, each row as wide as the figure, so no cell is empty.

    Longer rows come first. With `share`, all panels have one x-axis.
    """
    lines = -(-number // most)
    counts = [number // lines + (line < number % lines) for line in range(lines)]
    width = math.lcm(*counts)
    grid, axes = figure.add_gridspec(lines, width), []
    for line, count in enumerate(counts):
        for place in range(count):
            columns = slice(place * width // count, (place + 1) * width // count)
            shared = axes[0] if share and axes else None
            axes.append(figure.add_subplot(grid[line, columns], sharex=shared))
    return axes


def plain_ticks(*axes: Any) -> None:
    """Label logarithmic axes by plain numbers such as 0.5 and 200, after their limits are set.

    Numbers below 0.001 or above 100,000 are shown as powers of ten.
    """
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogFormatterMathtext,
        LogLocator,
        MaxNLocator,
        NullFormatter,
    )

    for axis in axes:
        low, high = sorted(axis.get_view_interval())
        decades = math.log10(high / low)
        if decades < 0.5:  # nearly linear
            ticks = np.asarray(MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high))
            axis.set_major_locator(FixedLocator(ticks[ticks > 0].tolist()))
        else:
            subs = (1, 2, 3, 5) if decades < 1 else (1, 2, 5) if decades < 1.5 else (1, 3)
            axis.set_major_locator(LogLocator(subs=subs if decades < 2.2 else (1,)))
        plain = low > 0.5e-3 and high < 1.1e5
        axis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:,.10g}") if plain else LogFormatterMathtext()
        )
        axis.set_minor_formatter(NullFormatter())


def array(x: ArrayLike, name: str, shape: str, last: int | None = None) -> np.ndarray:
    """Return x in float64, after checks of its axes (as in `shape`) and of the last one's size."""
    try:
        x = np.asarray(x).astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"expected {name} of numbers of shape {shape}; got other values") from None
    ndim = len(shape.strip("()").replace(",", " ").split())
    if x.ndim != ndim or last not in (None, x.shape[-1]):
        raise ValueError(f"expected {name} of shape {shape}; got {x.shape}: select or add axes")
    return x


def finite(x: np.ndarray) -> np.ndarray:
    """Return the rows of x without NaN, infinities and numbers too large to draw."""
    return x[(np.abs(x) < 1e100).all(axis=tuple(range(1, x.ndim)))]


def both(
    data: ArrayLike, samples: ArrayLike, shape: str, last: int | None = None
) -> dict[str, Any]:
    """Return data and samples by name, after checks."""
    return {n: array(x, n, shape, last) for n, x in (("data", data), ("samples", samples))}


def check_paths(paths: ArrayLike, times: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return paths (times, batch, 2) and their times (times,), checked and in order of time."""
    paths, times = array(paths, "paths", "(times, batch, 2)", 2), array(times, "times", "(times,)")
    if len(times) != len(paths) or len(times) < 2 or not np.isfinite(times).all():
        raise ValueError(
            f"expected two or more finite times, one for each of the {len(paths)} rows of paths; "
            f"got shape {times.shape}: pass the times at which the paths were saved"
        )
    return paths[np.argsort(times)], np.sort(times)


def thin(x: np.ndarray, most: int) -> np.ndarray:
    """Return at most `most` rows of x, evenly spaced."""
    return x[np.linspace(0, len(x) - 1, min(most, len(x))).astype(int)]


def notes(noun: str, total: int, rows: np.ndarray, low: Any, high: Any) -> list[str]:
    """Return lines that count the rows kept, dropped, and outside the view [low, high]."""
    outside = ((rows < low) | (rows > high)).any(axis=tuple(range(1, rows.ndim))).sum()
    lost = {"non-finite dropped": total - len(rows), "outside the view": outside}
    return [f"{len(rows):,} {noun}", *(f"{n:,} {what}" for what, n in lost.items() if n)]


def limits_of(x: np.ndarray) -> tuple[float, float]:
    """Return padded limits of x without outliers.

    Outliers are beyond the central 99 % of x by a quarter of its width, or more for few values.
    """
    if x.size == 0:
        return -1.0, 1.0
    low, high = np.quantile(x, 0.005, method="higher"), np.quantile(x, 0.995, method="lower")
    slack = (0.25 + 60 / x.size) * (high - low)
    inner = x[(x >= low - slack) & (x <= high + slack)] if high > low else x
    low, high = float(inner.min()), float(inner.max())
    pad = 0.04 * (high - low) or 0.5 * max(abs(low), 1.0)
    return low - pad, high + pad


def box_of(extent: Extent | None, points: np.ndarray) -> np.ndarray:
    """Return the view [[xmin, ymin], [xmax, ymax]]: `extent`, or a square around the points."""
    if extent is None:
        box = np.array([limits_of(points[..., i].ravel()) for i in range(2)]).T
        return box.mean(axis=0) + (box[1] - box[0]).max() * np.array([[-0.5], [0.5]])
    edges = np.asarray(extent, dtype=np.float64)
    edges = edges * np.array([-1.0, 1.0, -1.0, 1.0]) if edges.ndim == 0 else edges
    box = edges.reshape(2, 2).T if edges.shape == (4,) else np.zeros((2, 2))
    if not (np.isfinite(box).all() and (box[0] < box[1]).all()):
        raise ValueError(f"expected extent > 0 or (xmin, xmax, ymin, ymax); got {extent}")
    return box


def clouds_in(axes: Any, clouds: Any, boxes: Any, colors: Sequence[str]) -> None:
    """Draw clouds (batch, 2), either all as dots if they are few, or as densities on one scale."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    most, images = max(len(cloud) for cloud in clouds), []
    bins = int(np.clip(0.8 * np.sqrt(most), 24, 110))
    for ax, cloud, box, color in zip(axes, clouds, boxes, colors, strict=True):
        x = cloud[((cloud >= box[0]) & (cloud <= box[1])).all(axis=1)]
        if most <= MAX_DOTS:
            dots_in(ax, x, color, most)
        else:
            counts = np.histogram2d(x[:, 1], x[:, 0], bins, box.T[::-1])[0] / max(len(cloud), 1)
            rgb = np.array(to_rgb(color))
            ramp: Any = [0.85 + 0.15 * rgb, rgb, 0.35 * rgb]  # from a tint of the color to a shade
            ramp = LinearSegmentedColormap.from_list("", ramp)
            shown, edges = np.ma.masked_equal(counts, 0), box.T.ravel()
            images += [ax.imshow(shown, ramp, extent=edges, origin="lower", aspect="auto")]
        ax.set(xlim=box[:, 0], ylim=box[:, 1])
    filled = [image.get_array().compressed() for image in images]
    top = max((np.quantile(x, 0.998) for x in filled if x.size), default=1.0)
    for image in images:
        image.set_clim(0, top)


def dots_in(ax: Any, x: np.ndarray, color: str, most: int | None = None) -> Any:
    """Scatter x (batch, 2) as dots, whose size is right for `most` of them (default: all of x)."""
    size = float(np.clip(8000 / max(len(x) if most is None else most, 1), 1.5, 9.0))
    return ax.scatter(*x.T, s=size, color=color, alpha=0.5, linewidths=0, rasterized=True)


def histograms_in(ax: Any, data: np.ndarray, samples: np.ndarray, limits: Any) -> None:
    """Draw densities of both on common bins, normalized over all points, also those outside."""
    span = limits[1] - limits[0]
    quartiles = np.quantile(data, [0.25, 0.75]) if len(data) else np.zeros(2)
    width = 2 * (quartiles[1] - quartiles[0]) / max(len(data), 1) ** (1 / 3)  # Freedman, Diaconis
    bins = np.linspace(limits[0], limits[1], max(15, int(span / max(width, span / 60))) + 1)
    styles = {"data": (data, {"fill": True, "alpha": 0.35}), "samples": (samples, {})}
    for (name, (x, style)), color in zip(styles.items(), (DATA, MODEL), strict=True):
        heights = np.histogram(x, bins)[0] / (max(len(x), 1) * np.diff(bins))
        ax.stairs(heights, bins, color=color, label=name, **style)
    ax.set(xlim=limits)


def save_gif(
    path: str | os.PathLike[str], figure: Any, draw: Callable[[int], Any], frames: int, fps: int
) -> Path:
    """Write a GIF of `figure` after `draw(i)` for each frame i; the last one stays a second longer.

    The file is written completely or not at all.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    draw(0)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # nothing moves but what `draw` changes
    numbers = [*range(frames), *[frames - 1] * fps]
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part.gif")
    try:
        FuncAnimation(figure, draw, numbers, repeat=False).save(part, PillowWriter(fps))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
