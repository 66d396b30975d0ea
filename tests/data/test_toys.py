"""Tests of the toys' samplers, densities and entropies, also against FFJORD's recipes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import special, stats

from jcnf._checks import InputError
from jcnf.data import toys
from jcnf.data.toys import TOYS, toy

NAMES = list(TOYS)
SIDE = 96  # points along the coarse grid
NUM = SIDE**2  # as many samples as grid points, so that each toy compiles one log_prob
CELLS = 16  # histogram cells along a side


@cache
def draw(name):
    return jax.jit(partial(TOYS[name].sample, num_samples=NUM))


@cache
def samples(name):
    return draw(name)(jr.key(NAMES.index(name)))


def grid_log_prob(name, half, side):
    """Log-density at the midpoints of side^2 cells of [-half, half]^2, and the area of a cell."""
    c = (np.arange(side) + 0.5) * (2 * half / side) - half
    points = np.stack(np.meshgrid(c, c, indexing="ij"), axis=-1).reshape(-1, 2)
    log_p = np.asarray(TOYS[name].log_prob(jnp.asarray(points))).reshape(side, side)
    return log_p, (2 * half / side) ** 2


coarse = cache(lambda name: grid_log_prob(name, TOYS[name].extent, SIDE))


def mass_and_entropy(log_p, area):
    p = np.exp(log_p)
    return p.sum() * area, -np.sum(p * np.where(p > 0, log_p, 0)) * area


def histogram_p_value(name, x):
    """Chi-square p-value of a histogram of x against the density, summed over each cell's grid."""
    log_p, area = coarse(name)
    fine = SIDE // CELLS
    expected = np.exp(log_p).reshape(CELLS, fine, CELLS, fine).sum(axis=(1, 3)) * area * len(x)
    edges = np.linspace(-TOYS[name].extent, TOYS[name].extent, CELLS + 1)
    observed = np.histogram2d(*np.asarray(x).T, bins=(edges, edges))[0]
    big = expected > 5  # small cells and the outside are merged into one
    observed, expected = ([*a[big], len(x) - a[big].sum() + 1e-9] for a in (observed, expected))
    return stats.chisquare(observed, expected, sum_check=False).pvalue


def reference(name, num, seed=0):
    """Sample by FFJORD's recipes in numpy (points as x1 + i x2) or scikit-learn's generators."""
    rng = np.random.default_rng(seed)
    uniform, normal = (partial(f, size=num) for f in (rng.random, rng.standard_normal))
    noise = normal() + 1j * normal()
    if name == "8gaussians":
        z = (4 * np.exp(0.25j * np.pi * rng.integers(8, size=num)) + 0.5 * noise) / 1.414
    elif name == "6gaussians":
        z = 4 * np.exp(1j * np.pi / 3 * rng.integers(6, size=num)) + 0.5 * noise
        z = z / np.stack([z.real, z.imag]).std()
    elif name == "2spirals":
        n = 3 * np.pi * np.sqrt(uniform())
        spiral = -n * np.exp(-1j * n) + 0.5 * (uniform() + 1j * uniform())
        z = rng.choice([-1, 1], size=num) * spiral / 3 + 0.1 * noise
    elif name == "checkerboard":
        x1 = rng.uniform(-2, 2, size=num)
        z = 2 * (x1 + 1j * (uniform() - 2 * rng.integers(2, size=num) + np.floor(x1) % 2))
    elif name == "pinwheel":
        f = 1 + 0.3 * normal() + 0.1j * normal()
        angle = 2 * np.pi / 5 * rng.integers(5, size=num) + 0.25 * np.exp(f.real)
        z = 2 * f * np.exp(-1j * angle)
    elif name == "parabola":
        x1 = 0.5 * normal()
        z = x1 + 0.5j * (x1**2 + 0.1 * normal() - 1)
    elif name == "rings":
        radius = 3 * rng.choice([1, 0.75, 0.5, 0.25], size=num)
        z = radius * np.exp(2j * np.pi * uniform()) + 0.08 * noise
    else:
        make = pytest.importorskip("sklearn.datasets")
        if name == "moons":
            return 2 * make.make_moons(num, noise=0.1, random_state=seed)[0] - np.array([1, 0.2])
        if name == "circles":
            return 3 * make.make_circles(num, factor=0.5, noise=0.08, random_state=seed)[0]
        if name == "2circles":
            return make.make_circles(num, factor=0.5, noise=0.06, random_state=seed)[0]
        return make.make_swiss_roll(num, noise=1.0, random_state=seed)[0][:, [0, 2]] / 5
    return np.stack([z.real, z.imag], axis=-1)


