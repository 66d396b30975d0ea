"""Gaps of models to the best one."""

import numpy as np
import pytest

from jcnf import plot

GAPS = {"a": ([0.0, 3.0], [0.0, 0.5]), "b": ([0.2, np.nan], [0.1, np.nan])}


def test_gaps_are_drawn_with_errors_and_those_not_finite_left_out():
    ax = plot.gaps_to_best(["left", "right"], GAPS).axes[0]
    drawn = {bars.get_label(): bars for bars in ax.containers}
    assert {name: bars[0].get_ydata().tolist() for name, bars in drawn.items()} == {
        "a": [0, 3],
        "b": [0.2],
    }
    (bars,) = drawn["a"][2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0, 0], [2.5, 3.5]]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["left", "right"]
    # Each model has its place beside its neighbor's, within the band of the data set.
    (a, right), (b,) = (bars[0].get_xdata() for bars in drawn.values())
    assert -0.5 < a < b < 0.5 < right < 1.5


def test_gaps_of_models_that_all_failed_are_an_empty_figure():
    ax = plot.gaps_to_best(["only"], {"a": ([np.nan], [np.nan])}).axes[0]
    assert ax.containers[0][0].get_ydata().size == 0


@pytest.mark.parametrize("names", [[], ["one"]])
def test_gaps_of_another_number_of_names_are_refused(names):
    with pytest.raises(ValueError, match=r"one name|each name"):
        plot.gaps_to_best(names, GAPS)
