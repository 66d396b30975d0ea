"""Variational autoencoders: exact posteriors of linear-Gaussian models, bounds, errors."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TIGHT, astype, mlp
from jaxtyping import Array, Float
from scipy import linalg, stats

import jcnf
from jcnf import Solve, evaluate, plot
from jcnf.flows import ODE
from jcnf.flows.vae import VAE, Binomial, Encoded, Encoder, Posterior, weigh
from jcnf.objectives import elbo
from jcnf.regularizers import kinetic

KEY = jr.key(0)
STEPS = Solve(solver="rk4", step=0.5)  # quick to compile
RNG = np.random.default_rng(0)
# x = W z + NOISE * normal, with z in 2 dimensions and x in 3.
WEIGHT = np.array([[0.9, -0.4], [0.3, 1.1], [-0.7, 0.5]])
NOISE = 0.8
COVARIANCE = np.linalg.inv(np.eye(2) + WEIGHT.T @ WEIGHT / NOISE**2)  # of z given x
TO_MEAN = COVARIANCE @ WEIGHT.T / NOISE**2  # E[z | x] = TO_MEAN x
SCALE = np.array([0.5, 1.6])  # of the Gaussian that the flow refines
SHARE = 0.3  # of the mean that the Gaussian contributes; the flow adds the rest
X = jnp.asarray(RNG.normal(size=(5, 2)) @ WEIGHT.T + NOISE * RNG.normal(size=(5, 3)))
LOG_P = stats.multivariate_normal(np.zeros(3), WEIGHT @ WEIGHT.T + NOISE**2 * np.eye(3)).logpdf(X)


def gaussian(x, loc):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x, loc, NOISE))


class Matrix(eqx.Module):
    """The linear map z -> M z."""

    matrix: Float[Array, "out in"]

    def __call__(self, z):
        return self.matrix @ z


class Known(eqx.Module):
    """An encoder with mean share * E[z | x], a given scale, and E[z | x] as its features."""

    share: float
    scale: Float[Array, " 2"]

    def __call__(self, x):
        mean = jnp.asarray(TO_MEAN) @ x
        return Encoded(self.share * mean, jnp.log(self.scale), mean)


def still(dim=2, context_dim=2):
    """Return an ODE whose velocity is zero."""
    field = mlp(dim, (4,), context_dim=context_dim, conditioning="modulate")
    rest = jax.tree.map(jnp.zeros_like, field.layers[-1])
    return ODE(eqx.tree_at(lambda f: f.layers[-1], field, rest))


def exact_flow():
    """Return v = A e + C c, which ends at E e + (1 - SHARE) c / SCALE; E E' is e's covariance."""
    end = linalg.sqrtm(COVARIANCE / np.outer(SCALE, SCALE))
    matrix = linalg.logm(end)
    assert abs(np.trace(matrix)) > 0.3
    drift = (1 - SHARE) * matrix @ np.linalg.inv(end - np.eye(2)) / SCALE
    field = mlp(2, (), time="ignore", context_dim=2)
    layer = eqx.tree_at(
        lambda m: (m.weight, m.bias),
        field.layers[0],
        (jnp.asarray(np.concatenate([matrix, drift], axis=1)), jnp.zeros(2)),
    )
    return ODE(eqx.tree_at(lambda f: f.layers, field, (layer,)))


def linear(flow=None, share=SHARE):
    """Return the linear-Gaussian model, whose posterior is exact only with `exact_flow`."""
    posterior = Posterior(Known(share, jnp.asarray(SCALE)), 2, flow)
    return VAE(posterior, Matrix(jnp.asarray(WEIGHT)), gaussian)


def trained(flow=None):
    """Return a model whose encoder 3 -> 4 -> 2 has parameters to train."""
    trunk_key, head_key = jr.split(KEY)
    trunk = eqx.nn.MLP(3, 4, 5, 1, final_activation=jnp.tanh, key=trunk_key)
    encoder = Encoder(trunk, 4, 2, key=head_key)
    return VAE(Posterior(encoder, 2, flow), Matrix(jnp.asarray(WEIGHT)), gaussian)


@pytest.mark.slow
def test_a_flow_makes_the_gaussian_the_exact_posterior():
    """With it, every log-weight is the evidence, and q is the density of the posterior."""
    model, eps = linear(exact_flow()), jr.normal(KEY, (5, 2))

    @jax.jit
    def both(x, eps):
        weighed = weigh(model, x, eps, solve=TIGHT)
        z = weighed.carried.value
        log_q = jcnf.log_prob(model.posterior, z, context=x, solve=TIGHT)
        back = jcnf.transform(model.posterior, z, context=x, solve=TIGHT)
        return weighed, log_q, back

    weighed, log_q, back = both(X, eps)
    np.testing.assert_allclose(weighed.log_weight, LOG_P, rtol=0, atol=1e-8)
    expected = [
        stats.multivariate_normal(TO_MEAN @ x, COVARIANCE).logpdf(z)
        for x, z in zip(X, weighed.carried.value, strict=True)
    ]
    np.testing.assert_allclose(log_q, expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(back.value, eps, rtol=0, atol=1e-8)
    np.testing.assert_allclose(back.logdet, -weighed.carried.logdet, rtol=0, atol=1e-8)
    assert weighed.carried.stats.nfe > 0


def test_samples_of_the_posterior_are_those_that_are_weighed():
    posterior = linear(exact_flow()).posterior
    x = jnp.repeat(X[:1], 2000, axis=0)
    z = np.asarray(jax.jit(lambda: jcnf.sample(posterior, KEY, 2000, context=x, solve=STEPS))())
    mean = TO_MEAN @ np.asarray(X[0])
    np.testing.assert_allclose(z.mean(axis=0), mean, atol=4 * z.std() / np.sqrt(2000))
    np.testing.assert_allclose(np.cov(z.T), COVARIANCE, atol=0.05)


def test_bounds_are_in_order_and_below_the_evidence():
    """The posterior is wrong here; with the exact one, all bounds equal the evidence."""
    found = evaluate.elbo(linear(), X, KEY, samples=2000)
    ladder = [found.elbo, found.iwae(4), found.iwae(50), found.iwae(2000)]
    np.testing.assert_allclose(found.iwae(1), found.elbo, rtol=1e-12)
    weights = found.log_likelihood - found.log_ratio
    assert np.all(np.diff(ladder, axis=0)[:2] > 0)
    np.testing.assert_array_less(found.elbo, LOG_P - 4 * weights.std(axis=1) / np.sqrt(2000))
    np.testing.assert_allclose(ladder[-1], LOG_P, rtol=0, atol=0.1)
    # The gap from the ELBO to the evidence is KL(q || p(z | x)), between two Gaussians.
    off = (1 - SHARE) * TO_MEAN @ np.asarray(X).T
    precision = np.linalg.inv(COVARIANCE)
    kl = np.sum(np.diag(precision) * SCALE**2) - 2 + np.sum(off * (precision @ off), axis=0)
    kl = 0.5 * (kl + np.linalg.slogdet(COVARIANCE)[1] - 2 * np.sum(np.log(SCALE)))
    error = 4 * weights.std(axis=1) / np.sqrt(2000)
    assert np.all(np.abs(found.elbo - (LOG_P - kl)) < error)
    assert np.max(error) < 0.5 * np.min(kl)
    np.testing.assert_allclose(
        found.mean, SHARE * np.asarray(X) @ TO_MEAN.T, atol=4 * SCALE.max() / np.sqrt(2000)
    )


def test_all_bounds_of_the_exact_posterior_are_the_evidence():
    found = evaluate.elbo(linear(exact_flow()), X, KEY, samples=3, solve=TIGHT, chunk=2)
    for bound in (found.elbo, found.iwae(2), found.iwae(3)):
        np.testing.assert_allclose(bound, LOG_P, rtol=0, atol=1e-8)
    assert found.nfe > 0
    assert not found.failed.any()


def test_the_noise_depends_on_neither_the_chunk_nor_the_model():
    one = evaluate.elbo(linear(), X, KEY, samples=3, chunk=2)
    whole = evaluate.elbo(linear(), X, KEY, samples=3)
    rest = evaluate.elbo(linear(still()), X, KEY, samples=3, solve=STEPS)
    other = evaluate.elbo(linear(), X, jr.key(1), samples=3)
    np.testing.assert_allclose(one.log_ratio, whole.log_ratio, rtol=1e-12)
    np.testing.assert_allclose(one.log_likelihood, rest.log_likelihood, rtol=1e-12)
    np.testing.assert_allclose(one.log_ratio, rest.log_ratio, rtol=1e-12)
    assert np.all(np.abs(one.log_ratio - other.log_ratio) > 1e-6)


def test_without_a_flow_the_kl_is_that_of_gaussians():
    model, x = trained(), jnp.repeat(X, 4000, axis=0)
    eps = jr.normal(KEY, (len(x), 2))
    ratio = np.asarray(jax.jit(lambda: weigh(model, x, eps).log_ratio)()).reshape(5, 4000)
    loc, log_scale, _ = jax.vmap(model.posterior.bijection.encoder)(X)
    kl = 0.5 * np.sum(np.asarray(loc**2 + jnp.exp(2 * log_scale) - 1 - 2 * log_scale), axis=1)
    error = 4 * ratio.std(axis=1) / np.sqrt(4000)
    assert np.all(np.abs(ratio.mean(axis=1) - kl) < error)
    assert np.max(error) < 0.15


def test_the_objective_is_the_mean_of_what_is_weighed():
    """A flow with zero velocity changes nothing, and only a flow has regularizers."""
    moving = ODE(mlp(2, (4,), context_dim=4))
    models = [trained(), trained(still(2, 4)), trained(moving)]

    def losses():
        return [elbo(model, X, KEY, solve=STEPS, regularizers={kinetic: 0.5}) for model in models]

    (plain, metrics), (rest, at_rest), (moving, moved) = jax.jit(losses)()
    np.testing.assert_allclose(plain, rest, rtol=1e-12)
    np.testing.assert_allclose(metrics["kl"], at_rest["kl"], rtol=1e-12)
    assert metrics["nfe"] == 0 < at_rest["nfe"]
    assert metrics["kinetic"] == at_rest["kinetic"] == 0 < moved["kinetic"]
    for value, parts in ((plain, metrics), (moving, moved)):
        whole = parts["reconstruction"] + parts["kl"]
        np.testing.assert_allclose(parts["negative_elbo"], whole, rtol=1e-12)
        np.testing.assert_allclose(value, whole + 0.5 * parts["kinetic"], rtol=1e-12)
    assert not moved["failed"]


@pytest.mark.slow
def test_every_part_has_a_gradient():
    model = trained(ODE(mlp(2, (4,), context_dim=4, conditioning="modulate")))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        return elbo(eqx.combine(params, static), X, KEY, solve=STEPS)[0]

    gradient = jax.jit(jax.grad(loss))(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    assert len(leaves) == len(jax.tree.leaves(params)) == 6 + 1 + 2 * 5 + 2
    for path, leaf in leaves:
        assert np.max(np.abs(leaf)) > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("trials", [1, 16])
def test_the_binomial_is_scipys(trials):
    k, logits = RNG.integers(0, trials + 1, 6), RNG.normal(0, 3, 6)
    found = Binomial(trials)(jnp.asarray(k / trials), jnp.asarray(logits))
    expected = stats.binom(trials, 1 / (1 + np.exp(-logits))).logpmf(k).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_in_float32():
    model = astype(trained(still(2, 4)), jnp.float32)
    loss, metrics = jax.jit(lambda x: elbo(model, x, KEY, solve=STEPS))(X.astype(jnp.float32))
    assert loss.dtype == metrics["kl"].dtype == jnp.float32
    assert jnp.isfinite(loss)


def test_a_solve_that_fails_is_no_number():
    short = evaluate.elbo(linear(exact_flow()), X, KEY, samples=2, solve=Solve(max_steps=2))
    assert short.failed.all()
    assert np.isnan(short.elbo).all()
    assert np.isnan(short.iwae(2)).all()


def with_encoder(encoder):
    return eqx.tree_at(lambda m: m.posterior.bijection.encoder, linear(), encoder)


def wide(x):
    return Encoded(jnp.zeros(3), jnp.zeros(3), x)


WRONG = {
    "features": (lambda: elbo(linear(still(2, 5)), X, KEY), "must give 5 features"),
    "no context": (lambda: jcnf.log_prob(linear().posterior, X[:, :2]), "context=x"),
    "encoder": (lambda: elbo(with_encoder(wide), X, KEY), "(2,); got (3,) and (3,)"),
    "integers": (lambda: elbo(linear(), X.astype(int), KEY), "int64: cast it"),
    "likelihood": (
        lambda: elbo(VAE(linear().posterior, linear().decoder, jnp.subtract), X, KEY),
        "a scalar for each sample; got (3,)",
    ),
    "numbers of x and eps": (lambda: weigh(linear(), X, jnp.zeros((4, 2))), "shape (4, context)"),
    "samples": (
        lambda: evaluate.elbo(linear(), X, KEY, samples=0),
        "samples must be a whole number, at least 1",
    ),
    "one x": (lambda: evaluate.elbo(linear(), X[0], KEY), "(n, data)"),
    "k": (
        lambda: evaluate.elbo(linear(), X, KEY, samples=2).iwae(3),
        "at most 2; got k=3",
    ),
    "trials": (lambda: Binomial(0), "at least 1; got trials=0"),
    "half a trial": (lambda: Binomial(1.5), "whole number"),
    "one logit": (lambda: Binomial(1)(jnp.zeros(3), jnp.zeros(1)), "a logit for each component"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_say_what_was_expected(name, unchecked):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_the_picture_has_a_column_for_each_x_and_a_row_for_each_density():
    rng = np.random.default_rng(1)
    logs = rng.normal(size=(3, 2, 5, 5))
    views = [(i, i + 1, 0, 2) for i in range(3)]
    figure = plot.posteriors(rng.random((3, 6)), (2, 3, 1), logs, ["p", "q"], views)
    axes = np.reshape(figure.axes, (3, 3))
    shown = axes[2, 1].images[0]
    log = logs[1, 1]
    np.testing.assert_allclose(shown.get_array(), np.exp(log - log.max()))
    assert (shown.origin, list(shown.get_extent())) == ("lower", [1, 2, 0, 2])
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["", "p", "q"]
    with pytest.raises(ValueError, match="2 views"):
        plot.posteriors(rng.random((3, 6)), (2, 3, 1), logs, ["p", "q"], views[:2])