def assert_mean_is_entropy(name, x):
    log_p = np.asarray(TOYS[name].log_prob(jnp.asarray(x)))
    # The log-density of the checkerboard is constant, so only rounding remains.
    assert abs(-log_p.mean() - TOYS[name].entropy) <= 4 * stats.sem(log_p) + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_repeatable_in_jit_and_of_the_default_dtype(name):
    x = draw(name)(jr.key(3))
    assert x.shape == (NUM, 2)
    assert x.dtype == jnp.float64
    np.testing.assert_array_equal(x, draw(name)(jr.key(3)))
    assert np.all(np.any(np.asarray(x != draw(name)(jr.key(4))), axis=1))
    assert np.mean(np.abs(samples(name)) > TOYS[name].extent) == 0


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    x = np.array(samples(name), np.float32)
    x[0], x[1] = (3e3, -2e3), (0, 0)
    log_p = TOYS[name].log_prob(jnp.asarray(x))
    assert log_p.dtype == jnp.float32
    exact = TOYS[name].log_prob(jnp.asarray(x, jnp.float64))
    np.testing.assert_allclose(log_p[1:], exact[1:], atol=3e-5)
    # Far out, the log-density grows as the squared distance, for the parabola as its fourth power.
    lowest = -1e17 if name == "parabola" else -1e10
    assert log_p[0] == -np.inf if name == "checkerboard" else lowest < log_p[0] < -1e6
    with jax.enable_x64(False):
        sample = jax.eval_shape(partial(TOYS[name].sample, num_samples=3), jr.key(0))
    assert sample.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_density_has_mass_one_and_the_entropy_of_the_table(name):
    mass, entropy = mass_and_entropy(*coarse(name))
    assert mass == pytest.approx(1, abs=1e-5)
    assert entropy == pytest.approx(TOYS[name].entropy, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_entropy_on_a_fine_grid(name):
    # The checkerboard needs whole squares; the wider windows of the others hold all but 1e-14.
    grids = {"checkerboard": (8, 512), "parabola": (7.5, 900)}
    half, side = grids.get(name, (1.5 * TOYS[name].extent, 900))
    mass, entropy = mass_and_entropy(*grid_log_prob(name, half, side))
    assert mass == pytest.approx(1, abs=1e-8)
    assert entropy == pytest.approx(TOYS[name].entropy, abs=TOYS[name].entropy_error + 1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density(name):
    x = np.asarray(samples(name))
    assert_mean_is_entropy(name, x)
    assert histogram_p_value(name, x) > 1e-3
    assert histogram_p_value(name, 1.04 * x) < 1e-6  # the check can fail


@pytest.mark.parametrize("name", ["2spirals", "checkerboard", "pinwheel", "moons", "swissroll"])
def test_histogram_tells_a_toy_from_its_mirror_image(name):
    assert histogram_p_value(name, np.asarray(samples(name)) * np.array([-1, 1])) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_density_is_that_of_ffjords_recipe(name):
    x = reference(name, NUM)
    assert_mean_is_entropy(name, x)
    assert histogram_p_value(name, x) > 1e-3


@pytest.mark.parametrize("name", ["2spirals", "moons", "swissroll"])
def test_curve_quadrature_against_a_midpoint_rule(name):
    x = samples(name)[:32]
    v = (np.arange(20_000) + 0.5) / 20_000
    path = {"2spirals": toys._spiral, "moons": toys._moon, "swissroll": toys._roll}[name]
    curve = np.asarray(path(jnp.asarray(v**2)))
    center = np.array([0, 0.3]) if name == "moons" else np.zeros(2)

    def density(y):
        d = y[:, None, :] - curve
        if name == "2spirals":
            p = np.prod(stats.norm.cdf(d + 1 / 12, 0, 0.1) - stats.norm.cdf(d - 1 / 12, 0, 0.1), -1)
            p = p * 36
        else:
            p = np.prod(stats.norm.pdf(d, 0, 0.2), -1)
        return np.mean(p * 2 * v, axis=1)

    y = np.asarray(x) - center
    p = density(y) if name == "swissroll" else (density(y) + density(-y)) / 2
    np.testing.assert_allclose(TOYS[name].log_prob(samples(name))[:32], np.log(p), atol=2e-6)


def test_pinwheel_sums_over_every_preimage():
    x = np.concatenate([np.asarray(samples("pinwheel"))[:40], [[0.01, 0.02], [0.3, -0.2]]])
    a = np.linspace(-np.pi, np.pi, 100_001)
    expected = []
    for point in x[:, 0] / 2 + 0.5j * x[:, 1]:
        f = abs(point) * np.exp(1j * a)
        turns = (a - 0.25 * np.exp(f.real) - np.angle(point)) / (2 * np.pi / 5)
        (at,) = np.nonzero(np.diff(np.floor(turns)))
        slope = np.abs(np.diff(turns)[at] / np.diff(a)[at]) * (2 * np.pi / 5)
        p = stats.norm.pdf(f.real[at], 1, 0.3) * stats.norm.pdf(f.imag[at], 0, 0.1)
        assert len(at) >= 5
        expected.append(np.sum(p / slope) / 20)
    np.testing.assert_allclose(
        TOYS["pinwheel"].log_prob(jnp.asarray(x)), np.log(expected), atol=2e-3
    )


def test_blurred_square_is_a_difference_of_cdfs_in_both_ranges():
    d = np.linspace(0, 4, 401)[:, None]
    upper, lower = (special.log_ndtr((s / 12 - d) / 0.1) for s in (1, -1))
    expected = np.sum(upper + np.log1p(-np.exp(lower - upper)) + np.log(6), axis=-1)
    log_kernel = toys._log_blurred_square(1 / 6, 0.1)
    np.testing.assert_allclose(log_kernel(jnp.asarray(d)), expected, rtol=1e-12, atol=2e-6)
    np.testing.assert_allclose(
        log_kernel(jnp.asarray(d, jnp.float32)), expected, rtol=2e-6, atol=1e-5
    )


def test_checkerboard_is_minus_infinity_off_its_squares():
    x = jnp.array([[0.5, 0.5], [0.5, 2.5], [-0.5, 0.5], [4.5, 0.5], [0.5, -4.5], [-3.9, -3.9]])
    inside = np.array([True, False, False, False, False, True])
    expected = np.where(inside, -np.log(32), -np.inf)
    np.testing.assert_allclose(TOYS["checkerboard"].log_prob(x), expected)


@pytest.mark.parametrize("name", ["checkerboard", "pinwheel", "moons"])
def test_nan_is_not_masked(name):
    log_p = TOYS[name].log_prob(jnp.array([[0.5, 0.5], [np.nan, 0.5], [0.5, np.nan]]))
    np.testing.assert_array_equal(np.isnan(log_p), [False, True, True])


def test_a_toy_is_found_by_its_name():
    assert toy("moons") is TOYS["moons"]
    with pytest.raises(InputError, match=r"did you mean 'pinwheel'.*8gaussians, 2spirals"):
        toy("pinweel")
    with pytest.raises(InputError, match="no toy is called 'xyz': The toys are"):
        toy("xyz")
