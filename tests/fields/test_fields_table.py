"""Tests of every field: shapes, dtypes, and a divergence that equals the trace, with gradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from field_table import FIELDS
from helpers import Linear, astype
from jax.extend.core import Literal
from jax.flatten_util import ravel_pytree

pytestmark = pytest.mark.optimized

TIME, X = jnp.asarray(0.3), jnp.array([0.4, -1.1, 0.7])
CONTEXT = jnp.array([0.9, -0.2])
BATCH = 11  # a size that does not occur in any field


@pytest.mark.parametrize("name", FIELDS)
def test_divergence_and_its_gradient_equal_the_trace(name):
    field = FIELDS[name]()
    context = CONTEXT if field.context_dim else None
    assert field.dim == 3
    params, static = eqx.partition(field, eqx.is_inexact_array)

    def closed_form(params, t):
        v, divergence = eqx.combine(params, static).velocity_and_divergence(t, X, context)
        return divergence, v

    def trace(params, t):
        field = eqx.combine(params, static)
        return jnp.trace(jax.jacfwd(field, argnums=1)(t, X, context)), field(t, X, context)

    @jax.jit
    def both(params, t):
        return [
            jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, t)
            for f in (closed_form, trace)
        ]

    ((divergence, v), own), ((expected, velocity), gradient) = both(params, TIME)
    assert v.shape == velocity.shape == (3,)
    assert divergence.shape == ()
    assert abs(expected) > 1e-2
    np.testing.assert_allclose(v, velocity, rtol=0, atol=1e-14)
    np.testing.assert_allclose(divergence, expected, rtol=0, atol=1e-10)
    own, gradient = ravel_pytree(own)[0], ravel_pytree(gradient)[0]
    assert np.linalg.norm(gradient) > 1e-2
    np.testing.assert_allclose(own, gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_float32_input_gives_float32(name):
    field, x, t, context = astype((FIELDS[name](), X, TIME, CONTEXT), jnp.float32)
    arguments = (t, x, context if field.context_dim else None)
    out = jax.eval_shape(field.velocity_and_divergence, *arguments)
    leaves = [jax.eval_shape(field, *arguments), *jax.tree.leaves(out)]
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [
        ((3,), jnp.float32),
        ((3,), jnp.float32),
        ((), jnp.float32),
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_fields_batch_at_one_time_computes_time_work_once(name):
    field = FIELDS[name]()
    batched = [jnp.zeros((BATCH, 3)), jnp.zeros((BATCH, 2))][: 2 if field.context_dim else 1]
    over_batch = jax.vmap(field, in_axes=(None, *[0] * len(batched)))
    jaxpr = jax.make_jaxpr(over_batch)(TIME, *batched).jaxpr
    of_sample = set(jaxpr.invars[1:])
    for equation in jaxpr.eqns:
        # Copies for each sample, such as those joined to a context, take no computation.
        copied = equation.primitive.name == "broadcast_in_dim"
        if copied or of_sample & {v for v in equation.invars if not isinstance(v, Literal)}:
            of_sample.update(equation.outvars)
            # At most 10 units per sample, and never a matrix per sample.
            assert max(v.aval.size for v in equation.outvars) <= BATCH * 10
        else:
            assert not [v for v in equation.outvars if BATCH in v.aval.shape]


def test_exact_without_closed_form_falls_back_on_forward_mode():
    matrix = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    v, divergence = Linear(matrix, 2).velocity_and_divergence(TIME, jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(v, [-1, -2], rtol=1e-14)
    np.testing.assert_allclose(divergence, 6, rtol=1e-14)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_hold_no_empty_tuple(name):
    """Backsolve carries the parameters in its state, where an empty tuple crashes diffrax."""
    leaves = jax.tree.leaves(
        FIELDS[name](), is_leaf=lambda node: isinstance(node, tuple) and not node
    )
    assert not [leaf for leaf in leaves if isinstance(leaf, tuple)]
