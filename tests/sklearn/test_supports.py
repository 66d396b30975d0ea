"""Supports of columns: how they are chosen, what they contain, and which are refused."""

import math

import numpy as np
import pytest

from jcnf.sklearn import Column
from jcnf.sklearn.columns import choose, fit_columns, resolve

RNG = np.random.default_rng(0)
NORMAL, UNIFORM, POSITIVE = RNG.normal(size=300), RNG.random(300), RNG.lognormal(size=300)

CHOSEN = {
    "normal": (NORMAL, Column()),
    "negative": (-POSITIVE, Column()),
    "positive": (POSITIVE, Column(0.0)),
    "between 0 and 1": (UNIFORM, Column(0.0, 1.0)),
    "between 0 and 1, but far from 1": (UNIFORM / 2, Column(0.0)),
    "just above 1": (1.001 * UNIFORM / UNIFORM.max(), Column(0.0)),
    "counts": (RNG.poisson(50, 300), Column(0.0, step=1.0)),
    "few counts, whose largest is rare": (RNG.poisson(20, 60), Column(0.0, step=1.0)),
    "whole of both signs": (np.round(9 * NORMAL), Column(step=1.0)),
    "ratings": (RNG.integers(1, 6, 300), Column(0.0, 5.0, step=1.0)),
    "zeros and ones": (np.array([0, 1, 0, 0, 0, 0]), Column(0.0, 1.0, step=1.0)),
    "tenths": (np.round(NORMAL, 1), Column(step=0.1)),
    "hundredths of a share": (np.round(0.9 * UNIFORM, 2), Column(0.0, step=0.01)),
    "thirds": (RNG.integers(0, 4, 300) / 3, Column(0.0, 1.0, step=1 / 3)),
    "capped": (np.minimum(np.round(POSITIVE, 1), 2.5), Column(0.0, 2.5, step=0.1)),
    "rounded finely": (np.round(POSITIVE, 6), Column(0.0)),
    "shares with a 0 and a 1": (
        np.array([0, 0.02, 0.5, 0.93, 1]),
        Column(0.0, 1.0, margin=0.01),
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_supports_by_their_values(name):
    values, expected = CHOSEN[name]
    found = choose(np.asarray(values, float))
    assert (found.circular, math.isinf(found.upper)) == (False, math.isinf(expected.upper))
    np.testing.assert_allclose(found.bounds, expected.bounds, rtol=1e-12)
    np.testing.assert_allclose(found.step, expected.step, rtol=1e-12)
    np.testing.assert_allclose(found.margin, expected.margin, rtol=1e-12)


def test_given_supports_come_before_chosen_ones():
    rows = np.stack([NORMAL, UNIFORM, POSITIVE], axis=1)
    given = {"b": "unbounded", 2: (-1, 100), "a": Column(-9.0)}
    found = resolve(["a", "b", "c"], rows, given)
    assert found == [Column(-9.0), Column(), Column(-1.0, 100.0)]
    assert resolve(["a", "b", "c"], rows, None) == [Column(), Column(0.0, 1.0), Column(0.0)]


def test_values_at_a_bound_are_learned_and_samples_do_not_pass_it():
    """A circle has no margin: one of another length would be another circle."""
    x = np.array([0.0, 0.5, 1.0, 2.0])[:, None]
    (support,) = resolve(["a"], x, {"a": "positive"})
    assert support == Column(0.0, margin=0.25)
    assert support.cells == Column(-0.25)
    assert support.contains(x[:, 0]).all()
    assert not support.contains(np.array([-0.1])).any()
    np.testing.assert_array_equal(support.finish(np.array([-0.2, 0.1])), [0.0, 0.1])
    circle = Column(0.0, 2.0, circular=True)
    assert resolve(["a"], x, {"a": circle}) == [circle]


@pytest.mark.parametrize(
    ("support", "words"),
    [
        (Column(), "unbounded"),
        (Column(0.0), "positive"),
        (Column(2.0), "above 2"),
        (Column(upper=3.5), "below 3.5"),
        (Column(0.0, 1.0), "from 0 to 1"),
        (Column(step=1.0), "whole"),
        (Column(0.0, step=0.5), "in steps of 0.5, positive"),
        (Column(0.0, 360.0, 1.0, circular=True), "whole, circular, from 0 to 360"),
    ],
)
def test_words(support, words):
    assert str(support) == words


def test_samples_are_rounded_and_inside():
    found = Column(0.5, 3.5, step=1.0).finish(np.array([-2.0, 0.9, 1.1, 1.6, 9.0]))
    np.testing.assert_array_equal(found, [0.5, 0.5, 1.5, 1.5, 3.5])
    for dtype in (np.float32, np.float64):
        found = Column(0.0, 0.3).finish(np.array([0.0, 0.3, 0.1], dtype))
        assert found.dtype == dtype
        assert np.all((found.astype(float) > 0) & (found.astype(float) < 0.3))
        assert found[2] == dtype(0.1)
    hours = Column(0.0, 24.0, step=1.0, circular=True)
    np.testing.assert_array_equal(hours.finish(np.array([0.2, 23.4, 23.7])), [0, 23, 0])


def test_what_a_support_contains():
    x = np.array([-0.4, 0.0, 0.5, 1.0, 1.4])
    np.testing.assert_array_equal(Column(0.0, 1.0).contains(x), [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(Column(0.0, 1.0, step=1.0).contains(x), [0, 1, 1, 1, 0])
    assert Column(0.0, 1.0, circular=True).contains(x).all()
    assert Column().contains(x).all()


def test_noise_keeps_the_length_of_a_circle():
    assert Column(0.0, 24.0, 1.0, circular=True).cells == Column(0.0, 24.0, circular=True)
    assert Column(0.0, 24.0, 1.0).cells == Column(-0.5, 24.5)


@pytest.mark.parametrize(
    ("values", "least"),
    [
        (np.linspace(90, 270, 200), 89),  # cut at 0, which must not be taken for no circle
        (np.linspace(-80, 85, 200) % 360, 90),
        (RNG.random(200) * 360, 0),
    ],
)
def test_a_circle_is_cut_where_data_are_fewest(values, least):
    circle = Column(0.0, 360.0, circular=True)
    fitted = fit_columns(values[:, None], [circle])
    turn = float(fitted.turn[0])
    assert 0 < turn <= 360
    gap = np.min(np.abs((values - turn + 180) % 360 - 180))
    assert gap > least
    # All points are within the circle, whatever their turns.
    z = np.asarray(fitted.both(np.array([[370.0], [10.0], [-350.0]]), "to_base")[0])
    np.testing.assert_allclose(z, np.full((3, 1), z[0, 0]), rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lower": 1.0, "upper": 1.0}, "expected lower < upper; got 1.0 and 1.0"),
        ({"lower": math.nan}, "expected lower < upper"),
        ({"circular": True, "lower": 0.0}, "needs both bounds"),
        ({"step": -1.0}, "step must be at least 0 and finite; got -1.0"),
        ({"step": math.inf}, "step must be"),
        ({"step": math.nan}, "step must be"),
    ],
)
def test_bad_supports_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Column(**settings)
