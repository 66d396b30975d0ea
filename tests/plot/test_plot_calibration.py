"""Figures of calibration: what is drawn where."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from jcnf import plot

LEVELS = np.array([0.0, 0.25, 0.5, 1.0])
BAND = (np.array([0.0, 0.1, 0.3, 1.0]), np.array([0.0, 0.4, 0.7, 1.0]))


def lines(ax):
    return {line.get_label(): line.get_ydata().tolist() for line in ax.lines}


@pytest.mark.parametrize("difference", [False, True])
def test_calibration_draws_curves_and_band_over_the_diagonal(difference):
    coverage = np.array([[0, 0.5, 0.5, 1.0], [0.0, 0.25, 0.75, 1.0]])
    figure = plot.calibration(LEVELS, coverage, *BAND, ["a", "b"], difference=difference)
    (ax,) = figure.axes
    baseline = LEVELS if difference else 0 * LEVELS
    drawn = lines(ax)
    assert drawn["a"] == (coverage[0] - baseline).tolist()
    assert drawn["b"] == (coverage[1] - baseline).tolist()
    assert drawn["exact"] == (LEVELS - baseline).tolist()
    (band,) = ax.collections
    (path,) = band.get_paths()
    at_half = path.vertices[path.vertices[:, 0] == 0.5, 1] + 0.5 * difference
    assert {round(y, 12) for y in at_half} == {0.3, 0.7}


def test_calibration_of_one_curve_names_it_the_posterior():
    drawn = lines(plot.calibration(LEVELS, LEVELS, *BAND).axes[0])
    assert drawn["posterior"] == LEVELS.tolist()


def test_ranks_are_relative_to_what_each_bin_expects():
    """3 bins of 4 ranks: of 1, 1 and 2 ranks (2 is rounded to even), for 8 simulations."""
    ranks = np.array([0, 0, 0, 1, 2, 2, 3, 3])
    (ax,) = plot.ranks(ranks, 3, bins=3).axes
    band, histogram = ax.patches
    heights, edges, _ = histogram.get_data()
    np.testing.assert_allclose(edges, [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(heights, [3 / 2, 3 / 4, 2 / 2])
    upper, _, lower = band.get_data()
    assert (lower < 1).all()
    assert (upper > 1).all()


def test_ranks_have_one_panel_for_each_parameter():
    ranks = np.random.default_rng(0).integers(0, 100, (200, 5))
    figure = plot.ranks(ranks, 99, list("abcde"))
    assert isinstance(figure, Figure)
    assert [ax.get_title() for ax in figure.axes] == list("abcde")


def test_local_c2st_shows_the_statistic_and_its_p_value():
    null = np.stack([np.arange(1, 100), np.full(99, 5.0)], axis=1) / 100
    first, second = plot.local_c2st([0.95, 0.01], null).axes
    assert first.lines[0].get_xdata() == [0.95, 0.95]
    assert first.get_title() == "observation 0: p = 0.06"  # 5 of 99 are at least as large
    assert second.get_title() == "observation 1: p = 1"
    assert sum(first.patches[0].get_data().values) == 99
    assert first.get_xlim()[1] > 0.99
    (only,) = plot.local_c2st(0.95, null[:, 0]).axes
    assert only.get_title() == "p = 0.06"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.calibration(LEVELS, LEVELS[:3], *BAND), "each of the levels"),
        (lambda: plot.calibration(LEVELS, np.zeros((9, 4)), *BAND), "at most 8"),
        (lambda: plot.calibration(LEVELS, LEVELS, *BAND, ["a", "b"]), "a name for each curve"),
        (lambda: plot.ranks([0, 5], 4), "draws=4"),
        (lambda: plot.ranks([0, 3], 3, bins=20), "bins must be"),
        (lambda: plot.local_c2st([0.1, 0.2], np.zeros((5, 3))), "null of shape"),
        (lambda: plot.local_c2st(np.nan, np.zeros(5)), "must be finite"),
    ],
)
def test_calibration_figures_refuse_other_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
