"""Figures of densities on the sphere S^2: a globe from two sides, and an equal-area map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jcnf._checks import check_finite, check_number
from jcnf.plot import _style as c
from jcnf.plot._style import DATA, FIGURE_WIDTH, MODEL, Figure

PIXELS = 500  # of an image along its shorter side
GRATICULE = np.arange(-180, 180, 30)  # degrees


@c.styled
def globe(
    data: ArrayLike,
    samples: ArrayLike,
    log_density: ArrayLike,
    *,
    title: str | None = None,
    center: tuple[float, float] = (0.0, 0.0),
    nats: float = 8.0,
) -> Figure:
    """Show data, samples and the model's log-density on a globe, from both sides.

    The projection is orthographic: the globe as seen from far away.

    **Arguments:**

    - `data`, `samples`: directions (batch, 3), of which only the direction counts. The third
      coordinate points north, the first to longitude 0 on the equator.
    - `log_density`: (ny, nx) in nats; [i, j] is in row i from the south of an even division of the
      latitudes, and at the longitude -180 + 360 j / nx degrees. NaN and +inf are shown in red and
      counted.
    - `title`: a title of the whole figure.
    - `center`: latitude and longitude, in degrees, of the middle of the first side.
    - `nats`: the color scale reaches from the maximum of the density to this far below; lower
      values, including -inf, have its lowest color.

    **Raises:** `ValueError` for wrong shapes, and for `center` or `nats` out of range.
    """
    clouds, grid, titles = _checked(data, samples, log_density, nats)
    latitude, longitude = _center(center)
    views = [
        _View.orthographic(_frame(latitude, longitude)),
        _View.orthographic(_frame(-latitude, longitude + 180)),
    ]
    size = (FIGURE_WIDTH, 2 * (FIGURE_WIDTH - 1.2) / 3 + 0.75 + (0.2 if title else 0))
    figure = c.new_figure(*size, "compressed")
    axes = figure.subplots(2, 3)
    for row, view in zip(axes, views, strict=True):
        _fill(row, view, clouds, grid, nats)
    for ax, text in zip(axes[0], titles, strict=True):
        ax.set_title(text)
    for ax, side in zip(axes[:, 0], views, strict=True):
        ax.text(-0.02, 0.5, side.name, rotation=90, va="center", ha="right", transform=ax.transAxes)
    return _finished(figure, axes[0, 2], axes, title)


@c.styled
def world_map(
    data: ArrayLike,
    samples: ArrayLike,
    log_density: ArrayLike,
    *,
    title: str | None = None,
    center: tuple[float, float] = (0.0, 0.0),
    nats: float = 8.0,
) -> Figure:
    """Show data, samples and the model's log-density on maps on which equal areas are equal.

    The projection is that of Hammer (1892). Arguments and errors are those of `jcnf.plot.globe`;
    `center` is the middle of the maps.
    """
    clouds, grid, titles = _checked(data, samples, log_density, nats)
    view = equal_area_view(*_center(center))
    size = (FIGURE_WIDTH, 0.75 * (FIGURE_WIDTH - 0.8) + 0.8 + (0.2 if title else 0))
    figure = c.new_figure(*size, "compressed")
    axes = figure.subplot_mosaic([[0, 1], [2, 2]], height_ratios=[1, 2])
    axes = [axes[place] for place in range(3)]
    _fill(axes, view, clouds, grid, nats)
    for ax, text in zip(axes, titles, strict=True):
        ax.set_title(text)
    return _finished(figure, axes[2], [axes[2]], title)


class _View(NamedTuple):
    """A projection of the sphere to the plane; `frame` has east, north and up as its rows."""

    name: str
    frame: np.ndarray
    half: tuple[float, float]  # axes of the ellipse that the map fills
    forward: Callable[[np.ndarray], np.ndarray]  # (..., 3) in the frame -> (..., 2), or NaN
    inverse: Callable[[np.ndarray, np.ndarray], np.ndarray]  # two coordinates -> (..., 3)

    @classmethod
    def orthographic(cls, frame: np.ndarray) -> _View:
        """Return the view from far above the middle, which hides the other side."""

        def forward(x):
            return np.where(x[..., 2:] >= 0, x[..., :2], np.nan)

        def inverse(u, v):
            return np.stack([u, v, np.sqrt(np.maximum(1 - u**2 - v**2, 0))], axis=-1)

        latitude, longitude = np.round(_degrees(frame[2])).astype(int)
        name = f"seen from {_named(latitude, 'NS')}, {_named(longitude, 'EW')}"
        return cls(name, frame, (1.0, 1.0), forward, inverse)

    @classmethod
    def hammer(cls, frame: np.ndarray) -> _View:
        """Return the equal-area map of the whole sphere to an ellipse (Hammer 1892)."""

        def forward(x):
            half = np.arctan2(x[..., 0], x[..., 2]) / 2
            across = np.sqrt(np.maximum(1 - x[..., 1] ** 2, 0))
            root = np.sqrt(1 + across * np.cos(half))
            flat = [2 * across * np.sin(half) / root, x[..., 1] / root]
            return np.sqrt(2) * np.stack(flat, axis=-1)

        def inverse(u, v):
            root = np.sqrt(np.maximum(1 - (u / 4) ** 2 - (v / 2) ** 2, 0.5))
            longitude, height = 2 * np.arctan2(root * u, 2 * (2 * root**2 - 1)), root * v
            across = np.sqrt(np.maximum(1 - height**2, 0))
            return np.stack([across * np.sin(longitude), height, across * np.cos(longitude)], -1)

        return cls("map", frame, (2 * np.sqrt(2), np.sqrt(2)), forward, inverse)

    def project(self, x: np.ndarray) -> np.ndarray:
        """Return the places (..., 2) of directions (..., 3); NaN for those that are hidden."""
        return self.forward(x @ self.frame.T)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the directions (rows, columns, 3) of pixels, and which are in the picture."""
        width, height = self.half
        columns = round(PIXELS * width / height)
        u = width * ((np.arange(columns) + 0.5) / columns * 2 - 1)[None]
        v = height * ((np.arange(PIXELS) + 0.5) / PIXELS * 2 - 1)[:, None]
        inside = (u / width) ** 2 + (v / height) ** 2 <= 1
        u, v = np.where(inside, u, 0), np.where(inside, v, 0)
        return self.inverse(u, v) @ self.frame, inside


