"""Imputation: draws and predictive densities of a linear flow against its exact Gaussian."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import COVARIANCE, exact
from scipy import stats

from jcnf import CNF, fields
from jcnf.distributions import StandardNormal
from jcnf.inference.gaussian import Gaussian
from jcnf.inference.impute import impute, predictive

GAUSSIAN = Gaussian(np.zeros(3), COVARIANCE)
# A wrong Gaussian, so that the starts and proposals differ from the flow's own density.
ROUGH = Gaussian(np.full(3, 0.3), COVARIANCE * 1.5)
ROWS = 240


@pytest.fixture(scope="module")
def table():
    """Return rows from the flow's Gaussian, whole and with a third of the entries missing."""
    rng = np.random.default_rng(0)
    truth = rng.multivariate_normal(np.zeros(3), COVARIANCE, ROWS)
    hidden = rng.random(truth.shape) < 1 / 3
    hidden[:3] = [[False] * 3, [True] * 3, [True, False, True]]
    return truth, np.where(hidden, np.nan, truth)


@pytest.fixture(scope="module")
def imputed(table):
    settings = {"draws": 30, "steps": 240, "burn_in": 40, "chunk": 100}
    return impute(exact(), table[1], ROUGH, jr.key(0), **settings)


@pytest.fixture(scope="module")
def found(table, imputed):
    return predictive(exact(), *table, imputed.draws, ROUGH, jr.key(1), samples=200)


def test_gaussian_conditionals_equal_scipy(table):
    truth, x = table
    gaussian = Gaussian(np.array([1.0, -2.0, 0.5]), COVARIANCE)
    conditional = gaussian.given(x)
    log_prob = conditional.log_prob(truth)
    for i in range(20):
        known = ~np.isnan(x[i])
        whole = stats.multivariate_normal(gaussian.mean, COVARIANCE).logpdf(truth[i])
        part = 0.0
        if known.any():
            block = COVARIANCE[np.ix_(known, known)]
            part = stats.multivariate_normal(gaussian.mean[known], block).logpdf(x[i, known])
        assert log_prob[i] == pytest.approx(whole - part, abs=1e-10)
    assert log_prob[0] == 0
    draws = conditional.sample(jr.key(0), 20_000)
    known = ~np.isnan(x)
    np.testing.assert_array_equal(draws[:, known], np.broadcast_to(x[known], (20_000, known.sum())))
    error = draws.mean(axis=0) - conditional.mean
    assert np.all(abs(error)[~known] < 5 * conditional.std[~known] / np.sqrt(20_000))
    np.testing.assert_allclose(draws.std(axis=0)[~known], conditional.std[~known], rtol=0.05)
    assert gaussian.independent.given(x).mean[1] == pytest.approx(gaussian.mean)


def test_impute_samples_follow_the_conditional(table, imputed):
    x = table[1]
    missing = np.isnan(x)
    expected = GAUSSIAN.given(x)
    assert imputed.draws.shape == (30, ROWS, 3)
    np.testing.assert_array_equal(imputed.draws[:, ~missing], np.tile(x[~missing], (30, 1)))
    # Take only the last draw of each row, because draws of one row are not independent.
    z = ((imputed.draws[-1] - expected.mean) / expected.std)[missing]
    assert abs(z.mean()) < 4 / np.sqrt(len(z) / 2)
    assert abs(z.std() - 1) < 4 / np.sqrt(len(z))
    error = ((imputed.mean - expected.mean) / expected.std)[missing]
    assert np.sqrt(np.mean(error**2)) < 0.35
    assert np.all(imputed.std[~missing] == 0)
    assert imputed.std[missing].mean() == pytest.approx(expected.std[missing].mean(), rel=0.1)
    assert imputed.acceptance[0] == 1
    assert imputed.failed.sum() == 0


def test_impute_predictive_densities_equal_the_gaussian_within_errors(table, found):
    truth, x = table
    expected = GAUSSIAN.given(x).log_prob(truth)
    np.testing.assert_allclose(found.log_prob[:2], expected[:2], atol=1e-10)
    np.testing.assert_array_equal(found.stderr[:2], 0)
    partly = found.stderr > 0
    z = ((found.log_prob - expected) / np.where(partly, found.stderr, 1))[partly]
    assert partly.sum() > ROWS / 2
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert 0.7 < z.std() < 1.4
    assert found.stderr.max() < 0.2
    assert found.ess.min() > 0.2
    missing = np.isnan(x) & partly[:, None]
    error = ((found.mean - GAUSSIAN.given(x).mean) / GAUSSIAN.given(x).std)[missing]
    assert np.sqrt(np.mean(error**2)) < 2 / np.sqrt(200 * found.ess.mean())
    np.testing.assert_array_equal(found.mean[~np.isnan(x)], x[~np.isnan(x)])


def test_impute_with_nothing_or_everything_missing():
    x = np.random.default_rng(0).normal(size=(4, 3))
    whole = impute(exact(), x, ROUGH, jr.key(0), draws=2, steps=2)
    np.testing.assert_array_equal(whole.draws, [x, x])
    nothing = predictive(exact(), x, x, whole.draws, ROUGH, jr.key(1))
    np.testing.assert_array_equal(nothing.log_prob, 0)
    everything = np.full_like(x, np.nan)
    filled = impute(exact(), everything, ROUGH, jr.key(0), draws=2, steps=2, burn_in=2)
    assert np.all(np.isfinite(filled.draws))
    alone = predictive(exact(), x, everything, filled.draws, ROUGH, jr.key(1))
    np.testing.assert_allclose(alone.log_prob, GAUSSIAN.given(everything).log_prob(x), atol=1e-10)


def test_impute_same_key_gives_same_samples_in_the_dtype_given(table):
    x = table[1][:10].astype(np.float32)
    settings = {"draws": 2, "steps": 2, "burn_in": 1, "candidates": 2}
    first, again, other = (
        impute(exact(), x, ROUGH, jr.key(seed), **settings).draws for seed in (0, 0, 1)
    )
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other, equal_nan=True)


def test_gaussian_singular_covariance():
    with pytest.raises(ValueError, match="singular"):
        Gaussian(np.zeros(2), np.ones((2, 2))).given(np.array([[np.nan, np.nan]]))
    assert jnp.isfinite(Gaussian.fit(np.random.default_rng(0).normal(size=(9, 1))).covariance).all()


def test_impute_input_that_would_give_nan_raises(unchecked):
    key = jr.key(0)
    flow = CNF(fields.MLP(2, (4,), key=key), StandardNormal(2))
    gaussian = Gaussian(np.zeros(2), np.eye(2))
    rows = np.array([[np.nan, 1.0], [0.5, 2.0]])
    for x, of, fault in (
        (np.array([[np.inf, np.nan]]), gaussian, "finite or NaN where missing"),
        (rows, Gaussian(np.zeros(3), np.eye(3)), "Gaussian of dimension 2"),
        (rows, Gaussian(np.zeros(2), np.full((2, 2), np.nan)), "fitted to rows without NaN"),
    ):
        with pytest.raises(ValueError, match=fault):
            impute(flow, x, of, key)
    truth, draws = np.nan_to_num(rows), np.ones((3, 2, 2))
    for t, d, samples in ((truth[:1], draws, 4), (truth, draws[:0], 4), (truth, draws, 1)):
        with pytest.raises(
            ValueError, match=r"each draw of x's shape|samples must be a whole number, at least 2"
        ):
            predictive(flow, t, rows, d, gaussian, key, samples=samples)
