"""Networks that a context goes through: plans that have one, and features computed once."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jcnf.sklearn._contexts import Encoder, Flattened, unembedded
from jcnf.sklearn.mixture import FEW_ROWS, MANY_ROWS, Plan, skeleton

PLAN = Plan(8, 2, 1, 1, (0.0,), 1, (), 2)
ANGLES = PLAN._replace(circular=(False, True))
T, X, CONTEXT = jnp.float32(0.4), jnp.array([0.3, -0.7]), jnp.array([1.0, -2.0, 0.5])


pytestmark = pytest.mark.usefixtures("as_users_have_jax")


def test_plan_has_an_encoder_for_a_context_and_many_rows():
    layers = [
        Plan.of(rows, None, (), given).encoder_layers
        for given in (False, True)
        for rows in (FEW_ROWS - 1, FEW_ROWS, MANY_ROWS)
    ]
    assert layers == [0, 0, 0, 0, 2, 3]


@pytest.mark.parametrize("plan", [PLAN, ANGLES], ids=["lines", "a circle"])
def test_field_given_the_features_is_the_field_given_the_context(plan):
    flow = skeleton(2, 3, plan, normal=False)
    noise = iter(jr.split(jr.key(0), 100))
    flow = jax.tree.map(
        lambda a: a + 0.3 * jr.normal(next(noise), a.shape) if is_float(a) else a, flow
    )
    assert flow.context_dim == 3
    inner, features = unembedded(flow, CONTEXT[None])
    assert (inner.context_dim, features.shape) == (plan.width, (1, plan.width))
    point = jnp.asarray(X, jnp.float32)
    expected = flow.bijection.field.velocity_and_divergence(T, point, CONTEXT)
    found = inner.bijection.field.velocity_and_divergence(T, point, features[0])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    changed = flow.bijection.field.velocity_and_divergence(T, point, CONTEXT + 1)
    assert np.abs(changed[0] - expected[0]).max() > 1e-3


def is_float(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def test_flow_without_a_network_keeps_its_context():
    flow = skeleton(2, 3, PLAN._replace(encoder_layers=0), normal=False)
    inner, given = unembedded(flow, CONTEXT[None])
    assert inner is flow
    np.testing.assert_array_equal(given, CONTEXT[None])
    normal = skeleton(2, 3, PLAN, normal=True)
    assert unembedded(normal, CONTEXT[None]) == (normal, None)


def test_encoder_adds_residual_layers():
    encoder = Encoder(3, 5, 3, jr.key(0))
    entry, *others = encoder.layers
    h = entry.weight @ CONTEXT + entry.bias
    for layer in others:
        h = h + layer.weight @ (h / (1 + jnp.exp(-h))) + layer.bias
    np.testing.assert_allclose(encoder(CONTEXT), h / (1 + jnp.exp(-h)), rtol=1e-5)


def test_flattened_network_gets_contexts_of_their_shape():
    flat = Flattened.of(lambda key: lambda x: x.sum(axis=0), (2, 3), jr.key(0))
    np.testing.assert_array_equal(flat(jnp.arange(6.0)), [3, 5, 7])
