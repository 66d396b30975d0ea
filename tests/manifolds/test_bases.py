"""Bases on manifolds: mass, moments of samples, dtypes, and points that are not on the manifold."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from jcnf.distributions import StandardNormal
from jcnf.manifolds import SO3, Independent, Sphere, Torus, Uniform, VonMisesFisher, WrappedNormal

pytestmark = pytest.mark.optimized

MEAN = np.array([2.0, -1.0, 2.0]) / 3
SCALES = [0.05, 0.7, 1.9, 2.1, 8.0]


@pytest.mark.parametrize("concentration", [1e-3, 5.0, 300.0])
def test_von_mises_fisher_is_normalized_and_sampled(concentration):
    base = VonMisesFisher(4 * MEAN, concentration)
    points, weights = Sphere(2).quadrature(100)
    mass = weights @ np.exp(base.log_prob(jnp.asarray(points)))
    assert mass == pytest.approx(1, abs=1e-10)
    x = np.asarray(base.sample(jr.key(0), 4000))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-12)
    height, across = x @ MEAN, x - (x @ MEAN)[:, None] * MEAN

    def distribution(h):
        return np.expm1(concentration * (h + 1)) / np.expm1(2 * concentration)

    assert stats.kstest(height, distribution).pvalue > 1e-3
    assert np.all(np.abs(across.mean(0)) < 4 * across.std(0) / np.sqrt(len(x)))


def test_wrapped_normal_is_the_sum_over_images():
    loc, scale = np.linspace(-3, 5, 5), np.array(SCALES)
    base = WrappedNormal(loc, scale)
    x = np.asarray(Torus(5).uniform(jr.key(1), 200))
    images = 2 * np.pi * np.arange(-40, 41)[:, None, None]
    expected = logsumexp(stats.norm(loc, scale).logpdf(x[None] + images), axis=0).sum(axis=1)
    log_prob = jax.jit(lambda x: base.log_prob(x))
    np.testing.assert_allclose(log_prob(jnp.asarray(x)), expected, rtol=1e-11)
    z = np.asarray(base.sample(jr.key(2), 4000))
    assert np.all(np.abs(z) <= np.pi)
    waves = np.exp(1j * (z - loc))
    for part, mean in ((waves.real, np.exp(-(scale**2) / 2)), (waves.imag, 0)):
        assert np.all(np.abs(part.mean(0) - mean) < 4 * part.std(0) / np.sqrt(len(z)))
    gradient = jax.jit(jax.grad(lambda x: base.log_prob(x).sum()))(jnp.asarray(x))
    assert np.isfinite(gradient).all()


BASES = {
    "uniform": Uniform(SO3()),
    "von mises-fisher": VonMisesFisher(MEAN, 2.0),
    "wrapped normal": WrappedNormal([0.3, 1.0], [0.5, 4.0]),
    "independent": Independent((VonMisesFisher(MEAN, 2.0), StandardNormal(2))),
}


@pytest.mark.parametrize("name", BASES)
def test_float32_and_points_off_the_manifold(name):
    base = BASES[name]
    x = base.sample(jr.key(3), 5, jnp.float32)
    assert x.shape == (5, base.dim)
    log_prob = jax.jit(lambda x: base.log_prob(x))
    assert x.dtype == log_prob(x).dtype == jnp.float32
    np.testing.assert_allclose(log_prob(x), log_prob(x.astype(float)), rtol=1e-5, atol=1e-5)
    bad = x.at[1, 0].set(jnp.nan)
    if name != "wrapped normal":
        bad = bad.at[2, :3].multiply(1.1)
    wrong = [False, True, name != "wrapped normal", False, False]
    np.testing.assert_array_equal(np.isnan(log_prob(bad)), wrong)
