"""MLP fields: closed-form divergences, time layers, and activations with their derivatives."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import astype, mlp

from jcnf.fields import ACTIVATIONS, LAYERS, MLP
from jcnf.fields.layers import resolve

WIDTHS = (4, 5, 4, 5)  # neighbors differ, so that transposed products do not fit
REFERENCE = {
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "sine": jnp.sin,
    "logcosh": lambda a: jnp.logaddexp(a, -a),
    "identity": lambda a: a,
}


def assert_divergence_is_the_trace(field):
    t, x = jnp.asarray(0.3), jnp.array([0.4, -1.1, 0.7])[: field.dim]
    context = jnp.array([0.9, -0.2]) if field.context_dim else None
    v, divergence = field.velocity_and_divergence(t, x, context)
    jacobian = jax.jacfwd(field, argnums=1)(t, x, context)
    assert abs(jnp.trace(jacobian)) > 1e-3
    np.testing.assert_allclose(v, field(t, x, context), rtol=0, atol=1e-14)
    np.testing.assert_allclose(divergence, jnp.trace(jacobian), rtol=0, atol=1e-10)


@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("time", LAYERS)
def test_mlp_divergence_at_every_depth_and_time_layer_equals_the_trace(time, depth):
    for context_dim in (0, 2):
        field = mlp(3, WIDTHS[:depth], time=time, context_dim=context_dim)
        assert_divergence_is_the_trace(field)


@pytest.mark.parametrize("depth", range(1, 5))
def test_mlp_divergence_with_modulation_equals_the_trace(depth):
    field = mlp(3, WIDTHS[:depth], context_dim=2, conditioning="modulate", scale=1.0)
    assert_divergence_is_the_trace(field)


def test_mlp_modulation_equals_its_formula():
    field = mlp(3, (4, 5), time="ignore", context_dim=2, conditioning="modulate")
    x, context = np.array([0.2, -1.0, 0.5]), np.array([0.9, -0.2])
    h = x
    for layer, modulation in zip(field.layers[:-1], field.modulations, strict=True):
        gain, shift = np.split(modulation.weight @ context + modulation.bias, 2)
        h = np.tanh((1 + gain) * (layer.weight @ h + layer.bias) + shift)
    expected = field.layers[-1].weight @ h + field.layers[-1].bias
    v = field(jnp.asarray(0.7), jnp.asarray(x), jnp.asarray(context))
    np.testing.assert_allclose(v, expected, rtol=1e-13)


def test_mlp_keys_are_consumed_layer_by_layer():
    """Saved runs rebuild their field from its key, so the order must not change."""
    key = jr.key(3)
    field = MLP(3, (4,), time="ignore", key=key)
    for layer, k, sizes in zip(field.layers, jr.split(key), [(3, 4), (4, 3)], strict=True):
        np.testing.assert_array_equal(layer.weight, LAYERS["ignore"](*sizes, key=k).weight)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, jnp.arctan])
def test_mlp_divergence_with_every_activation_equals_the_trace(activation):
    for depth in (1, 2, 3):
        assert_divergence_is_the_trace(mlp(3, WIDTHS[:depth], activation=activation))


def test_mlp_divergence_narrower_than_dim_equals_the_trace():
    for depth in (1, 2, 3, 4):
        assert_divergence_is_the_trace(mlp(3, (2, 1, 2, 3)[:depth]))


def test_mlp_divergence_in_one_dimension_equals_the_trace():
    field, x = mlp(1, WIDTHS[:2]), jnp.array([0.4])
    both = jax.jit(lambda t: (field.velocity_and_divergence(t, x), jax.jacfwd(field, 1)(t, x)))
    (_, divergence), jacobian = both(jnp.asarray(0.3))
    np.testing.assert_allclose(divergence, jacobian[0, 0], atol=1e-12)


@pytest.mark.parametrize("time", LAYERS)
def test_layers_equal_their_formulas(time):
    layer = mlp(3, (4,), time=time).layers[0]
    layer = jax.tree.map(np.asarray, layer)
    t, x = 0.7, np.array([0.2, -1.0, 0.5])
    match time:
        case "ignore":
            expected = layer.weight @ x + layer.bias
        case "concat":
            expected = layer.linear.weight @ x + layer.linear.bias + layer.time_weight * t
        case "squash" | "concatsquash":
            squash, shift = (
                (layer, 0) if time == "squash" else (layer.squash, layer.time_weight * t)
            )
            gate = 1 / (1 + np.exp(-(squash.gate_weight * t + squash.gate_bias)))
            expected = (squash.linear.weight @ x + squash.linear.bias) * gate + shift
        case "hyper":
            h = np.tanh(layer.hidden_weight * t + layer.hidden_bias)
            weight = layer.linear.weight + np.einsum("oih,h->oi", layer.weight_map, h)
            expected = weight @ x + layer.linear.bias + layer.bias_map @ h
        case "blend":
            expected = (1 - t) * (layer.start.weight @ x + layer.start.bias)
            expected += t * (layer.end.weight @ x + layer.end.bias)
    layer = jax.tree.map(jnp.asarray, layer)
    weight, bias = layer.affine(jnp.asarray(t))
    np.testing.assert_allclose(weight @ x + bias, expected, rtol=1e-13)
    np.testing.assert_allclose(layer(jnp.asarray(t), jnp.asarray(x)), expected, rtol=1e-13)


@pytest.mark.parametrize("time", LAYERS)
def test_layers_except_ignore_depend_on_time(time):
    field = mlp(3, (4,), time=time)
    change = field(jnp.asarray(0.1), jnp.ones(3)) - field(jnp.asarray(0.9), jnp.ones(3))
    assert bool(jnp.any(change != 0)) == (time != "ignore")


def test_mlp_batch_at_one_time_computes_time_work_once():
    field = mlp(3, (7, 7))
    over_batch = jax.vmap(field.velocity_and_divergence, in_axes=(None, 0))
    jaxpr = jax.make_jaxpr(over_batch)(jnp.asarray(0.5), jnp.zeros((11, 3)))
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) == 11 * 7  # a batch of hidden units, never of matrices
    gates = [eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if "logistic" in str(eqn)]
    assert set(gates) == {(7,), (3,)}  # for one time, not for each sample


def intermediates(jaxpr):
    """Yield the shapes of all values that a program computes, including inner programs."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from intermediates(inner)


