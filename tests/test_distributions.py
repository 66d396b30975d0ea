"""Bases: densities and samples against scipy, dtypes, and one trace for many objects."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from jcnf.distributions import BaseDistribution, Logistic, ScaledNormal, StandardNormal

LOC, SCALE = np.array([0.5, -2.0, 3.0]), np.array([0.2, 1.0, 4.0])
CASES = {
    "normal": (lambda: StandardNormal(3), stats.norm()),
    "scaled_normal": (lambda: ScaledNormal(3, SCALE, LOC), stats.norm(LOC, SCALE)),
    "logistic": (lambda: Logistic(3), stats.logistic()),
}
Z = np.random.default_rng(0).normal(0, 3, (50, 3))


@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_scipys(name):
    make, reference = CASES[name]
    z = np.concatenate([Z, np.full((1, 3), 300.0), np.full((1, 3), -300.0)])
    log_p = make().log_prob(jnp.asarray(z))
    assert log_p.shape == (52,)
    np.testing.assert_allclose(log_p, reference.logpdf(z).sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_samples_follow_it(name):
    make, reference = CASES[name]
    x = make().sample(jr.key(0), 4000)
    assert x.shape == (4000, 3)
    assert x.dtype == jnp.float64
    uniform = reference.cdf(np.asarray(x))
    for column in uniform.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.max(np.abs(np.corrcoef(uniform, rowvar=False) - np.eye(3))) < 4 / np.sqrt(4000)


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    make, reference = CASES[name]
    z = jnp.asarray(Z, jnp.float32)
    log_p = make().log_prob(z)
    assert log_p.dtype == jnp.float32
    np.testing.assert_allclose(log_p, reference.logpdf(Z).sum(axis=1), rtol=1e-4)
    assert make().sample(jr.key(0), 2, jnp.float32).dtype == jnp.float32
    with jax.enable_x64(False):
        assert jax.eval_shape(lambda: make().sample(jr.key(0), 2)).dtype == jnp.float32


@pytest.mark.parametrize("name", CASES)
def test_fresh_objects_are_traced_once(name):
    traces = []

    @eqx.filter_jit
    def gradient(base, z):
        traces.append(name)
        return jax.grad(lambda z: jnp.sum(base.log_prob(z)))(z)

    for seed in range(3):
        jax.block_until_ready(gradient(CASES[name][0](), jnp.asarray(Z) + seed))
    assert traces == [name]


def test_arrays_of_a_base_can_be_differentiated():
    loss = eqx.filter_grad(lambda base: jnp.sum(base.log_prob(jnp.asarray(Z))))
    gradient = loss(ScaledNormal(3, SCALE, LOC))
    np.testing.assert_allclose(gradient.loc, ((Z - LOC) / SCALE**2).sum(axis=0), rtol=1e-12)


def test_a_base_of_ones_own_gives_its_distribution():
    class Wide(BaseDistribution):
        dim: int = eqx.field(static=True)

        def distribution(self, dtype=None):
            return ScaledNormal(self.dim, 10.0).distribution(dtype)

    expected = stats.norm(0, 10).logpdf(Z).sum(axis=1)
    np.testing.assert_allclose(Wide(3).log_prob(jnp.asarray(Z)), expected, rtol=1e-12)


def test_scale_and_loc_broadcast():
    base = ScaledNormal(2, 3.0, 1.0)
    np.testing.assert_array_equal(base.scale, [3, 3])
    np.testing.assert_array_equal(base.loc, [1, 1])
