"""Paths: their ends, coefficients and velocities; and the times drawn along them."""

import re

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, T, linear, slope
from scipy import integrate, stats

from jcnf import objectives
from jcnf.objectives import times
from jcnf.objectives.paths import (
    PATHS,
    SigmaMin,
    Stochastic,
    VariancePreserving,
    trigonometric,
    velocity,
)
from jcnf.objectives.times import TIMES

RNG = np.random.default_rng(0)
X0, X1, Z = jnp.asarray(RNG.normal(size=(3, 4)))
ALL = PATHS | {
    "sigma_min 0.3": SigmaMin(0.3),
    "variance_preserving 1 5": VariancePreserving(1.0, 5.0),
    "stochastic trigonometric": Stochastic(0.8, trigonometric),
}


def preserving(low, high, u):
    """Point of the variance-preserving path at noise time u."""
    exponent = low * u + (high - low) * u**2 / 2
    return np.exp(-exponent / 2) * X1 + np.sqrt(-np.expm1(-exponent)) * X0


# Where a path does not start in x0 or does not end in x1.
STARTS = {
    "variance_preserving": preserving(0.1, 20.0, 1.0),
    "variance_preserving 1 5": preserving(1.0, 5.0, 1.0),
}
ENDS = {
    "sigma_min": X1 + 0.01 * X0,
    "sigma_min 0.3": X1 + 0.3 * X0,
    "variance_preserving": preserving(0.1, 20.0, 1e-3),
    "variance_preserving 1 5": preserving(1.0, 5.0, 1e-3),
}


def coefficients(path, s):
    """Coefficients of x0, x1 and z in a path, which is linear in them."""
    zero, one = jnp.zeros(()), jnp.ones(())
    units = [(one, zero, zero), (zero, one, zero), (zero, zero, one)]
    return np.array([path(jnp.asarray(s), *unit) for unit in units])