TIMES, POINTS = (
    jnp.linspace(0.0, 1.0, 11),
    jnp.asarray(np.random.default_rng(1).normal(size=(11, 3))),
)


@pytest.mark.parametrize("time", LAYERS)
def test_mlp_one_time_per_sample_equals_single_calls(time):
    field = mlp(3, (7, 6), time=time)
    together = jax.jit(jax.vmap(field))(TIMES, POINTS)
    for t, x, v in zip(TIMES, POINTS, together, strict=True):
        np.testing.assert_allclose(v, field(t, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("time", ["ignore", "concat", "squash", "concatsquash"])
def test_mlp_one_time_per_sample_makes_no_matrix_per_sample(time):
    over_batch = jax.vmap(mlp(3, (7, 6), time=time))
    shapes = list(intermediates(jax.make_jaxpr(over_batch)(TIMES, POINTS).jaxpr))
    assert (11, 7) in shapes
    assert max(map(np.prod, shapes)) == 11 * 7
    assert max(map(len, shapes)) == 2


def test_linear_initial_variance_is_one_over_three_fan_in():
    layer = LAYERS["ignore"](64, 100, key=jr.key(0))
    assert layer.weight.shape == (100, 64)
    assert np.max(np.abs(layer.weight)) <= 1 / 8
    assert np.var(layer.weight) == pytest.approx(1 / (3 * 64), rel=0.05)
    assert not np.any(layer.bias)


@pytest.mark.parametrize("time", ["hyper", "blend"])
def test_hypernetwork_layers_start_on_the_scale_of_one_layer(time):
    @jax.jit
    def ends(key):
        layer = LAYERS[time](64, 100, key=key)
        return [layer.affine(jnp.asarray(t)) for t in (0.0, 1.0)]

    for weight, bias in ends(jr.key(0)):
        assert weight.shape == (100, 64)
        assert 1 / (3 * 64) * 0.95 < np.var(weight) < 2 / (3 * 64)
        assert np.max(np.abs(bias)) < 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_first_two_derivatives_equal_autodiff(name):
    a = jnp.array([-1e4, -800, -40, -3, -0.5, -1e-9, 0, 1e-9, 0.5, 3, 40, 800, 1e4])
    reference, activation = REFERENCE[name], ACTIVATIONS[name]

    @jax.jit
    @jax.vmap
    def both(a):
        first, second = jax.grad(reference), jax.grad(jax.grad(reference))
        derivatives = [jax.grad(lambda a, i=i: activation(a)[i])(a) for i in (0, 1)]
        return (*activation(a), *derivatives), (reference(a), first(a), first(a), second(a))

    own, expected = both(a)
    assert np.all(np.isfinite(own))
    for values, reference_values in zip(own, expected, strict=True):
        np.testing.assert_allclose(values, reference_values, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_do_not_overflow_in_float32(name):
    a = jnp.array([-1e30, -1e4, -100, 0, 100, 1e4, 1e30], jnp.float32)
    both = jax.jit(lambda a: jax.jvp(ACTIVATIONS[name], (a,), (jnp.ones_like(a),)))
    for values in jax.tree.leaves(both(a)):
        assert values.dtype == jnp.float32
        assert np.all(np.isfinite(values))


def test_resolve_custom_function_is_differentiated():
    value, slope = resolve(jnp.arctan)(jnp.array([0.5, -2.0]))
    np.testing.assert_allclose(value, np.arctan([0.5, -2.0]))
    np.testing.assert_allclose(slope, [0.8, 0.2])


def test_mlp_float32_input_gives_float32():
    for depth in range(5):
        field = astype(mlp(3, WIDTHS[:depth]), jnp.float32)
        out = jax.eval_shape(
            field.velocity_and_divergence, jnp.float32(0.5), jnp.ones(3, jnp.float32)
        )
        assert [leaf.dtype for leaf in out] == [jnp.float32] * 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": "gate"}, "unknown time layer 'gate': use one of ignore, concat, squash"),
        ({"activation": "relu"}, "unknown activation 'relu': use one of tanh, softplus, silu"),
        ({"dim": 0}, "dim must be a whole number, at least 1; got dim=0"),
        ({"widths": (4, 0)}, "got widths=(4, 0)"),
        ({"context_dim": -1}, "context_dim=-1"),
        ({"conditioning": "film"}, "unknown conditioning 'film': use 'concat' or 'modulate'"),
        ({"conditioning": "modulate", "widths": (4,)}, "give context_dim and widths"),
        ({"conditioning": "modulate", "context_dim": 2}, "give context_dim and widths"),
    ],
)
def test_mlp_bad_arguments_raise(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MLP(**{"dim": 2, "widths": (), "key": jr.key(0)} | settings)


@pytest.mark.parametrize(
    ("widths", "output"), [((4, 9, 5), "tanh"), ((2, 5, 9, 4), None), ((9, 3, 5), None)]
)
@pytest.mark.parametrize("samples", [3, 7])  # fewer and more than the units of a layer
def test_mlp_divergence_of_a_batch_and_its_gradient_equal_the_trace(widths, output, samples):
    field = mlp(3, widths, output=output, scale=2.0)
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.normal(size=(samples, 3))), jnp.asarray(rng.uniform(size=samples))

    def closed(field, t, x):
        return field.velocity_and_divergence(t, x)[1]

    def trace(field, t, x):
        return jnp.trace(jax.jacfwd(lambda x: field(t, x))(x))

    def total(divergence, field, t, x):
        shared = jax.vmap(divergence, (None, None, 0))(field, t[0], x)
        own = jax.vmap(divergence, (None, 0, 0))(field, t, x)
        alone = divergence(field, t[1], x[1])
        return jnp.sum(shared**2) + jnp.sum(own**2) + alone**2, (shared, own, alone)

    @jax.jit
    def both(field, t, x):
        return [
            jax.value_and_grad(partial(total, of), argnums=(0, 2), has_aux=True)(field, t, x)
            for of in (closed, trace)
        ]

    found, expected = map(jax.tree.leaves, both(field, t, x))
    assert expected[0] > 1e-3
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_mlp_time_matrices_are_written_only_for_a_batch_at_one_time():
    field, t, x = mlp(3, (8, 8, 8)), jnp.zeros(20), jnp.zeros((20, 3))

    def shapes(function, *args):
        equations = jax.make_jaxpr(function)(*args).jaxpr.eqns
        return {out.aval.shape for e in equations for out in e.outvars}

    of_all = shapes(jax.vmap(field.velocity_and_divergence, (None, 0)), t[0], x)
    of_few = shapes(jax.vmap(field.velocity_and_divergence, (None, 0)), t[0], x[:7])
    of_own = shapes(jax.vmap(field.velocity_and_divergence), t, x)
    assert (8, 3, 8) in of_all
    assert not {(8, 3, 8), (20, 8, 3, 8)} & (of_few | of_own)
    # The largest array is W(t) for each sample.
    assert max(map(np.prod, of_own)) == 20 * 8 * 8
