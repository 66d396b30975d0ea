"""Curves on logarithmic axes."""

import numpy as np
import pytest

from jcnf import plot
from jcnf.plot import _style

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


def test_scaling_shows_series_that_coincide_and_points_that_are_not_of_one_run():
    series = {name: (X, X) for name in ("a", "b", "c")}
    panel = plot.CurvePanel("", "x", "y", series, unjoined=["c"], levels={"stop": 5.0})
    (ax,) = plot.scaling([panel]).axes
    a, b, separate, level = ax.lines
    assert [line.get_linestyle() for line in (a, b, separate)] == ["-", "--", "None"]
    assert a.get_linewidth() > b.get_linewidth()
    assert a.get_markersize() > b.get_markersize()
    assert all(line.get_markerfacecolor() == "none" for line in (a, b, separate))
    assert list(level.get_ydata()) == [5, 5]
    assert ax.texts[0].get_text() == "stop"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((2.5, 7.0), ["3", "4", "5", "6", "7"]),
        ((0.4, 11.0), ["0.5", "1", "2", "5", "10"]),
        ((0.8, 5000.0), ["1", "10", "100", "1,000"]),
        ((5e-9, 2e-2), [f"$\\mathdefault{{10^{{{k}}}}}$" for k in range(-8, -1)]),
    ],
)
def test_ticks_of_logarithmic_axes_are_plain_numbers(limits, expected):
    figure = _style.new_figure(9, 9)
    ax = figure.subplots()
    ax.set(yscale="log", ylim=limits)
    _style.plain_ticks(ax.yaxis)
    ticks = ax.yaxis.get_major_locator()()
    labels = ax.yaxis.get_major_formatter().format_ticks(ticks)
    inside = [x for x, y in zip(labels, ticks, strict=True) if limits[0] <= y <= limits[1]]
    assert inside == expected
    assert not any(ax.yaxis.get_minor_formatter().format_ticks([2.0, 30.0]))


def test_scaling_exponent_of_power_law_is_its_exponent():
    assert plot.scaling_exponent(X, 3 * np.array(X) ** -1.5) == pytest.approx(-1.5)
