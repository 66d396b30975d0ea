"""Flows as numpyro distributions: densities and samples, in NUTS and in a guide."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import MATRIX, T, affine, linear, log_density
from numpyro import handlers
from numpyro.contrib.module import eqx_module
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.util import log_density as log_density_of
from numpyro.optim import Adam
from scipy import linalg, stats

from jcnf import CNF, Hutchinson, fields
from jcnf.distributions import StandardNormal
from jcnf.flows.numpyro import FlowDistribution

PROPAGATOR = linalg.expm(T * MATRIX)
COVARIANCE = PROPAGATOR @ PROPAGATOR.T
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)))
CONTEXT = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2)))


def test_log_prob_of_events_of_any_batch_shape():
    found = FlowDistribution(linear()).log_prob(X)
    expected = stats.multivariate_normal(np.zeros(3), COVARIANCE).logpdf(X)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_context_gives_the_batch_shape():
    d = FlowDistribution(affine(), CONTEXT)
    assert d.batch_shape == (2,)
    assert d.event_shape == (3,)
    rows, contexts = X.reshape(-1, 3), jnp.tile(CONTEXT, (4, 1))
    expected = log_density(rows, contexts).reshape(4, 2)
    np.testing.assert_allclose(d.log_prob(X), expected, atol=1e-4)
    drawn = d.sample(jr.key(0), (5,))
    assert drawn.shape == (5, 2, 3)
    assert d.sample(jr.PRNGKey(0)).shape == (2, 3)


def test_samples_have_the_covariance_of_the_flow():
    drawn = np.asarray(FlowDistribution(linear()).sample(jr.key(0), (20_000,)))
    error = np.sqrt((COVARIANCE**2 + np.outer(np.diag(COVARIANCE), np.diag(COVARIANCE))) / 20_000)
    assert (np.abs(np.cov(drawn.T) - COVARIANCE) < 4 * error).all()


def test_it_passes_through_jit():
    d = FlowDistribution(affine(), CONTEXT)
    found = jax.jit(lambda d, x: d.log_prob(x))(d, X)
    np.testing.assert_allclose(found, d.log_prob(X), rtol=1e-6)


@pytest.mark.parametrize("context", [None, CONTEXT], ids=["no context", "context"])
def test_plates_have_a_density_for_each_event(context):
    d = FlowDistribution(linear() if context is None else affine(), context)

    def model():
        with numpyro.plate("columns", 2, dim=-1), numpyro.plate("rows", 4, dim=-2):
            return numpyro.sample("x", d)

    drawn = np.asarray(handlers.seed(model, 0)())
    assert drawn.shape == (4, 2, 3)
    assert len(np.unique(drawn)) == drawn.size
    joint, _ = log_density_of(handlers.condition(model, {"x": X}), (), {}, {})
    assert joint == pytest.approx(float(d.log_prob(X).sum()), rel=1e-6)


def test_a_divergence_with_noise_is_refused():
    with pytest.raises(ValueError, match="deterministic"):
        FlowDistribution(linear(), divergence=Hutchinson())


def test_nuts_with_a_flow_as_prior_finds_the_posterior():
    y, noise = np.array([1.0, -2.0, 0.5]), 0.7

    def model():
        x = numpyro.sample("x", FlowDistribution(linear()))
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=jnp.asarray(y))

    sampler = MCMC(NUTS(model), num_warmup=300, num_samples=1500, progress_bar=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        sampler.run(jr.key(0))
    drawn = np.asarray(sampler.get_samples()["x"])
    precision = np.linalg.inv(COVARIANCE) + np.eye(3) / noise**2
    covariance = np.linalg.inv(precision)
    np.testing.assert_allclose(drawn.mean(axis=0), covariance @ y / noise**2, atol=0.08)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.06)


@pytest.mark.slow
def test_a_flow_as_guide_learns_the_posterior():
    def model():
        x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(x[0] + x[1], 0.5), obs=2.0)

    flow = CNF(fields.MLP(2, (16, 16), key=jr.key(0)), StandardNormal(2))

    def guide():
        numpyro.sample("x", FlowDistribution(eqx_module("flow", flow)))

    svi = SVI(model, guide, Adam(1e-2), Trace_ELBO(num_particles=64, vectorize_particles=True))
    found = svi.run(jr.key(1), 1500, progress_bar=False)
    # The evidence: y ~ N(0, 2.25).
    evidence = stats.norm(0, 1.5).logpdf(2.0)
    assert -np.mean(found.losses[-50:]) == pytest.approx(evidence, abs=0.03)
