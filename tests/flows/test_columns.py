"""Maps of columns: round trips, log-dets, tails, far points, and a density that integrates to 1."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import astype
from scipy import special, stats

import jcnf
from jcnf import evaluate
from jcnf.distributions import StandardNormal
from jcnf.flows import Columns, Flow
from jcnf.sklearn.columns import Column, _log_density, _open, fit_columns

N, TURN = 801, 2 * math.pi  # all arrays have one shape, so that they share compiled programs
RNG = np.random.default_rng(0)


def two_hills(apart=3.0):
    return np.where(RNG.random(N) < 0.4, RNG.normal(-apart, 0.3, N), RNG.normal(apart, 0.8, N))


# By name: the support, rows, and whether a spline is needed.
KINDS = {
    "unbounded": (Column(), RNG.normal(5, 2, N), False),
    "unbounded spline": (Column(), two_hills(), True),
    "heavy tails": (Column(), RNG.standard_t(1.5, N), True),
    "positive": (Column(0.0), RNG.lognormal(1, 0.5, N), False),
    "positive spline": (Column(0.0), np.exp(two_hills()), True),
    "upper": (Column(upper=2.0), 2 - RNG.lognormal(0, 0.5, N), False),
    "upper spline": (Column(upper=0.0), -np.exp(two_hills(2.0)), True),
    "both": (Column(-1.0, 3.0), 4 * special.expit(RNG.normal(0, 1, N)) - 1, False),
    "both spline": (Column(0.0, 1.0), RNG.beta(0.5, 0.5, N), True),
    "circular": (Column(0.0, TURN, circular=True), RNG.normal(1, 0.4, N) % TURN, False),
    "degrees": (
        Column(-180.0, 180.0, circular=True),
        (np.append(RNG.normal(170, 5, N // 2), RNG.normal(60, 10, N - N // 2)) + 180) % 360 - 180,
        False,
    ),
}
SPLINES = [name for name, (_, _, spline) in KINDS.items() if spline]


@functools.cache
def fitted() -> Columns:
    supports, rows, _ = zip(*KINDS.values(), strict=True)
    return fit_columns(np.stack(rows, axis=1), supports)


def alone(name) -> Columns:
    """Return the map of one column; all have the same shapes and share compiled programs."""
    place = list(KINDS).index(name)
    return jax.tree.map(lambda a: a[place : place + 1], fitted())


@eqx.filter_jit
def both(columns, x, direction):
    """Return the image of values of one column and its log-det."""
    value, logdet = columns.both(x[:, None], direction)
    return value[:, 0], logdet


@eqx.filter_jit
def slopes(columns, x, direction):
    """Return the derivative of the map and that of its log-det, by autodiff."""

    def one(x):
        value, logdet = columns.both(x[None, None], direction)
        return value[0, 0], logdet[0]

    return jax.vmap(jax.jacfwd(one))(x)


def points(name, far=8.0):
    """Return z on a grid and the x that they are the images of."""
    z = jnp.linspace(-far, far, N)
    return z, both(alone(name), z, "to_data")[0]


@pytest.mark.parametrize("name", KINDS)
def test_a_column_has_knots_where_it_needs_them(name):
    assert (int(alone(name).knots[0]) > 0) == KINDS[name][2]


@pytest.mark.parametrize("name", KINDS)
def test_round_trip_of_data(name):
    x = jnp.asarray(KINDS[name][1])
    z, logdet = both(alone(name), x, "to_base")
    back, logdet_back = both(alone(name), z, "to_data")
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(logdet_back, -logdet, atol=1e-7)
    if KINDS[name][0].circular:
        assert np.all(np.abs(z) <= math.pi)
        return
    # About normal is the point of the map.
    assert stats.kstest(np.asarray(z), "norm").pvalue > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_samples_of_z_within_8_stay_inside_and_come_back(name):
    support = KINDS[name][0]
    z, x = points(name)
    assert np.all((x >= support.lower) & (x <= support.upper))
    # Close to 1, a number cannot tell how close it is: values beyond are rounded to the bound.
    inside = np.abs(z) < (4 if math.isfinite(support.upper) else 8)
    if support.circular:
        inside = np.abs(z) < math.pi
    back, _ = both(alone(name), x, "to_base")
    np.testing.assert_allclose(back[inside], z[inside], atol=1e-6)
    if not support.circular:
        assert np.all(np.diff(x[inside]) > 0)


@pytest.mark.parametrize("direction", ["to_base", "to_data"])
@pytest.mark.parametrize("name", KINDS)
def test_log_det_is_that_of_autodiff(name, direction):
    z, x = points(name, far=4.0)
    start = x if direction == "to_base" else z
    _, logdet = both(alone(name), start, direction)
    slope, _ = slopes(alone(name), start, direction)
    np.testing.assert_allclose(logdet, np.log(slope), atol=1e-7)


@pytest.mark.parametrize("name", SPLINES)
def test_value_and_slope_are_continuous_at_every_knot(name):
    column = alone(name)
    ends = jnp.resize(column.z[0, : int(column.knots[0])], N)
    found = {}
    for sign in (-1, 1):
        found[sign] = both(column, ends + sign * 1e-9, "to_data")
        again = both(column, found[sign][0], "to_base")
        np.testing.assert_allclose(again[0], ends + sign * 1e-9, atol=1e-10)
    (before, slope_before), (after, slope_after) = found[-1], found[1]
    assert np.all(after > before)
    np.testing.assert_allclose(slope_after, slope_before, atol=1e-5)
    np.testing.assert_allclose(after, before, atol=1e-8 * max(1, np.exp(np.max(slope_after))))


CUT = math.inf  # where the circle is cut
FAR = {
    "unbounded": (-1e30, 1e30),
    "unbounded spline": (-1e30, 1e30),
    "heavy tails": (-1e30, 1e30),
    "positive": (1e-300, 1e30),
    "positive spline": (1e-300, 1e30),
    "upper spline": (-1e30, -1e-300),
    "both spline": (1e-300, np.nextafter(1, 0)),
    "circular": (0.0, TURN, 1e6, -1e6, CUT, CUT),
    "degrees": (-180.0, 180.0, 1e6, -1e6, CUT),
}


@pytest.mark.parametrize("name", FAR)
def test_far_points_have_finite_densities_and_gradients(name):
    column = alone(name)
    cut = float(column.lower[0] + column.turn[0])
    x = np.resize([end if math.isfinite(end) else cut for end in FAR[name]], N)
    z, logdet = both(column, jnp.asarray(x), "to_base")
    assert np.all(np.isfinite(z))
    assert np.all(np.isfinite(logdet))
    slope, change = slopes(column, jnp.asarray(x), "to_base")
    assert np.all(np.isfinite(slope))
    assert np.all(np.isfinite(change))


@pytest.mark.parametrize("name", KINDS)
def test_the_density_integrates_to_1(name):
    support, _, _ = KINDS[name]
    if support.circular:
        x = jnp.linspace(support.lower, support.upper, N)
    else:
        _, x = points(name)
    x = np.interp(np.arange(16 * N) / 16, np.arange(N), x)
    parts = [both(alone(name), jnp.asarray(part), "to_base") for part in x.reshape(16, N)]
    z, logdet = (np.concatenate(part) for part in zip(*parts, strict=True))
    base = np.full(len(z), -math.log(TURN)) if support.circular else stats.norm.logpdf(z)
    density = np.exp(base + logdet)
    inside = np.isfinite(density)  # the last points may be rounded to a bound
    assert np.mean(inside) > 0.6
    assert abs(np.trapezoid(density[inside], x[inside]) - 1) < 2e-3


@pytest.mark.parametrize("name", SPLINES)
def test_the_density_is_that_of_cross_validation(name):
    support, _, _ = KINDS[name]
    column, (_, x) = alone(name), points(name, far=4.0)
    k = int(column.knots[0])
    u = (_open(np.asarray(x), support) - column.loc[0]) / column.scale[0]
    spline = {key: np.asarray(getattr(column, key))[0, :k] for key in ("u", "z", "slope")}
    tails = {key: getattr(column, key)[0] for key in ("log_mass", "tail_scale", "tail_index")}
    slope = np.ones(len(x)) / column.scale[0]
    opened = [1 / (x - support.lower), 1 / (support.upper - x)]
    opened = [np.asarray(one) for one in opened if np.all(np.asarray(one) > 0)]
    slope = slope * (sum(opened) if opened else 1)
    z, logdet = both(column, x, "to_base")
    expected = _log_density(np.asarray(u), **spline, **tails) + np.log(slope)
    np.testing.assert_allclose(stats.norm.logpdf(z) + logdet, expected, atol=1e-6)


def test_columns_are_a_flow_and_add_up():
    """In float64 and float32; rows outside the support are flagged, and fail alone."""
    flow = Flow(fitted(), StandardNormal(len(KINDS)))
    x = jnp.asarray(np.stack([rows for _, rows, _ in KINDS.values()], axis=1))[:20]
    found = eqx.filter_jit(jcnf.log_prob)(flow, x)
    expected = 0
    for place, name in enumerate(KINDS):
        z, logdet = both(alone(name), x[:, place], "to_base")
        expected += stats.norm.logpdf(z) + logdet
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    single = eqx.filter_jit(jcnf.log_prob)(astype(flow, jnp.float32), x.astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, atol=0.02)
    drawn = jcnf.sample(astype(flow, jnp.float32), jr.key(0), 50)
    for column, (support, _, _) in zip(np.asarray(drawn).T, KINDS.values(), strict=True):
        assert np.all((column >= support.lower) & (column <= support.upper))
    places = list(KINDS)
    outside = x.at[3, places.index("positive")].set(-1.0)
    outside = outside.at[7, places.index("both")].set(3.5)
    scores = evaluate.log_prob(flow, outside)
    np.testing.assert_array_equal(np.flatnonzero(scores.failed), [3, 7])
    np.testing.assert_array_equal(np.isnan(scores.log_prob), scores.failed)
    np.testing.assert_allclose(np.delete(scores.log_prob, [3, 7]), np.delete(found, [3, 7]))
