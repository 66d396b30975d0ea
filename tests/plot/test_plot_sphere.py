"""Tests of the globe and the map: where points and densities land, and what titles count."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from jcnf import plot
from jcnf.plot import _style, sphere

ORIGIN = (0.0, 0.0)


def directions(n, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def views():
    frame = sphere._frame(35.0, -120.0)
    return sphere._View.orthographic(frame), sphere._View.hammer(frame)


def peak(latitude, longitude, rows=36):
    """A log-density whose highest cell is at a latitude and a longitude."""
    y = (np.arange(rows) + 0.5) / rows * 180 - 90
    x = -180 + 360 * np.arange(2 * rows) / (2 * rows)
    return -((y[:, None] - latitude) ** 2) / 200 - ((x - longitude) ** 2)[None] / 200


def brightest(ax):
    image = ax.images[0]
    values = image.get_array().filled(-np.inf)
    (x0, x1, y0, y1), (rows, columns) = image.get_extent(), values.shape
    i, j = np.mean(np.nonzero(values == values.max()), axis=1)
    return np.array([x0 + (j + 0.5) / columns * (x1 - x0), y0 + (i + 0.5) / rows * (y1 - y0)])


@pytest.mark.parametrize("view", views(), ids=["orthographic", "hammer"])
def test_a_projection_is_undone_by_its_inverse(view):
    x = directions(200)
    places = view.project(x)
    shown = np.isfinite(places).all(axis=1)
    assert shown.sum() == (200 if view.name == "map" else (x @ view.frame[2] >= 0).sum())
    np.testing.assert_allclose(
        view.inverse(*places[shown].T) @ view.frame, x[shown], rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(view.project(view.frame[2]), [0, 0], atol=1e-12)


def test_the_map_keeps_areas_and_the_globe_distances_from_its_axis():
    globe, world = views()
    # The area of the image of small squares, by the Jacobian in an orthonormal tangent basis.
    for x in directions(20) @ world.frame:
        first = np.cross(x, world.frame[1])
        first /= np.linalg.norm(first)
        second, h = np.cross(x, first), 1e-5
        sides = [world.project(x + h * v) - world.project(x - h * v) for v in (first, second)]
        assert abs(np.linalg.det(np.array(sides) / (2 * h))) == pytest.approx(1, rel=1e-5)
    x = directions(50)
    x = x[x @ globe.frame[2] > 0]
    np.testing.assert_allclose(
        np.linalg.norm(globe.project(x), axis=1), np.sqrt(1 - (x @ globe.frame[2]) ** 2)
    )


def test_north_is_up_and_east_is_right():
    north, east = np.array([[0.1, 0, 1.0], [1, 0.2, 0]])
    for view in (sphere._View.orthographic, sphere._View.hammer):
        places = view(sphere._frame(*ORIGIN)).project(np.stack([north, east]))
        assert places[0, 1] > 0.9
        assert places[1, 0] > 0.1
        assert abs(places[1, 1]) < 1e-12


@pytest.mark.parametrize(
    ("draw", "panels"), [(plot.globe, (2, 5)), (plot.world_map, (2,))], ids=["globe", "map"]
)
def test_densities_are_drawn_where_points_are(draw, panels):
    place = sphere._directions(np.array([22.5]), np.array([40.0]))
    figure = draw(place, np.concatenate([place, -place]), peak(22.5, 40), center=(10, 20))
    assert isinstance(figure, Figure)
    axes = figure.axes
    dots = axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(brightest(axes[panels[0]]), dots[0], atol=0.01)
    if draw is plot.globe:
        assert len(axes[3].collections[0].get_offsets()) == 0  # the data are on the first side
        assert len(axes[4].collections[0].get_offsets()) == 1  # a sample is on the other
        assert [ax.texts[0].get_text() for ax in (axes[0], axes[3])] == [
            "seen from 10° N, 20° E",
            "seen from 10° S, 160° W",
        ]
    assert figure.axes[-1].get_ylabel() == "log-density (nats)"


def test_titles_count_what_is_left_out():
    data, grid = directions(6_000), peak(0, 0)
    data[:3], data[3:5], grid[0, :4] = np.nan, 0, np.nan
    figure = plot.world_map(data, directions(7), grid, title="places")
    assert [ax.get_title() for ax in figure.axes[:3]] == [
        f"data\n5,995 points, {_style.MAX_DOTS:,} drawn\n5 without direction",
        "samples\n7 points",
        "model log-density\ncut 8 nats below max\n4 cells non-finite (red)",
    ]
    assert figure.get_suptitle() == "places"


def test_rotations_are_drawn_by_where_their_axes_go():
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # about the third axis
    figure = plot.rotations(np.eye(3).reshape(1, 9), np.stack([quarter] * 2).reshape(2, 9))
    view = sphere.equal_area_view(0.0, 0.0)
    for row, rotation in zip(np.reshape(figure.axes, (2, 3)), (np.eye(3), quarter), strict=True):
        for ax, direction in zip(row, rotation.T, strict=True):
            (dots,) = ax.collections
            np.testing.assert_allclose(dots.get_offsets()[0], view.project(direction), atol=1e-9)
    with pytest.raises(ValueError, match="data"):
        plot.rotations(np.eye(3), np.eye(3).reshape(1, 9))