def equal_area_view(latitude: float, longitude: float) -> _View:
    """Return the map whose middle is there, in degrees."""
    return _View.hammer(_frame(latitude, longitude))


def _checked(data, samples, log_density, nats):
    """Return clouds of unit vectors, the masked log-density, and titles."""
    check_number("(0, inf)", nats=nats)
    grid = c.array(log_density, "log_density", "(ny, nx)")
    if min(grid.shape) < 2:
        raise ValueError(f"expected log_density on at least 2 x 2 cells; got {grid.shape}")
    clouds, titles = [], []
    for name, every in c.both(data, samples, "(batch, 3)", 3).items():
        kept = c.finite(every)
        kept = kept[np.any(kept != 0, axis=1)]
        drawn, lost = c.thin(kept, c.MAX_DOTS), len(every) - len(kept)
        shown = f", {len(drawn):,} drawn" if len(drawn) < len(kept) else ""
        notes = [f"{len(kept):,} points{shown}", *([f"{lost:,} without direction"] if lost else [])]
        titles.append("\n".join([name, *notes]))
        clouds.append(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    grid = np.ma.masked_where(np.isnan(grid) | np.isposinf(grid), grid)
    bad = [f"{n:,} cells non-finite (red)"] if (n := np.ma.count_masked(grid)) else []
    titles.append("\n".join(["model log-density", f"cut {nats:g} nats below max", *bad]))
    return clouds, grid, titles


def _center(center):
    latitude, longitude = (float(value) for value in center)
    check_number("[-90, 90]", latitude=latitude)
    check_finite(longitude=longitude)
    return latitude, longitude


def _directions(latitude: Any, longitude: Any) -> np.ndarray:
    """Return unit vectors (..., 3) of latitudes and longitudes in degrees."""
    latitude, longitude = np.broadcast_arrays(np.deg2rad(latitude), np.deg2rad(longitude))
    across = np.cos(latitude)
    return np.stack(
        [across * np.cos(longitude), across * np.sin(longitude), np.sin(latitude)], axis=-1
    )


def _degrees(x: np.ndarray) -> np.ndarray:
    """Return latitudes and longitudes (2, ...) in degrees of unit vectors."""
    latitude = np.arcsin(np.clip(x[..., 2], -1, 1))
    return np.rad2deg(np.stack([latitude, np.arctan2(x[..., 1], x[..., 0])]))


def _frame(latitude, longitude):
    turn = np.deg2rad(longitude)
    up, east = _directions(latitude, longitude), np.array([-np.sin(turn), np.cos(turn), 0.0])
    return np.stack([east, np.cross(up, east), up])


def _named(degrees, letters):
    return f"{abs(degrees)}°" + (f" {letters[int(degrees < 0)]}" if degrees else "")


def points_in(ax: Any, view: _View, x: np.ndarray, color: str) -> None:
    """Draw directions (batch, 3) in axes that `outline_in` has prepared."""
    places = view.project(x)
    dots = c.dots_in(ax, places[np.isfinite(places).all(axis=1)], color, len(x))
    dots.set_zorder(3)


def outline_in(ax: Any, view: _View) -> None:
    """Draw the outline, the meridians and the parallels of the sphere."""
    from matplotlib.patches import Ellipse

    width, height = view.half
    ax.set(aspect="equal", xlim=(-1.01 * width, 1.01 * width))
    ax.set(ylim=(-1.01 * height, 1.01 * height))
    ax.axis("off")
    for line in _graticule():
        ax.plot(*_broken(view.project(line), width).T, color="black", lw=0.4, alpha=0.25)
    ax.add_patch(Ellipse((0, 0), 2 * width, 2 * height, fill=False, lw=0.8))


def _fill(axes, view, clouds, grid, nats):
    """Draw both clouds and the density in three axes."""
    from matplotlib.patches import Ellipse

    width, height = view.half
    for ax in axes:
        outline_in(ax, view)
    for ax, x, color in zip(axes, clouds, (DATA, MODEL), strict=False):
        points_in(ax, view, x, color)
    directions, inside = view.pixels()
    image = np.ma.masked_where(~inside, _at(grid, directions))
    top = _top(grid)
    colors = {"vmin": top - nats, "vmax": top, "cmap": c.DENSITY_MAP}
    disc = Ellipse((0, 0), 2 * width, 2 * height, color=c.BROKEN, zorder=0)
    axes[2].add_patch(disc)  # visible where the image is masked
    extent = (-width, width, -height, height)
    drawn = axes[2].imshow(
        image.clip(top - nats), extent=extent, origin="lower", zorder=1, **colors
    )
    drawn.set_clip_path(disc)


def _top(grid):
    top = grid.max(fill_value=-np.inf)
    return float(top) if np.isfinite(top) else 0.0


def _at(grid, directions):
    """Return the value of the grid that is nearest to each direction."""
    latitude, longitude = _degrees(directions)
    rows, columns = grid.shape
    i = np.clip(np.floor((latitude + 90) / 180 * rows), 0, rows - 1).astype(int)
    j = np.round((longitude + 180) / 360 * columns).astype(int) % columns
    return grid[i, j]


def _graticule():
    """Yield meridians and parallels as directions (points, 3)."""
    for degrees in GRATICULE:
        yield _directions(np.linspace(-90, 90, 181), degrees)
        if abs(degrees) < 90:
            yield _directions(degrees, np.linspace(-180, 180, 361))


def _broken(places, width):
    """Return the line with a gap wherever it leaps from one edge of a map to the other."""
    leaps = np.flatnonzero(np.abs(np.diff(places[:, 0])) > width / 2) + 1
    return np.insert(places, leaps, np.nan, axis=0)


def _finished(figure, image_axes, beside, title):
    bar = {"extend": "min", "aspect": 25, "pad": 0.02, "label": "log-density (nats)"}
    figure.colorbar(image_axes.images[0], ax=beside, **bar)
    figure.suptitle(title or "", fontsize=11)
    return figure
