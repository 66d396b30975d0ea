"""Out-of-distribution scores, codes of images, and the AUROC of a score."""

import itertools
import math
import zlib

import numpy as np
import pytest

from jcnf import plot
from jcnf.data.images.noise import shuffled, uniform_noise
from jcnf.evaluate import auroc, code_length, ood

RNG = np.random.default_rng(0)


def test_scores_by_hand():
    log_prob = np.array([-3.0, 1.0, 4.0])
    np.testing.assert_array_equal(ood.likelihood(log_prob), [3, -1, -4])
    reference = np.array([0.0, 2.0])
    np.testing.assert_array_equal(ood.typicality(log_prob, reference), [4, 0, 3])
    np.testing.assert_array_equal(ood.ratio(log_prob, np.ones(3)), [4, 0, -3])


def test_complexity_is_the_difference_of_two_codes():
    """P gives each of 2 pixels one of 4 levels with probability 1/2: a density of 16/4 there."""
    log_prob = np.log([4.0, 1.0])  # the second image has the uniform density, 2 bits per pixel
    np.testing.assert_allclose(
        ood.complexity(log_prob, np.array([3.0, 3.0]), 2, 4), [2 - 3, 4 - 3], atol=1e-14
    )


# AUROC


def test_auroc_by_hand():
    """4 of 6 pairs are in order and 1 is a tie; DeLong's placements: 1/2, 1 and 1, 3/4, 1/2."""
    value, stderr = auroc(np.array([3.0, 1.0, 2.0]), np.array([2.0, 4.0]))
    assert value == 0.75
    assert stderr == pytest.approx(math.sqrt(0.125 / 2 + 0.0625 / 3), rel=1e-14)


@pytest.mark.parametrize("distinct", [2, 5, 1000])
def test_auroc_counts_pairs(distinct):
    inside, outside = (RNG.integers(0, distinct, size).astype(float) for size in (70, 41))
    pairs = [(o > i) + (o == i) / 2 for i, o in itertools.product(inside, outside)]
    assert auroc(inside, outside).value == np.mean(pairs)
    assert auroc(outside, inside).value == pytest.approx(1 - np.mean(pairs), rel=1e-14)


def test_auroc_of_normals_and_its_error():
    """The value is Phi(shift / sqrt 2), and the error is its spread over 400 draws."""
    draws = RNG.normal(size=(400, 2, 120)) + np.array([0.0, 1.0])[:, None]
    found = np.array([auroc(*pair) for pair in draws])
    truth = 0.5 * (1 + math.erf(1 / 2))
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean() - truth) < 4 * spread / math.sqrt(400)
    assert found[:, 1].mean() == pytest.approx(spread, rel=4 / math.sqrt(2 * 400))


def test_auroc_at_its_limits():
    low, high = np.array([-np.inf, 0.0, 1.0]), np.array([2.0, np.inf])
    assert auroc(low, high) == (1.0, 0.0)
    assert auroc(high, low) == (0.0, 0.0)
    assert auroc(np.zeros(3), np.zeros(4)) == (0.5, 0.0)
    assert auroc(low, np.array([0.5])) == (2 / 3, np.inf)


@pytest.mark.parametrize("bad", [np.array([0.0, np.nan]), np.empty(0)])
def test_auroc_refuses_what_has_no_order(bad):
    with pytest.raises(ValueError, match=r"expected outside scores .* leave out"):
        auroc(np.zeros(3), bad)
    with pytest.raises(ValueError, match="expected inside scores"):
        auroc(bad, np.zeros(3))


# Codes


def test_noise_takes_the_plain_code_and_no_more():
    noise = uniform_noise(RNG, 4, 784, 256)
    np.testing.assert_array_equal(code_length(noise, (28, 28, 1), 256), 784 * 8)
    noise = uniform_noise(RNG, 4, 64, 17)
    np.testing.assert_allclose(code_length(noise, (8, 8, 1), 17), 64 * math.log2(17), rtol=1e-14)
    assert noise.dtype == np.uint8
    assert set(np.unique(uniform_noise(RNG, 50, 64, 17))) == set(range(17))


def adaptive(symbols, levels):
    """Length of Krichevsky and Trofimov's code, a symbol at a time."""
    counts, bits = [0.5] * levels, 0.0
    for symbol in symbols:
        bits -= math.log2(counts[symbol] / sum(counts))
        counts[symbol] += 1
    return bits


