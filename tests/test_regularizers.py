"""Regularizers: integrals along known paths, Taylor mode, shared products, and gradients."""

import re
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import FIELDS, drawn
from helpers import MATRIX, Linear, T, Tally, Traced, astype, mlp, slope
from jax.flatten_util import ravel_pytree
from scipy import linalg

from jcnf import CNF, Exact, ForwardMode, Hutchinson, Solve, transform
from jcnf.distributions import StandardNormal
from jcnf.divergence import FieldEvaluation, FixedNoise
from jcnf.fields import ACTIVATIONS, Field, Potential
from jcnf.objectives import likelihood
from jcnf.regularizers import (
    REGULARIZERS,
    hjb,
    jacobian,
    jacobian_exact,
    kinetic,
    lambda2,
    named,
    taylor,
    total_derivative,
)

TIGHT = Solve(solver="dopri8", rtol=1e-11, atol=1e-11)
ORDERS = (1, 2, 3, 4)
ANY_FIELD = {
    **{name: r for name, r in REGULARIZERS.items() if r is not hjb},
    **{f"taylor{order}": taylor(order) for order in ORDERS},
}
EVERY = {**REGULARIZERS, "taylor3": taylor(3)}
TIME, Z = jnp.asarray(0.3), jnp.array([[0.4, -1.1, 0.7], [1.3, 0.2, -0.6]])  # Z at t=0
NOISE = Hutchinson(2).draw_noise(jr.key(0), 2, 3, Z.dtype)


class Swing(Linear):
    """v = cos(t) A x, so that x(t) = expm(A sin t) x(0)."""

    def __call__(self, t, x, context=None):
        return jnp.cos(t) * (self.matrix @ x)


class Radial(Field):
    """v = -grad Phi = -x / (c - t), Phi = |x|^2 / (2 (c - t)), whose paths are straight lines."""

    c: float = eqx.field(static=True, default=2.0)
    dim: int = eqx.field(static=True, default=3)

    def gradient(self, t, x):
        return jnp.append(x / (self.c - t), jnp.sum(x**2) / (2 * (self.c - t) ** 2))

    def __call__(self, t, x, context=None):
        return -self.gradient(t, x)[: self.dim]


def quadratic(symmetric, rate):
    """Return a field with the potential Phi = x'Mx / 2 + rate t."""
    factor = jnp.asarray(np.c_[linalg.sqrtm(symmetric), np.zeros(3)])
    return eqx.tree_at(
        lambda f: (f.weight, f.factor, f.slope),
        drawn(Potential, 3, width=2, rank=3),
        (jnp.zeros(2), factor, jnp.array([0.0, 0.0, 0.0, rate])),
    )


def integrals(field, path, direction, *regularizers, divergence=ForwardMode()):  # noqa: B008
    """Integrate the regularizers along the paths `path(t)` by a solve."""
    settings = dict(solve=TIGHT, divergence=divergence, regularizers=regularizers)
    run = jax.jit(partial(transform, direction=direction, **settings))
    start = path(T if direction == "to_base" else 0.0)
    return run(CNF(field, StandardNormal(3), t1=T), jnp.asarray(start)).regularizers


