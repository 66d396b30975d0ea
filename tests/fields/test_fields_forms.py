"""Planar, potential, residual and wrapped fields against their formulas, written out in NumPy."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import FIELDS, drawn, mixture
from helpers import MATRIX, Linear, astype

from jcnf.fields import (
    MLP,
    Field,
    Guided,
    MinusIdentity,
    Mixture,
    Planar,
    Potential,
    ResNet,
    TimeRescaling,
)

TIME, X = jnp.asarray(0.3), jnp.array([0.4, -1.1, 0.7])
CONTEXT = jnp.array([0.9, -0.2])
LINEAR = Linear(jnp.asarray(MATRIX))


class Clock(Field):
    """v = t c, independent of x."""

    direction: jax.Array
    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        return t * self.direction


def test_planar_equals_its_formula():
    """theta(t) is W, U, G, B in this order; sigmoid(G) scales U; units are summed or averaged."""
    summed, t, x, dim, width = FIELDS["planar summed"](), 0.3, np.asarray(X), 3, 5
    theta = np.array([t])
    for layer in summed.hypernet[:2]:
        theta = np.tanh(layer.weight @ theta + layer.bias)
    theta = np.asarray(summed.hypernet[2].weight @ theta + summed.hypernet[2].bias)
    assert theta.shape == (3 * width * dim + width,)
    v, divergence = np.zeros(dim), 0.0
    for m in range(width):
        w, u, g = (theta[(k * width + m) * dim :][:dim] for k in range(3))
        u = u / (1 + np.exp(-g))
        h = np.tanh(w @ x + theta[3 * width * dim + m])
        v += u * h
        divergence += u @ w * (1 - h**2)
    for field, count in ((summed, 1), (FIELDS["planar"](), width)):
        own_v, own_divergence = field.velocity_and_divergence(TIME, X)
        np.testing.assert_allclose(own_v, v / count, rtol=1e-12)
        np.testing.assert_allclose(own_divergence, divergence / count, rtol=1e-12)


def test_planar_starts_away_from_zero():
    """With zero biases in the hypernetwork, the field would be 0 at t=0."""
    field = jax.jit(lambda key: Planar(2, width=4, hidden=3, key=key))(jr.key(0))
    assert [layer.weight.shape for layer in field.hypernet] == [(3, 1), (3, 3), (28, 3)]
    assert np.max(np.abs(field(jnp.asarray(0.0), jnp.ones(2)))) > 1e-3


def test_potential_equals_its_formula():
    field = FIELDS["potential"]()
    k0, b0 = np.asarray(field.opening.weight), np.asarray(field.opening.bias)
    k1, b1 = np.asarray(field.inner.weight), np.asarray(field.inner.bias)
    a, s = np.asarray(field.factor), np.array([*X, TIME])
    h = np.log(2 * np.cosh(k0 @ s + b0))
    n = h + np.log(2 * np.cosh(k1 @ h + b1))
    expected = field.weight @ n + s @ a.T @ a @ s / 2 + field.slope @ s + field.constant
    np.testing.assert_allclose(field.potential(TIME, X), expected, rtol=1e-12)


@jax.jit
def derivatives(field, t, x):
    """Return the closed forms, and the same values by differentiating the potential."""
    by_x, by_t = jax.grad(field.potential, argnums=(1, 0))(t, x)
    laplacian = jnp.trace(jax.hessian(field.potential, argnums=1)(t, x))
    own = (field.gradient(t, x), *field.velocity_and_divergence(t, x))
    return own, (jnp.append(by_x, by_t), -by_x, -laplacian)


def test_potential_gradient_and_laplacian_equal_autodiff():
    field = FIELDS["potential"]()
    # Without biases every pre-activation is 0 at the origin, where |a| has no derivative.
    bare = eqx.tree_at(
        lambda f: (f.opening.bias, f.inner.bias), field, (jnp.zeros(5), jnp.zeros(5))
    )
    for f, t, x in ((field, TIME, X), (bare, jnp.zeros(()), jnp.zeros(3))):
        own, expected = derivatives(f, t, x)
        for values, by_autodiff in zip(own, expected, strict=True):
            assert np.max(np.abs(by_autodiff)) > 1e-2
            np.testing.assert_allclose(values, by_autodiff, rtol=0, atol=1e-10)


def test_potential_does_not_overflow_in_float32():
    field, t, x = astype((FIELDS["potential"](), TIME, X * 1e8), jnp.float32)
    for values in jax.tree.leaves(derivatives(field, t, x)):
        assert np.all(np.isfinite(values))


def test_potential_initial_values_are_moderate_and_rank_bounds_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)))

    @jax.jit
    def initial(key):
        field = Potential(4, key=key)
        return field, jax.vmap(field, in_axes=(None, 0))(TIME, x)

    field, v = initial(jr.key(0))
    assert field.factor.shape == (5, 5)
    assert 0.1 < np.sqrt(np.mean(np.square(v))) < 2


def silu(a):
    return a / (1 + np.exp(-a))


@pytest.mark.parametrize("name", ["resnet", "resnet with fourier features"])
def test_resnet_equals_its_formula(name):
    field, t = FIELDS[name](), 0.3
    context = CONTEXT if field.context_dim else None
    angles = np.pi * np.array([1, 2])[: field.time_frequencies] * t
    e = np.array([t, *np.sin(angles), *np.cos(angles), *(() if context is None else context)])
    angles = (
        np.zeros((0, 3)) @ X if field.fourier_frequencies is None else field.fourier_frequencies @ X
    )
    assert len(angles) == (3 if name == "resnet with fourier features" else 0)
    x = np.array([*X, *np.sin(angles), *np.cos(angles)])
    h = np.asarray(field.entry.weight @ x + field.entry.bias)
    assert len(field.blocks) == 2
    for block in field.blocks:
        parts = (block.inner, block.condition, block.outer)
        (w, p), (u, q), (v, r) = (map(np.asarray, (m.weight, m.bias)) for m in parts)
        h = h + v @ silu(w @ silu(h) + p + u @ e + q) + r
    expected = np.asarray(field.readout.weight) @ silu(h) + np.asarray(field.readout.bias)
    np.testing.assert_allclose(field(TIME, X, context), expected, rtol=1e-12)


def test_resnet_starts_at_rest_with_all_blocks_alive():
    make = jax.jit(lambda key: ResNet(3, 16, 2, time_frequencies=1, context_dim=2, key=key))
    field = make(jr.key(0))
    np.testing.assert_array_equal(field(TIME, X, CONTEXT), np.zeros(3))
    weights = [field.entry.weight]
    weights += [m.weight for b in field.blocks for m in (b.inner, b.condition, b.outer)]
    for weight in weights:
        assert np.var(weight) == pytest.approx(1 / (3 * weight.shape[1]), rel=0.5)
    corners = {float(weight[0, 0]) for weight in weights}
    assert len(corners) == len(weights)  # each has its own key


@pytest.mark.parametrize("frequencies", [0, 1, 2])
def test_resnet_time_frequencies_tell_times_apart(frequencies):
    """With weight 0 on t itself, only the frequencies depend on time; the first has period 2."""
    field = drawn(ResNet, 3, 5, 2, time_frequencies=frequencies)
    assert field.blocks[0].condition.weight.shape == (5, 1 + 2 * frequencies)

    def conditions(field):
        return [block.condition.weight for block in field.blocks]

    timeless = [weight.at[:, 0].set(0) for weight in conditions(field)]
    field = eqx.tree_at(conditions, field, timeless)
    now, later, period = (field(TIME + dt, X) for dt in (0, 1, 2))
    np.testing.assert_allclose(period, now, rtol=0, atol=1e-12)
    assert (np.max(np.abs(later - now)) > 1e-2) == (frequencies > 0)


def test_guided_is_linear_in_its_scale():
    f = FIELDS["mlp context"]()
    with_context, without = (f(TIME, X, c) for c in (CONTEXT, jnp.zeros(2)))
    assert np.max(np.abs(with_context - without)) > 1e-2
    for scale in (0.0, 0.3, 1.0, 2.5):
        expected = (1 - scale) * without + scale * with_context
        v = Guided(f, scale)(TIME, X, CONTEXT)
        np.testing.assert_allclose(v, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["guided", "mlp modulated", "resnet"])
def test_guided_divergence_equals_the_trace(name):
    """The divergence has a closed form if the field inside has one; otherwise, forward mode."""
    inside = FIELDS[name]()
    field = inside if name == "guided" else Guided(inside, 2.5)

    @jax.jit
    def both(t, x, c):
        return field.velocity_and_divergence(t, x, c), (
            field(t, x, c),
            jnp.trace(jax.jacrev(field, argnums=1)(t, x, c)),
        )

    own, expected = both(TIME, X, CONTEXT)
    plain = field.field.velocity_and_divergence(TIME, X, CONTEXT)[1]
    assert abs(plain - expected[1]) > 1e-2
    for value, other in zip(own, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-10)


def test_minus_identity_subtracts_x():
    v, divergence = MinusIdentity(LINEAR).velocity_and_divergence(TIME, X)
    np.testing.assert_allclose(v, (MATRIX - np.eye(3)) @ X, rtol=1e-13)
    np.testing.assert_allclose(divergence, np.trace(MATRIX) - 3, rtol=1e-13)


def test_mixture_weights_are_a_softmax_in_time():
    field = mixture(LINEAR, Clock(jnp.array([1.0, 2.0, -1.0])))
    logits = field.share_weight * 0.3 + field.share_bias
    p = np.exp(logits) / np.sum(np.exp(logits))
    v, divergence = field.velocity_and_divergence(TIME, X)
    expected = p[0] * MATRIX @ X + p[1] * 0.3 * np.array([1, 2, -1])
    np.testing.assert_allclose(v, expected, rtol=1e-13)
    np.testing.assert_allclose(divergence, p[0] * np.trace(MATRIX), rtol=1e-13)
    assert field.shares(jnp.asarray(5.0))[0] > 0.99


def test_time_rescaling_runs_the_field_faster_from_its_start():
    field = TimeRescaling(Clock(jnp.ones(3)), 2.5, start=0.2)
    np.testing.assert_allclose(field.rate, 2.5)
    np.testing.assert_allclose(field(TIME, X), 2.5 * (0.2 + 2.5 * 0.3) * np.ones(3))
    np.testing.assert_allclose(TimeRescaling(LINEAR, 2.5).velocity_and_divergence(TIME, X)[1], 2.75)


def test_time_rescaling_trains_only_its_rate():
    field = TimeRescaling(Clock(jnp.ones(3)), 2.5, start=0.2)
    assert len(jax.tree.leaves(eqx.filter(field, eqx.is_inexact_array))) == 2
    rate = TimeRescaling(Clock(jnp.ones(3)), 3.0).sqrt_rate
    assert not rate.weak_type  # otherwise the first update would recompile
    np.testing.assert_allclose(rate**2, 3)

    @jax.jit
    def gradients(rate, start):
        return jax.grad(
            lambda *a: TimeRescaling(Clock(jnp.ones(3)), *a)(TIME, X)[0], argnums=(0, 1)
        )(rate, start)

    by_rate, by_start = gradients(jnp.asarray(2.5), jnp.asarray(0.2))
    np.testing.assert_allclose(by_rate, 0.2 + 2 * 2.5 * 0.3, rtol=1e-13)  # d/dr of r (start + r t)
    assert by_start == 0


def test_wrappers_have_the_context_dim_of_the_inner_field():
    conditional, plain = drawn(MLP, 3, (4,), context_dim=2), drawn(MLP, 3, (4,))
    wraps = (
        MinusIdentity,
        lambda field: TimeRescaling(field, 2.0),
        lambda field: Guided(field, 2.0),
        mixture_of_two,
    )
    for wrap in wraps:
        assert [wrap(f).context_dim for f in (conditional, plain, LINEAR)] == [2, 0, 0]
    assert mixture(conditional, conditional).context_dim == 2


def mixture_of_two(field):
    return mixture(field, field)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Planar(2, 0, key=jr.key(0)), "got width=0"),
        (lambda: Potential(2, rank=0, key=jr.key(0)), "got rank=0"),
        (lambda: ResNet(2, 0, key=jr.key(0)), "got width=0"),
        (lambda: ResNet(2, blocks=0, key=jr.key(0)), "got blocks=0"),
        (lambda: ResNet(0, key=jr.key(0)), "got dim=0"),
        (
            lambda: ResNet(2, time_frequencies=-1, key=jr.key(0)),
            "time_frequencies=-1",
        ),
        (lambda: ResNet(2, fourier_features=-1, key=jr.key(0)), "fourier_features=-1"),
        (
            lambda: ResNet(2, context_dim=-1, key=jr.key(0)),
            "context_dim=-1",
        ),
        (
            lambda: ResNet(2, activation="relu", key=jr.key(0)),
            "unknown activation 'relu': use one of tanh",
        ),
        (lambda: TimeRescaling(LINEAR, 0.0), "rate must be positive and finite; got 0.0"),
        (lambda: TimeRescaling(LINEAR, float("nan")), "rate must be positive and finite; got nan"),
        (lambda: Mixture((), key=jr.key(0)), "fields must be at least one field"),
        (lambda: mixture(LINEAR, Clock(jnp.ones(2), 2)), "of (dim, context_dim) [(2, 0), (3, 0)]"),
        (
            lambda: mixture(drawn(MLP, 3, (4,)), drawn(MLP, 3, (4,), context_dim=2)),
            "of (dim, context_dim) [(3, 0), (3, 2)]",
        ),
    ],
)
def test_fields_bad_arguments_raise(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
