"""Augmented flows, against the marginal of a linear flow's Gaussian."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, T, linear
from scipy import linalg, stats

from jcnf import Hutchinson, Solve
from jcnf.evaluate import marginal_log_prob
from jcnf.flows.augmented import augment, log_prob_bound

COVARIANCE = linalg.expm(T * MATRIX) @ linalg.expm(T * MATRIX).T
X = jnp.asarray(np.random.default_rng(0).normal(size=(200, 2)))
MARGINAL = stats.multivariate_normal(np.zeros(2), COVARIANCE[:2, :2]).logpdf(X)
SOLVE = Solve(step=T / 8)


def test_the_bound_is_below_the_marginal_and_closes_with_samples():
    gaps = [
        np.mean(MARGINAL - log_prob_bound(linear(), X, jr.key(1), samples=k, solve=SOLVE))
        for k in (1, 3000)
    ]
    # With one sample the gap is the KL divergence from N(0, 1) to p(e | x), which is Gaussian.
    precision = linalg.inv(COVARIANCE)
    mean, variance = -X @ precision[:2, 2] / precision[2, 2], 1 / precision[2, 2]
    kl = np.mean((1 + mean**2) / variance - 1 + np.log(variance)) / 2
    assert gaps[0] == pytest.approx(kl, rel=0.25)
    assert 0 < gaps[1] < 0.1 * gaps[0]


def test_scores_of_many_points_are_the_marginal_whatever_the_chunk():
    scores = [
        marginal_log_prob(linear(), X, jr.key(2), samples=300, solve=SOLVE, chunk=chunk)
        for chunk in (64, 200)
    ]
    np.testing.assert_allclose(scores[0].log_prob, scores[1].log_prob, rtol=1e-12)
    # The estimate of the density is unbiased, so the mean of these ratios is 1.
    ratios = np.exp(scores[0].log_prob - MARGINAL)
    assert abs(ratios.mean() - 1) < 4 * stats.sem(ratios)
    assert np.mean(MARGINAL - scores[0].log_prob) < 0.1
    assert scores[0].failures == 0


def test_extra_dimensions_are_standard_normal_and_x_is_kept():
    joined = augment(jnp.ones((20_000, 2), jnp.float32), jr.key(0), 3)
    assert joined.shape == (20_000, 5)
    assert joined.dtype == jnp.float32
    assert np.all(joined[:, :2] == 1)
    np.testing.assert_allclose(np.cov(joined[:, 2:], rowvar=False), np.eye(3), atol=0.05)


def test_a_stochastic_divergence_takes_its_noise_from_the_key():
    bound = jax.jit(
        lambda key: log_prob_bound(linear(), X[:3], key, solve=SOLVE, divergence=Hutchinson())
    )
    assert np.all(bound(jr.key(0)) == bound(jr.key(0)))
    assert np.all(bound(jr.key(0)) != bound(jr.key(1)))


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(ValueError, match="at most 3 dimensions"):
        log_prob_bound(linear(), jnp.zeros((2, 4)), jr.key(0))
    with pytest.raises(ValueError, match="samples must be a whole number, at least 1"):
        log_prob_bound(linear(), X, jr.key(0), samples=0)
    with pytest.raises(ValueError, match="extra must be a whole number, at least 0"):
        augment(X, jr.key(0), -1)