def quadrature(rate):
    """Integrate `rate(t)`, (batch,), over [0, T] by Gauss-Legendre quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    return sum(w * rate(T * (1 + node) / 2) for node, w in zip(nodes, weights, strict=True)) * T / 2


SWING = Swing(jnp.asarray(MATRIX))


def swung(t):
    """Points at time t of the paths of `SWING` from Z."""
    return np.asarray(Z) @ linalg.expm(np.sin(t) * MATRIX).T


@cache
def of_swing(direction, by_taylor):
    """Integrate the regularizers that use Taylor mode, which are slow to compile, or the others."""
    some = [r for name, r in ANY_FIELD.items() if ("taylor" in name) == by_taylor]
    return integrals(SWING, swung, direction, *some)


def rates(t):
    """Rate of each regularizer on the path of `SWING`, by the derivatives of expm(A sin t) Z."""
    c, s = np.cos(t), np.sin(t)
    a, a2, a3, a4 = (np.linalg.matrix_power(MATRIX, k) for k in ORDERS)
    of_x = [
        c * a,
        c**2 * a2 - s * a,
        c**3 * a3 - 3 * c * s * a2 - c * a,
        c**4 * a4 - 6 * c**2 * s * a3 + (3 * s**2 - 4 * c**2) * a2 + s * a,
    ]
    x = swung(t)
    squares = [np.sum((x @ matrix.T) ** 2, axis=1) for matrix in of_x]
    norm = np.full(2, np.sum((c * MATRIX) ** 2))
    return {
        "kinetic": squares[0] / 2,
        "lambda1": squares[0],
        "directional": np.sum((x @ (c * MATRIX).T @ (c * MATRIX)) ** 2, axis=1) / 2,
        "total_derivative": squares[1] / 2,
        "jacobian_exact": norm,
        "jacobian": norm,
        "lambda2": np.sqrt(norm),
        **{f"taylor{k}": square for k, square in zip(ORDERS, squares, strict=True)},
    }


@pytest.mark.parametrize("direction", ["to_base", "to_data"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if "taylor" in n else ()) for n in ANY_FIELD],
)
def test_penalties_are_quadratures_in_both_directions(name, direction):
    penalty = of_swing(direction, "taylor" in name)[name]
    assert np.all(penalty > 0.01)
    np.testing.assert_allclose(penalty, quadrature(lambda t: rates(t)[name]), rtol=1e-8)


def test_penalties_by_probes_are_quadratures():
    divergence = FixedNoise(Hutchinson(2), NOISE)
    regularizers = integrals(SWING, swung, "to_data", jacobian, lambda2, divergence=divergence)
    estimate = np.mean(np.sum(np.square(np.asarray(NOISE) @ MATRIX.T), axis=2), axis=1)
    for name, power in (("jacobian", 1), ("lambda2", 0.5)):
        expected = quadrature(lambda t, power=power: (np.cos(t) ** 2 * estimate) ** power)
        np.testing.assert_allclose(regularizers[name], expected, rtol=1e-8)


@pytest.mark.parametrize("direction", ["to_base", "to_data"])
def test_hjb_is_its_quadrature(direction):
    symmetric, rate = MATRIX @ MATRIX.T, -0.4

    def path(t):
        return np.asarray(Z) @ linalg.expm(-t * symmetric)

    def expected(t):
        return np.abs(rate - np.sum((path(t) @ symmetric) ** 2, axis=1) / 2)

    regularizers = integrals(quadratic(symmetric, rate), path, direction, hjb)
    np.testing.assert_allclose(regularizers["hjb"], quadrature(expected), rtol=1e-8)


def test_hjb_vanishes_where_paths_are_straight_lines_at_constant_speed():
    def path(t):
        return Z * (1 - t / 2)

    regularizers = integrals(Radial(), path, "to_base", hjb, kinetic, total_derivative)
    np.testing.assert_allclose(regularizers["hjb"], 0, atol=1e-12)
    np.testing.assert_allclose(regularizers["total_derivative"], 0, atol=1e-12)
    expected = T * np.sum(np.square(Z), axis=1) / 8  # the speed is |z| / c with c = 2
    np.testing.assert_allclose(regularizers["kinetic"], expected, rtol=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_hjb_needs_a_potential():
    with pytest.raises(ValueError, match=r"Swing has none: use jcnf\.fields\.Potential"):
        hjb(SWING, TIME, Z[0], None, FieldEvaluation(Z[0], TIME))


def by_nested_jvps(field, order):
    """Return d^K x/dt^K, the derivative along the path, dg/dt + (dg/dx) v, of one order less."""

    def along_path(lower):
        return lambda t, x: jax.jvp(lower, (t, x), (jnp.ones_like(t), field(t, x)))[1]

    return field if order == 1 else along_path(by_nested_jvps(field, order - 1))


@pytest.mark.parametrize(
    "activation",
    [pytest.param(a, marks=pytest.mark.slow if a == "softplus" else ()) for a in ACTIVATIONS],
)
def test_taylor_is_nested_jvps(activation):
    field = mlp(2, (3,), scale=1.0, activation=activation)
    t, x = TIME, jnp.array([0.4, -0.9])

    def by_taylor(field, t, x):
        local = FieldEvaluation(field(t, x), t)
        rates = [taylor(order)(field, t, x, None, local) for order in ORDERS]
        return rates, total_derivative(field, t, x, None, local)

    @jax.jit
    def both(field, t, x):
        nested = [jnp.sum(by_nested_jvps(field, order)(t, x) ** 2) for order in ORDERS]
        return *by_taylor(field, t, x), nested

    rates, acceleration, nested = both(field, t, x)
    np.testing.assert_allclose(rates, nested, rtol=1e-11)
    np.testing.assert_allclose(acceleration, rates[1] / 2, rtol=1e-13)
    assert np.all(np.asarray(rates) > 1e-4)
    halves = jax.eval_shape(by_taylor, *astype((field, t, x), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "planar" else pytest.mark.slow) for n in FIELDS]
)
def test_taylor_is_nested_jvps_in_every_field(name):
    field = FIELDS[name]()
    context = jnp.array([0.3, -0.4]) if field.context_dim else None

    def given(t, x):
        return field(t, x, context)

    @jax.jit
    def both(t, x):
        nested = jnp.sum(by_nested_jvps(given, 3)(t, x) ** 2)
        return taylor(3)(field, t, x, context, FieldEvaluation(given(t, x), t)), nested

    rate, nested = both(TIME, jnp.array([0.4, -0.9, 0.2]))
    np.testing.assert_allclose(rate, nested, rtol=1e-11)
    assert nested > 1e-6


@cache
def slopes():
    """Directional derivative of each rate in the field and x, by reverse mode and differences."""
    at, unravel = ravel_pytree((drawn(Potential, 3, width=4, rank=2), Z[0]))
    direction = np.random.default_rng(1).normal(0, at.size**-0.5, at.shape)

    @jax.jit
    def rates_and_gradients(at):
        def rates(at):
            field, x = unravel(at)
            local = Hutchinson(2)(field, TIME, x, None, NOISE[0])
            return jnp.stack([rate(field, TIME, x, None, local) for rate in EVERY.values()])

        return rates(at), jax.jacrev(rates)(at)

    by_difference = slope(lambda h: rates_and_gradients(at + h * direction)[0])
    both = np.stack([rates_and_gradients(at)[1] @ direction, by_difference])
    return dict(zip(EVERY, both.T, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_finite_differences(name):
    by_reverse_mode, by_difference = slopes()[name]
    assert abs(by_difference) > 1e-2
    assert by_reverse_mode == pytest.approx(by_difference, rel=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_float32_in_float32_out(name):
    field, t, x, noise = astype((quadratic(np.eye(3), 0.2), TIME, Z[0], NOISE[0]), jnp.float32)
    local = jax.eval_shape(Hutchinson(2), field, t, x, None, noise)
    rate = jax.eval_shape(partial(EVERY[name], context=None), field, t, x, local=local)
    assert (rate.shape, rate.dtype) == ((), jnp.float32)


@pytest.mark.parametrize("divergence", [Hutchinson(2), ForwardMode()], ids=repr)
def test_shared_products_cost_no_evaluation_more(divergence):
    def traced(*regularizers):
        flow = CNF(Traced(mlp(3, (4,)), Tally()), StandardNormal(3))
        solve = Solve(solver="euler", step=0.5)
        run = partial(transform, solve=solve, divergence=divergence, regularizers=regularizers)
        jax.eval_shape(lambda x, key: run(flow, x, key=key), Z, jr.key(0))
        return flow.bijection.field.tally.count

    assert traced() == traced(kinetic, jacobian, lambda2) > 0
    assert traced() < traced(jacobian_exact)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("penalty", [jacobian, lambda2])
def test_a_closed_form_has_no_products_to_share(penalty):
    field = mlp(3, (4,))
    with pytest.raises(ValueError, match=re.escape("jcnf.Exact(probes=1), jcnf.ForwardMode() or")):
        penalty(field, TIME, Z[0], None, Exact()(field, TIME, Z[0], None, None))
    local = Exact(probes=1)(field, TIME, Z[0], None, NOISE[0, :1])
    assert penalty(field, TIME, Z[0], None, local) > 0


def test_lambda2_has_a_gradient_where_the_jacobian_is_zero():
    @jax.jit
    @jax.grad
    def gradient(matrix):
        field = Linear(matrix)
        return lambda2(field, TIME, Z[0], None, ForwardMode()(field, TIME, Z[0], None, None))

    np.testing.assert_array_equal(gradient(jnp.zeros((3, 3))), 0)
    np.testing.assert_allclose(gradient(2 * jnp.eye(3)), np.eye(3) / np.sqrt(3), rtol=1e-12)


def test_penalties_have_names():
    assert {name: named(name) for name in REGULARIZERS} == REGULARIZERS
    assert named("taylor3") is taylor(3)
    assert taylor(3).__name__ == "taylor3"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["kinetics", "taylor", "taylor-1", "taylor2.5", ""])
def test_unknown_names_are_told_the_known(name):
    message = f"unknown regularizer {name!r}: use one of kinetic, jacobian, jacobian_exact, direct"
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*or taylorK as in taylor3"):
        named(name)


def test_taylor_starts_at_order_one():
    with pytest.raises(ValueError, match="order must be a whole number, at least 1; got order=0"):
        named("taylor0")


def test_likelihood_weighs_and_reports_penalties_by_name():
    regularizers = {kinetic: 0.5, jacobian_exact: 0.25, taylor(2): 2.0}
    run = partial(likelihood, key=None, solve=Solve(step=T / 3), regularizers=regularizers)
    flow = CNF(SWING, StandardNormal(3), t1=T)
    loss, metrics = jax.jit(run)(flow, Z)
    weighted = 0.5 * metrics["kinetic"] + 0.25 * metrics["jacobian_exact"] + 2 * metrics["taylor2"]
    np.testing.assert_allclose(loss, metrics["nll"] + weighted, rtol=1e-14)
    assert min(metrics[r.__name__] for r in regularizers) > 0.01