@pytest.mark.parametrize("name", ALL)
def test_paths_lead_from_the_base_to_the_data(name):
    start, end = (ALL[name](jnp.asarray(s), X0, X1, Z) for s in (0.0, 1.0))
    np.testing.assert_allclose(start, STARTS.get(name, X0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(end, ENDS.get(name, X1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("s", [0.1, 0.45, 0.85])
def test_velocity_is_the_finite_difference(name, s):
    path = ALL[name]
    x, u = velocity(path, jnp.asarray(s), X0, X1, Z)
    np.testing.assert_array_equal(x, path(jnp.asarray(s), X0, X1, Z))
    by_difference = slope(lambda h: path(jnp.asarray(s + h), X0, X1, Z), h=1e-4)
    np.testing.assert_allclose(u, by_difference, rtol=0, atol=1e-9)
    assert np.min(np.abs(u)) > 1e-3


@pytest.mark.parametrize("s", [0.1, 0.45, 0.85])
def test_coefficients_are_those_of_the_formulas(s):
    def noise_rate(u):
        return 0.1 + (20 - 0.1) * u

    a = np.exp(-integrate.quad(noise_rate, 0, 1 - 0.999 * s)[0] / 2)
    bump = np.sin(np.pi * s) ** 2
    expected = {
        "linear": (1 - s, s, 0),
        "trigonometric": (np.cos(np.pi * s / 2), np.sin(np.pi * s / 2), 0),
        "sigma_min": (1 - 0.99 * s, s, 0),
        "variance_preserving": (np.sqrt(1 - a**2), a, 0),
        "stochastic": (1 - s, s, 0.1 * bump),
    }
    for name, path in PATHS.items():
        np.testing.assert_allclose(coefficients(path, s), expected[name], rtol=1e-12, atol=1e-15)


def test_a_stochastic_path_takes_another_gamma():
    bridge = Stochastic(0.5, trigonometric, lambda s: jnp.sqrt(s * (1 - s)))
    expected = (np.cos(0.1 * np.pi), np.sin(0.1 * np.pi), 0.5 * 0.4)
    np.testing.assert_allclose(coefficients(bridge, 0.2), expected, rtol=1e-12)


def test_a_path_and_times_of_ones_own():
    """x_s = s^2 x1 at s = 1/4, for the field A x whose flow ends at T."""
    flow, x = linear(), jnp.asarray(RNG.normal(size=(6, 3)))

    def path(s, x0, x1, z):
        return s**2 * x1

    def quarter(key, num):
        return jnp.full(num, 0.25)

    loss, metrics = objectives.flow_matching(flow, x, jr.key(0), path=path, time=quarter)
    error = np.asarray(x) @ MATRIX.T / 16 - np.asarray(x) / 2 / T
    assert float(loss) == pytest.approx(np.mean(np.sum(error**2, axis=1)), rel=1e-12)
    assert metrics == {"matching": loss}


@pytest.mark.usefixtures("unchecked")
def test_a_path_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=re.escape("points of shape (6, 3); got (6, 1)")):
        objectives.flow_matching(
            linear(), jnp.ones((6, 3)), jr.key(0), path=lambda s, x0, x1, z: s * x1[:1]
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SigmaMin(1.0), "sigma must be in [0, 1); got 1.0"),
        (lambda: SigmaMin(-0.1), "sigma must be in [0, 1); got -0.1"),
        (lambda: SigmaMin(np.nan), "sigma must be in [0, 1); got nan"),
        (
            lambda: VariancePreserving(0.0),
            "low must be positive and finite; got 0.0",
        ),
        (lambda: VariancePreserving(2.0, 1.0), "expected low <= high; got 2.0 and 1.0"),
        (lambda: VariancePreserving(2.0, np.inf), "high must be positive and finite; got inf"),
        (lambda: VariancePreserving(2.0, np.nan), "high must be positive and finite; got nan"),
        (lambda: Stochastic(-1.0), "sigma must be at least 0 and finite; got -1.0"),
        (lambda: Stochastic(np.inf), "got inf"),
        (lambda: Stochastic(np.nan), "got nan"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


KEYS, NUM = jr.split(jr.key(0), 4000), 7
CDF = {
    "uniform": lambda s: s,
    "stratified": lambda s: s,
    "data_biased": lambda s: 1 - (1 - s) ** (2 / 3),
    "logit_normal": lambda s: stats.norm.cdf(np.log(s / (1 - s))),
}


def many(name, keys=KEYS, num=NUM):
    return np.asarray(jax.vmap(lambda key: TIMES[name](key, num))(keys))


@pytest.mark.parametrize("name", TIMES)
def test_each_time_follows_its_distribution(name):
    drawn = many(name)
    assert drawn.shape == (len(KEYS), NUM)
    assert np.all((drawn >= 0) & (drawn < 1))
    for column in drawn.T:
        assert stats.kstest(column, CDF[name]).pvalue > 1e-3
    if name in ("uniform", "logit_normal"):
        correlation = np.corrcoef(drawn, rowvar=False) - np.eye(NUM)
        assert np.max(np.abs(correlation)) < 4 / np.sqrt(len(KEYS))


@pytest.mark.parametrize("num", [1, 7, 256])
def test_stratified_times_are_evenly_spread(num):
    cells = np.floor(many("stratified", KEYS[:100], num) * num)
    np.testing.assert_array_equal(np.sort(cells), np.tile(np.arange(num), (100, 1)))
    # The offset that moves all times of a batch is uniform.
    first = np.sort(many("stratified", KEYS[:100], num))[:, 0]
    assert stats.kstest(first * num, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", TIMES)
def test_in_float32_no_time_is_one(name):
    """At time 1 the velocity of a path may be undefined."""
    with jax.enable_x64(False):
        drawn = many(name, KEYS, 512)
    assert drawn.dtype == np.float32
    assert np.max(drawn) < 1
    assert np.min(drawn) >= 0


def test_stratified_times_have_less_variance_than_independent_ones():
    means = {name: np.var(np.mean(np.sin(3 * many(name)), axis=1)) for name in TIMES}
    assert means["stratified"] < means["uniform"] / 5
    assert times.TIMES.keys() == CDF.keys()
