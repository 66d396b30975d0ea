"""Corner plots: what is drawn where."""

import numpy as np
import pytest

from jcnf import plot

SAMPLES = np.random.default_rng(0).normal(size=(300, 3)) * [1, 2, 3]


def grid(figure, number):
    return np.reshape(figure.axes, (number, number))


def marks(ax):
    """Return where an axis has vertical or horizontal lines."""
    ends = [np.array(line.get_data()) for line in ax.lines]
    return sorted(float(x[0]) for pair in ends for x in pair if x[0] == x[1])


def test_corner_has_samples_below_the_diagonal_and_reference_above():
    reference = SAMPLES[:200] + 1
    axes = grid(plot.corner(SAMPLES, list("abc"), reference=reference), 3)
    below, above = (ax.collections[0].get_offsets() for ax in (axes[2, 0], axes[0, 2]))
    np.testing.assert_array_equal(below, SAMPLES[:, [0, 2]])
    np.testing.assert_array_equal(above, reference[:, [2, 0]])
    assert axes[2, 0].get_xlim() == axes[0, 2].get_ylim()
    ours, theirs = (
        {p.get_label(): p for p in axes[1, 1].patches}[n] for n in ("samples", "reference")
    )
    for patch, x in ((ours, SAMPLES), (theirs, reference)):
        heights, edges, _ = patch.get_data()
        inside = ((x[:, 1] >= edges[0]) & (x[:, 1] <= edges[-1])).mean()
        assert (heights * np.diff(edges)).sum() == pytest.approx(inside)
    np.testing.assert_array_equal(ours.get_data().edges, theirs.get_data().edges)


def test_corner_marks_a_truth_outside_the_samples():
    truth = [0.5, 30.0, -1.0]
    axes = grid(plot.corner(SAMPLES, list("abc"), truth=truth), 3)
    for i, j in np.ndindex(3, 3):
        expected = [truth[j], truth[i]] if j < i else [truth[i]] if i == j else []
        assert marks(axes[i, j]) == sorted(expected)
        assert axes[i, j].axison == (j <= i)
    low, high = axes[1, 1].get_xlim()
    assert low < SAMPLES[:, 1].mean() < 30 < high


def test_corner_of_one_parameter_and_of_many():
    (ax,) = plot.corner(SAMPLES[:, :1], ["rate"], truth=[1.0]).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rate", "density")
    wide = np.tile(SAMPLES, 3)
    wide[0, 0] = np.nan
    figure = plot.corner(wide, [f"p{i}" for i in range(9)], title="wide")
    assert len(figure.axes) == 36
    assert figure.get_suptitle().split("\n") == [
        "wide",
        "first 6 of 9 parameters",
        "samples: 299 rows, 1 non-finite dropped",
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.corner(SAMPLES, ["a"]), r"samples of shape \(batch, 1\); got \(300, 3\)"),
        (lambda: plot.corner(SAMPLES, list("abc"), truth=[1.0]), r"truth of shape \(3,\)"),
        (lambda: plot.corner(SAMPLES, list("abc"), reference=SAMPLES[:, :2]), "reference of shape"),
        (lambda: plot.corner(SAMPLES * np.nan, list("abc")), "one sample that is finite"),
    ],
)
def test_corner_wrong_shapes_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
