"""Inpainting, against the conditional of a linear flow's Gaussian; known entries stay fixed."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import COVARIANCE, NotANumber, exact
from scipy import linalg

from jcnf import CNF, Solve
from jcnf.distributions import StandardNormal
from jcnf.inference import inpaint, mala

KNOWN = np.array([False, True, False])
MISSING = [0, 2]
GAIN = COVARIANCE[MISSING, 1] / COVARIANCE[1, 1]
CONDITIONAL = COVARIANCE[np.ix_(MISSING, MISSING)] - np.outer(GAIN, COVARIANCE[1, MISSING])


@pytest.fixture(scope="module")
def langevin():
    return eqx.filter_jit(mala.langevin)


@pytest.fixture(scope="module")
def ascend():
    return eqx.filter_jit(inpaint.ascend)


def gaussian(x):
    return -jnp.sum(x @ jnp.asarray(linalg.inv(COVARIANCE)) * x, axis=1) / 2


def faster(i):
    return 0.3


def cliff(x):
    """Log-density of a standard normal, but NaN where the first component exceeds 1."""
    return jnp.where(x[:, 0] > 1, jnp.nan, -jnp.sum(x**2, axis=1) / 2)


def test_langevin_of_gaussian_samples_the_conditional(langevin):
    rows = 4000
    x = jnp.zeros((rows, 3)).at[:, 1].set(jnp.linspace(-2, 2, rows))
    density = mala.Density(exact())
    scale = np.sqrt(np.diag(COVARIANCE))
    chains = langevin(density, x, KNOWN, jr.key(0), steps=20, burn_in=40, scale=scale)
    # Rows are independent, so take one state of each, relative to its own conditional mean.
    centered = np.asarray(chains.x[-1])[:, MISSING] - np.asarray(x[:, 1:2]) * GAIN
    spread = np.sqrt(np.diag(CONDITIONAL) / rows)
    assert np.all(abs(centered.mean(axis=0)) < 4 * spread)
    errors = np.sqrt((CONDITIONAL**2 + np.outer(*[np.diag(CONDITIONAL)] * 2)) / rows)
    assert np.all(abs(centered.T @ centered / rows - CONDITIONAL) < 4 * errors)
    np.testing.assert_array_equal(chains.x[-1][:, 1], x[:, 1])
    assert abs(chains.acceptance.mean() - mala.OPTIMAL_ACCEPTANCE) < 0.1
    assert chains.failed.sum() == 0
    np.testing.assert_allclose(chains.log_prob[-1], density(chains.x[-1]), rtol=1e-10)


def test_langevin_without_rejections_is_biased():
    """At a step size such as the burn-in finds, the chain without rejections is too wide."""
    h, x = 1.4, jnp.zeros((4000, 1))
    for i in range(60):
        x = x - h**2 / 2 * x + h * jr.normal(jr.key(i), x.shape)
    chains = mala.langevin(
        lambda x: -jnp.sum(x**2, axis=1) / 2,
        jnp.zeros((4000, 1)),
        np.array([False]),
        jr.key(0),
        steps=60,
        burn_in=0,
        step=h,
    )
    error = 4 * np.sqrt(2 / 4000)
    assert x.var() > 1 + 4 * error
    assert abs(chains.x[-1].var() - 1) < error
    np.testing.assert_allclose(chains.step, h, rtol=1e-12)


def test_ascend_of_gaussian_converges_to_the_conditional_mode(ascend):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    density = mala.Density(exact())
    found = ascend(density, x, KNOWN, jr.key(0), steps=200, keep=4, rate=faster, noise=0.0)
    mode = np.asarray(x[:, 1:2]) * GAIN
    np.testing.assert_allclose(found.x[-1][:, MISSING], mode, atol=1e-3)
    np.testing.assert_array_equal(found.x[..., 1], jnp.broadcast_to(x[:, 1], (4, 5)))
    assert np.all(np.diff(found.log_prob, axis=0) > 0)


def test_ascend_step_equals_the_rule_of_the_paper(ascend):
    x, key = jnp.ones((2, 3)), jr.key(3)
    found = ascend(gaussian, x, KNOWN, key, steps=3, keep=3, noise=0.5)
    for i, after in enumerate(found.x):
        e = 0.5 * jr.normal(jr.fold_in(key, i + 1), x.shape)
        moved = x + 10 / (100 + i) * (jax.grad(lambda x: gaussian(x).sum())(x) + e)
        x = x.at[:, MISSING].set(moved[:, MISSING])
        np.testing.assert_allclose(after, x, rtol=1e-12)


def test_bounds_hold_and_samples_within_follow_the_density(langevin, ascend):
    x = jnp.full((4000, 3), 0.1).at[:, 1].set(5.0)
    arguments = {"steps": 40, "bounds": (-0.2, 0.6)}
    chains = langevin(gaussian, x, KNOWN, jr.key(0), burn_in=40, **arguments)
    free = np.asarray(chains.x[-1])[:, MISSING]
    assert free.min() >= -0.2
    assert free.max() <= 0.6
    np.testing.assert_array_equal(chains.x[-1][:, 1], 5.0)
    line = np.linspace(-0.2, 0.6, 401)
    points = np.stack(np.meshgrid(line, [5.0], line, indexing="ij"), -1).reshape(-1, 3)
    weights = np.exp(gaussian(jnp.asarray(points)))
    mean = np.average(points[:, MISSING], axis=0, weights=weights)
    assert np.all(abs(free.mean(axis=0) - mean) < 4 * free.std(axis=0) / np.sqrt(len(free)))
    found = ascend(gaussian, x, KNOWN, jr.key(0), noise=1.0, **arguments)
    assert np.all(found.x[-1][:, MISSING] <= 0.6)
    assert np.any(found.x[-1][:, MISSING] == 0.6)


def test_nan_regions_do_not_affect_other_rows(langevin, ascend):
    known = np.array([False, True])
    x = jnp.zeros((1000, 2)).at[0, 0].set(3.0).at[1, 0].set(jnp.nan)
    chains = langevin(cliff, x, known, jr.key(0), steps=40, burn_in=30)
    free = chains.x[-1, 2:, 0]
    assert np.all(free <= 1)
    # A standard normal truncated at 1 has mean -phi(1) / Phi(1) = -0.2876.
    assert abs(free.mean() + 0.2876) < 4 * free.std() / np.sqrt(len(free))
    assert np.all(chains.failed[:2] > 0)
    assert chains.failed[2:].sum() > 0
    ascent = ascend(cliff, x, known, jr.key(0), steps=5)
    np.testing.assert_array_equal(ascent.x[-1, :2], x[:2])
    np.testing.assert_array_equal(ascent.failed[:2], 6)  # 5 steps and the start
    assert np.all(np.isfinite(ascent.log_prob[-1, 2:]))


def test_density_failed_solve_affects_only_its_row():
    flow = CNF(NotANumber(), StandardNormal(2))
    x = jnp.array([[0.3, -0.2], [2.0, 0.0], [-0.5, 0.5]])
    solve = Solve("euler", step=0.25, norm="worst")
    density = mala.Density(flow, solve=solve)
    value, gradient = jax.jit(lambda x: mala.value_and_gradient(density, x))(x)
    alone, shrunk = x[np.array([0, 2])], 0.75**4
    # With v = x, each of the four Euler steps back multiplies x by 0.75; the divergence is 2.
    expected = -np.sum((alone * shrunk) ** 2, axis=1) / 2 - np.log(2 * np.pi) - 2
    np.testing.assert_allclose(value[np.array([0, 2])], expected, rtol=1e-10)
    np.testing.assert_allclose(gradient[np.array([0, 2])], -alone * shrunk**2, rtol=1e-10)
    assert value[1] == -np.inf
    np.testing.assert_array_equal(gradient[1], 0)


def test_langevin_one_mask_per_row(langevin):
    known = np.array([[True, True, True], [False, False, False], [True, False, True]])
    x = jnp.ones((3, 3))
    chains = langevin(gaussian, x, known, jr.key(0), steps=300, burn_in=300, keep=2)
    np.testing.assert_array_equal(chains.x[:, known], 1)
    assert np.all(chains.x[:, ~known] != 1)
    assert chains.acceptance[0] == 1
    assert np.all(np.isfinite(chains.step))


def test_langevin_same_key_gives_same_result_from_one_program(langevin):
    traced = []

    def log_prob(x):
        traced.append(x.shape)
        return gaussian(x)

    x, known = jnp.zeros((4, 3)), jnp.asarray(KNOWN)
    settings = {"steps": 4, "burn_in": 2, "keep": 2}
    first = langevin(log_prob, x, known, jr.key(0), **settings)
    again = langevin(log_prob, x, known, jr.key(0), **settings)
    other = langevin(log_prob, x + 0.1, ~known, jr.key(1), **settings)
    assert traced == [(4, 3)]
    np.testing.assert_array_equal(first.x, again.x)
    assert np.all(first.x[-1, :, 1] != other.x[-1, :, 1])


def test_ascend_kept_states_lie_on_the_path(ascend):
    assert list(mala.kept_steps(7, 3)) == [2, 5, 7]
    x = jnp.ones((2, 3))
    few, all_of_them = (
        ascend(gaussian, x, KNOWN, jr.key(0), steps=7, keep=keep) for keep in (3, 7)
    )
    np.testing.assert_array_equal(few.x, all_of_them.x[np.array([1, 4, 6])])


def test_langevin_and_ascend_keep_float32(langevin, ascend):
    def log_prob(x):
        return -jnp.sum(x**2, axis=1)

    x = jnp.ones((2, 3), jnp.float32)
    chains = langevin(log_prob, x, KNOWN, jr.key(0), steps=2, burn_in=2, scale=np.ones(3))
    ascent = ascend(log_prob, x, KNOWN, jr.key(0), steps=2, bounds=(0.0, 1.0))
    floats = [*chains[:4], *ascent[:2]]
    assert {a.dtype for a in floats} == {np.dtype(np.float32)}


def test_half_is_true_on_one_side():
    mask = inpaint.half((3, 2, 2), "top").reshape(3, 2, 2)
    np.testing.assert_array_equal(mask[:, 0, 0], [True, False, False])
    assert np.all(mask == mask[:, :1, :1])
    right = inpaint.half((3, 4, 1), "right").reshape(3, 4)
    np.testing.assert_array_equal(right, np.tile([False, False, True, True], (3, 1)))


@pytest.mark.usefixtures("unchecked")
def test_inpaint_bad_arguments_raise():
    x = jnp.zeros((2, 3))
    key, steps = jr.key(0), {"steps": 2}
    with pytest.raises(ValueError, match=r"expected known of shape \(2, 3\) or \(3,\)"):
        inpaint.ascend(gaussian, x, np.ones(2, bool), key, **steps)
    with pytest.raises(ValueError, match="known of dtype bool"):
        inpaint.ascend(gaussian, x, np.ones(3), key, **steps)
    with pytest.raises(ValueError, match=r"floating x of shape \(batch, dim\)"):
        inpaint.ascend(gaussian, x[0], KNOWN, key, **steps)
    with pytest.raises(ValueError, match="keep must be from 1"):
        inpaint.ascend(gaussian, x, KNOWN, key, steps=2, keep=3)
    with pytest.raises(ValueError, match="low < high"):
        inpaint.ascend(gaussian, x, KNOWN, key, steps=2, bounds=(1.0, 0.0))
    with pytest.raises(ValueError, match="burn_in"):
        mala.langevin(gaussian, x, KNOWN, key, steps=2, burn_in=-1)
    with pytest.raises(ValueError, match="unknown side"):
        inpaint.half((2, 2, 1), "middle")
