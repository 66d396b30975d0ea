"""Mixture weights and mixed densities against known answers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jcnf.flows import ODE, Affine
from jcnf.sklearn import FlowDensity
from jcnf.sklearn.mixture import (
    MIN_WEIGHT,
    Mixture,
    Plan,
    best_weights,
    from_scores,
    log_mean,
    skeleton,
)

LAWS = [stats.norm(0, 1), stats.norm(4, 0.5), stats.norm(-3, 2)]


def draw(weights, n=20_000):
    rng = np.random.default_rng(0)
    which = rng.choice(len(weights), size=n, p=weights)
    means, stds = (np.array([getattr(law, name)() for law in LAWS]) for name in ("mean", "std"))
    return rng.normal(means[which], stds[which])


def log_probs(x):
    return np.stack([law.logpdf(x) for law in LAWS], axis=1)


@pytest.mark.parametrize("weights", [(0.3, 0.5, 0.2), (0.1, 0.9, 0.0), (0.0, 0.0, 1.0)])
def test_best_weights_are_those_that_drew_the_rows(weights):
    found = best_weights(log_probs(draw(weights)))
    assert abs(found.sum() - 1) < 1e-12
    np.testing.assert_allclose(found, weights, atol=0.02)
    np.testing.assert_array_equal(found == 0, np.array(weights) == 0)


def test_a_component_of_small_weight_gets_none():
    found = best_weights(log_probs(draw((0.5, 0.5 - MIN_WEIGHT / 2, MIN_WEIGHT / 2))))
    assert found[2] == 0
    assert abs(found.sum() - 1) < 1e-12


def test_best_weights_maximize_the_likelihood():
    held_out = log_probs(draw((0.3, 0.5, 0.2), 500))
    best = best_weights(held_out)
    most = log_mean(held_out, best).mean()
    for step in np.random.default_rng(1).normal(0, 0.02, (50, 3)):
        other = np.maximum(best + step, 1e-9)
        assert log_mean(held_out, other / other.sum()).mean() < most + 1e-9


def test_components_that_failed_are_left_out():
    held_out = log_probs(draw((0.3, 0.5, 0.2)))
    held_out[:, 1] = np.nan
    found = best_weights(held_out)
    assert found[1] == 0
    assert np.all(found[[0, 2]] > 0)
    held_out[7] = np.nan  # a row that failed in all of them changes nothing
    np.testing.assert_allclose(best_weights(held_out), found, atol=1e-3)


def test_the_density_of_a_mixture_is_that_of_scipy():
    x, weights = draw((0.3, 0.5, 0.2), 50), np.array([0.3, 0.5, 0.2])
    found = log_mean(log_probs(x), weights)
    expected = sum(w * law.pdf(x) for w, law in zip(weights, LAWS, strict=True))
    np.testing.assert_allclose(found, np.log(expected), rtol=1e-12)


def test_a_failed_component_has_no_density_and_none_is_nan():
    nan, inf = np.nan, np.inf
    found = log_mean(np.array([[0.0, nan], [nan, 1.0], [nan, nan], [-inf, nan]]), np.full(2, 0.5))
    np.testing.assert_allclose(found, [np.log(0.5), 1 + np.log(0.5), nan, -inf])


def test_normal_distributions_are_found_again():
    rng = np.random.default_rng(0)
    which = rng.random(4000) < 0.3
    z = np.where(which[:, None], rng.normal(3, 0.5, (4000, 2)), rng.normal(-1, [1, 0.2], (4000, 2)))
    found = Mixture.of_normals(2, z)
    truth = np.logaddexp(
        np.log(0.3) + stats.norm(3, 0.5).logpdf(z).sum(1),
        np.log(0.7) + stats.norm(-1, [1, 0.2]).logpdf(z).sum(1),
    )
    log_prob = found.log_prob(jnp.asarray(z, float), None)
    assert abs(np.mean(truth - log_prob)) < 0.02
    np.testing.assert_allclose(np.sort(found.weights), [0.3, 0.7], atol=0.03)


CIRCULAR = (False, True, False)  # columns of which the second is an angle


def test_normal_distributions_of_angles_are_wrapped():
    rng = np.random.default_rng(0)
    angle = (rng.normal(3, 1, (500, 1)) + math.pi) % (2 * math.pi) - math.pi
    z = np.concatenate([rng.normal(size=(500, 1)), angle, rng.normal(size=(500, 1))], axis=1)
    found = Mixture.of_normals(2, z, CIRCULAR)
    turn = 2 * math.pi / 50
    around = np.zeros((51, 3)) + np.array([0.5, 0, -1]) + np.arange(51)[:, None] * [0, turn, 0]
    p = np.exp(found.log_prob(jnp.asarray(around, float), None))
    assert p[-1] == pytest.approx(p[0])
    # The other columns are independent of the angle, up to the noise of the fit.
    others = stats.norm.pdf(0.5) * stats.norm.pdf(-1)
    assert p[:-1].sum() * turn == pytest.approx(others, rel=0.3)


@pytest.mark.parametrize("normal", [True, False])
def test_normal_scores_become_samples_of_the_base(normal):
    plan = Plan(4, 1, 1, 1, (0.0,), 1, CIRCULAR)
    base = skeleton(3, 0, plan, normal).base
    scores = np.random.default_rng(0).normal(size=(2000, 3))
    found = np.asarray(from_scores(base, jnp.asarray(scores, float)))
    np.testing.assert_allclose(found[:, [0, 2]], scores[:, [0, 2]], rtol=1e-6)
    law = stats.norm(0, 1) if normal else stats.uniform(-math.pi, 2 * math.pi)
    inside = np.abs(scores[:, 1]) < 3  # where a wrapped normal score is the score
    expected = law.ppf(stats.norm.cdf(scores[inside, 1]))
    np.testing.assert_allclose(found[inside, 1], expected, atol=1e-5)


def test_the_flow_of_a_density_is_a_trained_one_if_there_is_any():
    """Each flow of a fold may weigh less than a normal distribution, which is no density alone."""
    normal = Mixture.of_normals(1, np.random.default_rng(0).normal(size=(20, 2))).flows[0]
    flows = [skeleton(2, 0, Plan(4, 1, 1, 1, (0.0,), 1), False) for _ in range(2)]
    density = FlowDensity()
    density.outer_ = (Affine(np.zeros(2), np.eye(2)), Affine(np.ones(2), np.eye(2)))
    density.mixture_ = Mixture((normal, *flows), np.array([0.5, 0.2, 0.3]))
    chosen = density.flow_.bijection.parts[0]
    assert isinstance(chosen, ODE)
    assert chosen.field.field is flows[1].bijection.field.field
    density.mixture_ = Mixture((normal,), np.ones(1))
    assert density.flow_.bijection.parts[0] is normal.bijection
