"""The flow on the sphere whose base is a mixture of von Mises-Fisher distributions."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import jcnf
from experiments._tasks.sphere_flow import LocalField, local_flow, local_matching
from experiments._tasks.sphere_models import Mixture
from jcnf import evaluate, training
from jcnf.fields import ResNet
from jcnf.manifolds import Sphere

MIXTURE = Mixture(
    np.array([[0, 0, 1.0], [0.6, 0, 0.8], [0, 0, 1]]),
    np.array([5.0, 80, 0]),
    np.log([0.3, 0.6, 0.1]),
)
POINTS, WEIGHTS = Sphere(2).quadrature(40)


@pytest.fixture(scope="module")
def flow():
    net = ResNet(3, 8, 1, context_dim=4, key=jr.key(0))
    return local_flow(LocalField(net, MIXTURE, 4, key=jr.key(1)))


def test_the_base_has_the_density_of_the_mixture_and_its_samples_follow_it(flow):
    x = jnp.asarray(POINTS)
    np.testing.assert_allclose(flow.base.log_prob(x), MIXTURE.score(POINTS), atol=2e-3)
    samples = np.asarray(flow.base.sample(jr.key(1), 20_000))
    assert np.abs(np.linalg.norm(samples, axis=1) - 1).max() < 1e-6
    expected = (WEIGHTS * np.exp(MIXTURE.score(POINTS))) @ POINTS
    error = samples.std(axis=0) / len(samples) ** 0.5
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - expected), 4 * error)


def test_the_untrained_flow_is_its_base(flow):
    x = flow.base.sample(jr.key(1), 10)
    np.testing.assert_allclose(jcnf.log_prob(flow, x), flow.base.log_prob(x), atol=1e-5)


def test_training_lowers_the_nll_below_that_of_the_base_and_leaves_the_base_alone(flow):
    # The data are in a part of one component, which only the flow can find.
    x = flow.base.sample(jr.key(4), 4000)
    x = x[x[:, 1] > 0]
    optimizer = training.make_optimizer(5e-3, 300)
    how = {"objective": local_matching, "steps": 300, "batch": 256, "optimizer": optimizer}
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        fitted = jcnf.fit(
            flow, x, key=jr.key(5), **how, validation=None, average=0.9, progress=False
        )
    trained = fitted.flow
    for before, after in zip(*map(jax.tree.leaves, (flow.base, trained.base)), strict=True):
        np.testing.assert_array_equal(before, after)
    base = -float(flow.base.log_prob(x).mean())
    solve = jcnf.Solve(rtol=1e-4, atol=1e-4)
    assert evaluate.log_prob(trained, x, solve=solve).nll < base - 0.3
    assert evaluate.quadrature(trained, 40, solve=solve).mass == pytest.approx(1, abs=5e-3)
