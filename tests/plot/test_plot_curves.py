"""Curves on logarithmic axes."""

import numpy as np
import pytest

from jcnf import plot

X = [1.0, 10.0, 100.0]


def test_scaling_points_not_positive_are_left_out():
    series = {"a": (X, [1.0, 0.0, 3.0]), "b": (X, [np.nan, 2.0, np.inf])}
    panels = [
        plot.CurvePanel("left", "x", "y", series, {"a": "a, labeled"}),
        plot.CurvePanel("right", "u", "v", {"b": (X, X)}),
    ]
    left, right = plot.scaling(panels).axes
    assert left.get_xscale() == left.get_yscale() == "log"
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1, 1], [100, 3]], [[10, 2]]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a, labeled", "b"]
    assert right.lines[0].get_color() == left.lines[1].get_color() != left.lines[0].get_color()
    assert (right.get_title(), right.get_xlabel(), right.get_ylabel()) == ("right", "u", "v")


def test_scaling_exponent_of_power_law_is_its_exponent():
    assert plot.scaling_exponent(X, 3 * np.array(X) ** -1.5) == pytest.approx(-1.5)
