"""Calibration of posteriors whose errors are known: theta ~ N(0, 1), x | theta ~ N(theta, 1)."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom, norm

from jcnf import sbi
from jcnf.sbi.calibration import _band, _chance_inside

STD = np.sqrt(0.5)  # of the posterior N(x/2, 1/2)


def simulations(rng, n=500, draws=99, dim=2, *, width=1.0, shift=0.0):
    """Return truths, observations, and draws of a posterior that is too wide by `width`."""
    theta = rng.normal(size=(n, dim))
    x = theta + rng.normal(size=(n, dim))
    noise = rng.normal(size=(n, draws, dim))
    return theta, x, x[:, None] / 2 + shift + width * STD * noise


def log_prob(theta, x, width=1.0):
    return norm.logpdf(theta, x / 2, width * STD).sum(axis=-1)


def coverage_of(theta, x, samples, width=1.0):
    logs = log_prob(theta, x, width), log_prob(samples, x[:, None], width)
    return sbi.expected_coverage(*logs)


# The band


def test_chance_inside_equals_a_sum_over_all_counts():
    """6 values in 4 intervals: every way to distribute them, by the multinomial distribution."""
    levels, lower, upper = np.array([0.2, 0.5, 0.9]), [0, 2, 4], [2, 5, 6]
    total = 0.0
    for counts in itertools.product(range(7), repeat=3):
        if all(low <= c <= high for low, c, high in zip(lower, counts, upper, strict=True)):
            # The count up to a level, given the one up to the next.
            ways = zip(counts, (*counts[1:], 6), levels, (*levels[1:], 1.0), strict=True)
            total += np.prod([binom.pmf(a, b, p / q) for a, b, p, q in ways])
    assert _chance_inside(6, levels, lower, upper) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("number", [30, 2000])
def test_the_band_holds_with_its_level_and_no_narrower_one_does(number):
    levels = tuple(np.arange(1, 100) / 100)
    lower, upper = _band(number, levels, 0.95)
    chance = _chance_inside(number, levels, lower, upper)
    assert 0.95 <= chance < 0.96
    tighter = _chance_inside(number, levels, lower + 1, upper - 1)
    assert tighter < 0.95


@pytest.mark.parametrize(("n", "draws"), [(40, 9), (300, 99)])
def test_uniform_ranks_are_inside_as_often_as_the_level_says(n, draws):
    found = sbi.rank_calibration(np.random.default_rng(0).integers(0, draws + 1, (n, 1000)), draws)
    assert found.coverage.shape == (1000, draws + 2)
    chance = _chance_inside(
        n,
        tuple(found.levels[1:-1]),
        *(np.round(n * edge[1:-1]).astype(int) for edge in (found.lower, found.upper)),
    )
    error = np.sqrt(0.95 * 0.05 / 1000)
    assert abs(found.inside.mean() - chance) < 4 * error
    assert abs((found.p_value <= 0.05).mean() - (1 - chance)) < 4 * error
    assert (found.p_value <= 0.5).mean() < 0.5 + 4 * np.sqrt(0.25 / 1000)
    np.testing.assert_array_equal(found.inside, found.p_value > 0.05)


def test_coverage_by_hand():
    found = sbi.rank_calibration(np.array([0, 0, 1, 3]), 3)
    np.testing.assert_array_equal(found.levels, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(found.coverage, [0, 0.5, 0.75, 0.75, 1])
    # Trapezoids of 1/4, 0 and 0 above the diagonal, at levels 1/2, 3/4 and 1.
    assert found.atc == pytest.approx(0.25 * 0.25 / 2)
    assert found.inside
    assert found.inside.shape == found.p_value.shape == found.atc.shape == ()


def test_p_values_by_hand():
    """3 ranks of 0 or 1: all are the same with probability 1/4, and no outcome is closer."""
    found = sbi.rank_calibration(np.array([[0, 0], [0, 0], [0, 1]]), 1)
    np.testing.assert_allclose(found.p_value, [0.25, 1], rtol=1e-12)


def test_atc_of_ranks_at_both_ends_of_its_range():
    low = sbi.rank_calibration(np.zeros(10, int), 999)
    high = sbi.rank_calibration(np.full(10, 999), 999)
    assert low.atc == pytest.approx(1 / 8, abs=1e-3)
    assert high.atc == pytest.approx(-3 / 8, abs=1e-2)
    assert not low.inside
    assert not high.inside


def test_many_draws_have_few_levels_that_draws_attain():
    found = sbi.rank_calibration(np.random.default_rng(0).integers(0, 1001, 200), 1000)
    assert len(found.levels) == 101
    np.testing.assert_allclose(found.levels * 1001, np.round(found.levels * 1001), atol=1e-9)


# Ranks


def test_ranks_by_hand():
    samples = np.array([[[0.0, 5.0], [2.0, 6.0], [3.0, 7.0]]])
    np.testing.assert_array_equal(sbi.ranks(np.array([[2.5, 1.0]]), samples), [[2, 0]])


def test_ranks_of_repeated_values_are_uniform_if_truths_and_draws_are_alike():
    values = np.random.default_rng(0).integers(0, 2, (4000, 4, 1))
    found = sbi.ranks(values[:, 0], values[:, 1:])
    counts = np.bincount(found[:, 0], minlength=4)
    assert abs(counts - 1000).max() < 4 * np.sqrt(4000 * 0.25 * 0.75)


# Posteriors


def test_an_exact_posterior_is_inside_as_often_as_the_level_says():
    rng, inside = np.random.default_rng(0), []
    for seed in range(300):
        theta, x, samples = simulations(rng, 100, 19)
        regions = sbi.tarp(theta, samples, seed=seed), coverage_of(theta, x, samples)
        inside.append([*sbi.sbc(theta, samples).inside, *(found.inside for found in regions)])
    error = np.sqrt(0.95 * 0.05 / 300)
    # The band for 100 simulations and 19 draws holds with probability 0.9524.
    np.testing.assert_allclose(np.mean(inside, axis=0), 0.9524, atol=4 * error)


@pytest.mark.parametrize(("width", "sign"), [(0.7, -1), (1.4, 1)])
def test_a_posterior_of_wrong_width_leaves_every_band_on_its_side(width, sign):
    theta, x, samples = simulations(np.random.default_rng(0), width=width)
    for found in (
        sbi.sbc(theta, samples),
        coverage_of(theta, x, samples, width),
        sbi.tarp(theta, samples),
    ):
        assert not found.inside.any()
        assert (found.p_value < 1e-3).all()
        assert (sign * found.atc > 0).all()


def test_expected_coverage_of_a_narrow_posterior_is_the_known_curve():
    """The region of mass a has a radius of w (-2 log(1 - a))^(1/2) true standard deviations."""
    theta, x, samples = simulations(np.random.default_rng(0), 4000, width=0.7)
    found = coverage_of(theta, x, samples, 0.7)
    truth = 1 - (1 - found.levels) ** 0.49
    assert abs(found.coverage - truth).max() < 4 * np.sqrt(0.25 / 4000) + 0.01  # 99 draws


def test_a_shifted_posterior_ranks_too_low_in_the_shifted_direction():
    theta, _, samples = simulations(np.random.default_rng(0), shift=0.3)
    found = sbi.sbc(theta, samples)
    assert not found.inside.any()
    assert (found.coverage[:, 1:-1] > found.levels[1:-1]).all()


def test_wrong_dependence_passes_sbc_and_leaves_the_band_of_tarp():
    """Parameters that are equal in truth, and independent in the posterior."""
    rng = np.random.default_rng(0)
    theta = np.repeat(rng.normal(size=(2000, 1)), 2, axis=1)
    samples = rng.normal(size=(2000, 99, 2))
    assert sbi.sbc(theta, samples, level=0.99).inside.all()
    assert not sbi.tarp(theta, samples).inside


def test_the_prior_passes_unless_references_depend_on_the_observation():
    rng = np.random.default_rng(0)
    theta, x, _ = simulations(rng)
    samples = rng.normal(size=(len(theta), 99, 2))
    assert sbi.sbc(theta, samples, level=0.99).inside.all()
    assert sbi.tarp(theta, samples, level=0.99).inside
    found = sbi.tarp(theta, samples, references=x / 2)
    assert not found.inside
    assert found.p_value < 1e-6
    # An exact posterior is inside with the same references.
    exact = x[:, None] / 2 + STD * rng.normal(size=samples.shape)
    assert sbi.tarp(theta, exact, references=x / 2, level=0.99).inside


def test_tarp_and_sbc_do_not_depend_on_units():
    theta, _, samples = simulations(np.random.default_rng(0), 100, 19)
    units = np.array([1024.0, 2.0**-10])  # exact in floating point
    for check in (sbi.tarp, sbi.sbc):
        ours, theirs = check(theta, samples), check(theta * units, samples * units)
        np.testing.assert_array_equal(ours.coverage, theirs.coverage)


def test_truths_outside_the_support_are_outside_every_region():
    found = sbi.expected_coverage(np.full(50, -np.inf), np.zeros((50, 9)))
    np.testing.assert_array_equal(found.coverage[:-1], 0)


# Input


THETA, SAMPLES = np.zeros((4, 2)), np.zeros((4, 3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sbi.ranks(THETA, SAMPLES[:3]), "theta of shape"),
        (lambda: sbi.ranks(THETA, SAMPLES.transpose(1, 0, 2)), "theta of shape"),
        (lambda: sbi.sbc(THETA, SAMPLES[:, :0]), "at least 1 draw"),
        (lambda: sbi.sbc(THETA + np.nan, SAMPLES), "theta has NaN"),
        (lambda: sbi.tarp(THETA, SAMPLES), "parameter 0 of theta is the same"),
        (lambda: sbi.tarp(np.eye(4, 2), SAMPLES, references=THETA[0]), "references"),
        (lambda: sbi.expected_coverage(THETA[:, 0], SAMPLES), "samples_log_prob of shape"),
        (lambda: sbi.expected_coverage(THETA[:, 0], SAMPLES[..., 0] + np.nan), "remove simul"),
        (lambda: sbi.rank_calibration(np.array([0, 5]), 4), "draws=4"),
        (lambda: sbi.rank_calibration(np.array([0.5]), 4), "whole numbers"),
        (lambda: sbi.rank_calibration(np.array([1]), 4, level=1.0), "level"),
        (lambda: sbi.rank_calibration(np.array([0]), 0), "draws must be"),
    ],
)
def test_calibration_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
