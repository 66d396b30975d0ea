"""Tests that image grids show the pixels they are given."""

import numpy as np
import pytest

from jcnf.plot import image_grid


def test_image_grid_non_finite_images_are_red_and_counted():
    gray = np.linspace(-0.5, 1.5, 3 * 2)[:, None] * np.ones((1, 2)) + [0, 0.1]
    gray[4, 1] = np.nan
    figure = image_grid([("six", gray), ("one", gray[:1])], (1, 2, 1), columns=4)
    sheet, one = (ax.images[0].get_array() for ax in figure.axes)
    assert sheet.shape == (3, 4 * 2 + 3, 3)
    assert one.shape == (1, 11, 3)
    expected = np.clip(gray, 0, 1)
    for i in (0, 1, 2, 3, 5):
        row, column = i // 4 * 2, i % 4 * 3
        shown = sheet[row, column : column + 2]
        np.testing.assert_allclose(shown, expected[i][:, None] * np.ones(3))
    np.testing.assert_array_equal(sheet[2, :2], [[1, 0, 0]] * 2)
    np.testing.assert_array_equal(sheet[1], 1)
    np.testing.assert_array_equal(sheet[2, 5:], 1)
    assert [ax.get_title() for ax in figure.axes] == ["six, 1 non-finite\n(red)", "one"]


def test_image_grid_colors_stay_in_place_and_wrong_shapes_raise():
    x = np.random.default_rng(0).uniform(size=(2, 2 * 3 * 3))
    (ax,) = image_grid([("", x)], (2, 3, 3), columns=1).axes
    np.testing.assert_allclose(ax.images[0].get_array()[:2], x[0].reshape(2, 3, 3))
    np.testing.assert_allclose(ax.images[0].get_array()[3:], x[1].reshape(2, 3, 3))
    for shape in ((2, 3, 1), (3, 3, 2), (6, 3)):
        with pytest.raises(ValueError, match="expected images"):
            image_grid([("", x)], shape)
    with pytest.raises(ValueError, match="expected images"):
        image_grid([("", x[:0])], (2, 3, 3))
    for groups, columns in (([], 10), ([("", x)], 0)):
        with pytest.raises(ValueError, match="expected groups and columns"):
            image_grid(groups, (2, 3, 3), columns)