def test_code_length_small_images_take_the_adaptive_code():
    ramp = np.arange(8, dtype=np.uint8)
    images = np.stack([np.minimum(ramp[:, None], 2) * ramp % 4, ramp[:, None] % 17 + 0 * ramp])
    gray, steps = images[0], np.diff(images[1].astype(int), axis=0, prepend=0)
    codes = code_length(images.reshape(2, 64), (8, 8, 1), 17)
    assert codes[0] <= adaptive(gray.ravel(), 17) + 1e-9
    assert codes[1] == pytest.approx(adaptive(steps.ravel(), 17), rel=1e-12)  # to the row above


def test_codes_see_order_where_there_is_some():
    """A slope takes more bits by deflate, with no two rows alike, than by PNG's differences."""
    y, x = np.mgrid[:28, :28]
    slope = (5 * y + 3 * x + y * x // 7).astype(np.uint8).reshape(1, 784)
    length = code_length(slope, (28, 28, 1), 256)[0]
    assert length < 8 * len(zlib.compress(slope.tobytes(), 9)) / 2
    mixed = shuffled(RNG, slope)
    assert code_length(mixed, (28, 28, 1), 256)[0] > 2 * length
    assert code_length(np.zeros((1, 784), np.uint8), (28, 28, 1), 256)[0] < 200
    color = np.repeat(slope, 3, axis=1)
    assert length < code_length(color, (28, 28, 3), 256)[0] < 3 * length


def test_no_code_is_shorter_than_counting_allows():
    """Kraft: summed over all images, 2^-length is at most 1 for each of the seven codes."""
    every = (np.arange(2**12)[:, None] >> np.arange(12)) & 1
    lengths = code_length(every.astype(np.uint8), (3, 4, 1), 2)
    assert 1 <= np.sum(2.0**-lengths) <= 7
    assert 0 < lengths.min() < lengths.max() == 12


def test_code_length_bad_images_raise(unchecked):
    pixels = uniform_noise(RNG, 2, 64, 17)
    with pytest.raises(ValueError, match=r"got uint8 \(2, 64\) for \(8, 7, 1\)"):
        code_length(pixels, (8, 7, 1), 17)
    with pytest.raises(ValueError, match="1 or 3 channels"):
        code_length(pixels, (4, 8, 2), 17)
    with pytest.raises(ValueError, match=r"at most 4 for levels=5; got"):
        code_length(pixels, (8, 8, 1), 5)


def test_shuffled_images_keep_their_gray_values():
    pixels = np.tile(np.arange(200, dtype=np.uint8), (2, 1))
    mixed = shuffled(RNG, pixels)
    np.testing.assert_array_equal(np.sort(mixed, axis=1), pixels)
    assert (mixed != pixels).mean() > 0.9
    assert (mixed[0] != mixed[1]).mean() > 0.9  # each by its own permutation


# The figure


def test_histograms_are_shares_and_say_what_they_leave_out():
    inside = RNG.normal(size=1000)
    sets = {"in": inside, "near": inside + 1, "far": np.r_[np.full(99, 1e6), np.nan]}
    panel = plot.HistogramPanel("score (nats)", sets, {"near": 0.76, "far": 1.0})
    left, right = plot.score_histograms(
        [panel, plot.HistogramPanel("other", {"near": inside})]
    ).axes
    first, near, far = (patch.get_data().values for patch in left.patches)
    assert first.sum() == pytest.approx(1)
    assert near.sum() == pytest.approx(1)
    assert far[-1] == 1
    low, high = left.get_xlim()
    assert inside.min() >= low > -20
    assert high < 20
    assert left.get_ylim()[1] < 2 * max(first.max(), near.max())  # the far values do not squeeze it
    assert left.get_title() == "far: 99 beyond the view\nfar: 1 not finite, left out"
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert legend == ["in", "near, AUROC 0.760", "far, AUROC 1.000"]
    assert left.patches[1].get_edgecolor()[:3] == right.patches[0].get_facecolor()[:3]
    with pytest.raises(ValueError, match=r"expected in of shape \(n,\)"):
        plot.score_histograms([plot.HistogramPanel("score", {"in": np.zeros((2, 2))})])


def test_codes_and_typicality_refuse_what_gives_no_number(unchecked):
    pixels = np.zeros((2, 4), np.uint8)
    for x, shape, levels, fault in (
        (pixels, (2, 2), 17, "expected uint8 pixels"),
        (pixels.astype(float), (2, 2, 1), 17, "expected uint8 pixels"),
        (pixels, (2, 2, 1), 70_000, "at most 256 for uint8"),
    ):
        with pytest.raises(ValueError, match=fault):
            code_length(x, shape, levels)
    for reference in (np.empty(0), np.array([np.nan])):
        with pytest.raises(ValueError, match="without NaN"):
            ood.typicality(np.ones(3), reference)
