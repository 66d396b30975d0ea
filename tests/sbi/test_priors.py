"""Priors: their supports, samples and log-densities, and what is refused."""

import distrax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from numpyro import distributions as dist
from scipy import stats

from jcnf import sbi
from jcnf._checks import InputError
from jcnf.sklearn import Column

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

KINDS = {
    "box": (
        sbi.box([-1.0, 0.0], [1.0, 3.0]),
        [Column(-1, 1), Column(0, 3)],
        lambda x: np.full(len(x), -np.log(6)),
    ),
    "vector": (
        dist.LogNormal(jnp.array([0.0, 1.0]), 0.5).to_event(1),
        [Column(0.0), Column(0.0)],
        lambda x: stats.lognorm(0.5, scale=np.exp([0, 1])).logpdf(x).sum(axis=1),
    ),
    "truncated": (
        dist.TruncatedNormal(0.0, 1.0, low=0.5),
        [Column(0.5)],
        lambda x: stats.truncnorm(0.5, np.inf).logpdf(x)[:, 0],
    ),
    "circle": (
        dist.VonMises(0.0, 2.0),
        [Column(-np.pi, np.pi, circular=True)],
        lambda x: stats.vonmises(2.0).logpdf(x)[:, 0],
    ),
    "mapping": (
        {"rate": dist.Beta(2.0, 3.0), "place": dist.Normal(jnp.zeros(2), 1.0).to_event(1)},
        [Column(0, 1), Column(), Column()],
        lambda x: stats.beta(2, 3).logpdf(x[:, 0]) + stats.norm.logpdf(x[:, 1:]).sum(axis=1),
    ),
    "distrax uniform": (
        distrax.Independent(
            distrax.Uniform(jnp.array([0.0, 1.0]), jnp.array([1.0, 3.0])),
            reinterpreted_batch_ndims=1,
        ),
        [Column(0, 1), Column(1, 3)],
        lambda x: np.full(len(x), -np.log(2)),
    ),
    "distrax normal": (
        distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2)),
        [Column(), Column()],
        lambda x: stats.norm.logpdf(x).sum(axis=1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prior_has_the_supports_samples_and_density_of_its_distribution(kind):
    given, supports, log_prob = KINDS[kind]
    prior = sbi.as_prior(given)
    assert list(prior.supports) == supports
    assert prior.dim == len(supports)
    theta = prior.sample(jr.key(0), 2000)
    assert theta.dtype == np.float64
    assert prior.contains(theta).all()
    np.testing.assert_allclose(prior.log_prob(theta), log_prob(theta), rtol=2e-5, atol=2e-5)
    other = prior.sample(jr.key(1), 2000)
    assert stats.ks_2samp(theta[:, 0], other[:, 0]).pvalue > 1e-3
    np.testing.assert_array_equal(theta, prior.sample(jr.key(0), 2000))
    assert np.any(theta != other)


def test_log_prob_is_minus_infinity_outside_the_support():
    prior = sbi.as_prior({"rate": dist.Uniform(0.0, 2.0), "scale": dist.HalfNormal(1.0)})
    theta = np.array([[1.0, 1.0], [2.5, 1.0], [1.0, -0.5], [2.0, 1.0]])
    found = prior.log_prob(theta)
    np.testing.assert_array_equal(np.isfinite(found), [True, False, False, False])
    assert found[0] == pytest.approx(-np.log(2) + stats.halfnorm.logpdf(1.0))
    np.testing.assert_array_equal(prior.log_prob(theta[1:2]), [-np.inf])


def test_names_are_those_of_the_mapping_or_places():
    assert sbi.as_prior(KINDS["mapping"][0]).names == ("rate", "place[0]", "place[1]")
    assert sbi.as_prior(dist.Normal()).names == ("theta",)
    assert sbi.box([0], [1], names=["a"]).names == ("a",)


@pytest.mark.parametrize(
    ("prior", "says"),
    [
        (dist.Dirichlet(jnp.ones(3)), "product of intervals"),
        (dist.Poisson(3.0), "product of intervals"),
        (dist.Normal(jnp.zeros(2), 1.0), "batch shape"),
        (dist.MatrixNormal(jnp.zeros((2, 2)), jnp.eye(2), jnp.eye(2)), "number or a vector"),
        (distrax.Categorical(jnp.ones(3)), "Categorical is not known"),
        ("uniform", "expected a distribution"),
        ({}, "no parameters"),
    ],
)
def test_other_priors_are_refused(prior, says):
    with pytest.raises(InputError, match=says):
        sbi.as_prior(prior)


@pytest.mark.parametrize(
    ("lower", "upper"), [([0, 0], [1]), ([0.0], [np.inf]), ([1.0], [1.0]), ([[0.0]], [[1.0]])]
)
def test_box_refuses_wrong_corners(lower, upper):
    with pytest.raises(ValueError, match=r"lower|finite"):
        sbi.box(lower, upper)
