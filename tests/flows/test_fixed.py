"""Affine maps and other fixed parts: log-dets, whitening, and flow matching through them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import CONTEXT_MATRIX, MATRIX, TIGHT, T, astype, carried, linear, mlp
from scipy import linalg, stats

import jcnf
from jcnf import evaluate, training
from jcnf.distributions import StandardNormal
from jcnf.flows import CNF, ODE, Affine, Chain, Composition, Fixed, Flow
from jcnf.objectives import flow_matching

RNG = np.random.default_rng(0)
LOC = np.array([1.0, -2.0, 0.5])
SCALE = np.array([[1.5, 0.3, -0.2], [0.7, -0.8, 0.4], [0.1, 0.9, 2.0]])  # of negative determinant
X, CONTEXT = jnp.asarray(RNG.normal(size=(30, 3))), jnp.asarray(RNG.normal(size=(30, 2)))
# Rows of unequal scales and dependence, whose mean depends on a context.
GIVEN = RNG.normal(3.0, 2.0, size=(400, 2))
ROWS = RNG.normal(size=(400, 3)) @ np.diag([100.0, 1.0, 1e-3]) @ MATRIX.T + [50.0, -7.0, 0.0]
ROWS = ROWS + GIVEN @ CONTEXT_MATRIX.T

transform = eqx.filter_jit(jcnf.transform)


def affine(weight=None):
    return Flow(Affine(LOC, SCALE, weight), StandardNormal(3))


@pytest.mark.parametrize("weight", [None, CONTEXT_MATRIX])
def test_an_affine_map_is_its_formula_and_comes_back(weight):
    flow, context = affine(weight), None if weight is None else CONTEXT
    forward = transform(flow, X, direction="to_data", context=context)
    shift = 0 if weight is None else np.asarray(CONTEXT) @ weight.T
    np.testing.assert_allclose(forward.value, np.asarray(X) @ SCALE.T + LOC + shift, rtol=1e-12)
    back = transform(flow, forward.value, direction="to_base", context=context)
    np.testing.assert_allclose(back.value, X, atol=1e-12)
    _, expected = np.linalg.slogdet(SCALE)
    assert abs(expected) > 0.1
    np.testing.assert_allclose(forward.logdet, expected, rtol=1e-12)
    np.testing.assert_allclose(back.logdet, -expected, rtol=1e-12)
    law = stats.multivariate_normal(LOC, SCALE @ SCALE.T)
    log_prob = eqx.filter_jit(jcnf.log_prob)(flow, forward.value, context=context)
    np.testing.assert_allclose(log_prob, law.logpdf(forward.value - shift), rtol=1e-10)
    assert flow.context_dim == (0 if weight is None else 2)


def test_whitened_rows_have_mean_0_and_the_identity_as_covariance():
    whiten = Affine.whiten(ROWS, ridge=1e-14)
    z, _ = whiten.both(jnp.asarray(ROWS), "to_base")
    np.testing.assert_allclose(np.mean(z, axis=0), 0, atol=1e-8)
    np.testing.assert_allclose(np.cov(z.T, ddof=0), np.eye(3), atol=1e-5)
    # The axes are the principal ones: the columns of the scale are orthogonal.
    gram = np.asarray(whiten.scale.T @ whiten.scale)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12 * gram.max())


def test_whitening_given_a_context_is_of_what_regression_leaves():
    whiten = Affine.whiten(ROWS, GIVEN, ridge=1e-14)
    z, _ = whiten.both(jnp.asarray(ROWS), "to_base", jnp.asarray(GIVEN))
    np.testing.assert_allclose(np.mean(z, axis=0), 0, atol=1e-6)
    together = np.cov(np.concatenate([z, GIVEN], axis=1).T, ddof=0)
    np.testing.assert_allclose(together[:3, :3], np.eye(3), atol=1e-3)
    np.testing.assert_allclose(together[:3, 3:], 0, atol=1e-6)
    assert np.abs(np.cov(np.concatenate([ROWS, GIVEN], axis=1).T)[:3, 3:]).max() > 1


def test_columns_that_determine_one_another_are_told_apart_by_the_ridge():
    rows = np.concatenate([ROWS, ROWS[:, :1] + ROWS[:, 1:2]], axis=1)
    z, logdet = Affine.whiten(rows).both(jnp.asarray(rows), "to_base")
    assert np.isfinite(logdet).all()
    variances = np.linalg.eigvalsh(np.cov(np.asarray(z).T))
    assert np.all(variances < 1.01)
    assert variances[0] < 1e-6
    assert np.all(np.std(z, axis=0)[1:] < 1.01)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Affine([[1.0]], np.eye(1)), "expected loc of shape"),
        (lambda: Affine(LOC, np.eye(2)), r"got \(3,\) and \(2, 2\)"),
        (lambda: Affine(LOC, SCALE, CONTEXT_MATRIX.T), r"expected weight of shape \(3, context\)"),
        (lambda: Affine(LOC, np.ones((3, 3))), "scale must be invertible"),
        (lambda: Affine(LOC * np.nan, SCALE), "loc has NaN or inf"),
        (lambda: Affine(LOC, SCALE * np.inf), "scale has NaN or inf"),
        (lambda: Affine(LOC, SCALE, CONTEXT_MATRIX * np.nan), "weight has NaN or inf"),
        (lambda: Affine.whiten(ROWS[:, 0]), r"expected x of shape \(n, dim\)"),
        (lambda: Affine.whiten(ROWS[:1]), "at least 2 rows"),
        (lambda: Affine.whiten(ROWS * np.nan), "x has NaN or inf"),
        (lambda: Affine.whiten(ROWS, GIVEN[1:]), r"context of shape \(400, context\)"),
        (lambda: Affine.whiten(ROWS, GIVEN[:, 0]), r"context of shape \(400, context\)"),
        (lambda: Affine.whiten(ROWS, GIVEN * np.nan), "context has NaN or inf"),
        (lambda: Affine.whiten(0 * ROWS), "x must vary"),
        (lambda: Affine.whiten(ROWS, ridge=-1.0), "ridge must be"),
        (
            lambda: jcnf.log_prob(affine(CONTEXT_MATRIX), X),
            "the flow takes a context of size 2; got none",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Softplus(Fixed):
    """x = log(1 + e^z), positive."""

    def both(self, x, direction, context=None):
        if direction == "to_data":
            return jax.nn.softplus(x), jnp.sum(jax.nn.log_sigmoid(x), axis=1)
        z = x + jnp.log(-jnp.expm1(-x))
        return z, -jnp.sum(jax.nn.log_sigmoid(z), axis=1)


def chain(context=None):
    """Return x = softplus(LOC + SCALE expm(A T) z), and its inner flow."""
    inner = linear()
    parts = [inner.bijection, Affine(LOC, SCALE, context), Softplus()]
    return Chain(parts, StandardNormal(3)), inner


def test_a_chain_of_an_ode_and_fixed_parts_has_its_density():
    flow, _ = chain()
    z = jr.normal(jr.key(0), (30, 3))
    x = np.log1p(np.exp(carried(z) @ SCALE.T + LOC))
    law = stats.multivariate_normal(LOC, *[m @ m.T for m in [SCALE @ linalg.expm(T * MATRIX)]])
    y = np.log(np.expm1(x))
    expected = law.logpdf(y) + np.sum(y - x, axis=1) * -1  # dx/dy = e^(y - x)
    found = eqx.filter_jit(jcnf.log_prob)(flow, jnp.asarray(x), solve=TIGHT)
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_rows_outside_of_the_support_fail_alone():
    x = jnp.ones((6, 3)).at[2, 1].set(-1.0)
    scores = evaluate.log_prob(Flow(Softplus(), StandardNormal(3)), x)
    np.testing.assert_array_equal(np.flatnonzero(scores.failed), [2])
    np.testing.assert_array_equal(np.isnan(scores.log_prob), scores.failed)


@pytest.mark.parametrize("weight", [None, CONTEXT_MATRIX])
def test_flow_matching_through_fixed_parts_is_that_of_the_carried_data(weight):
    context = None if weight is None else CONTEXT
    field = mlp(3, (4,), context_dim=0 if weight is None else 2)
    outer = [Affine(LOC, SCALE, weight), Softplus()]
    whole = Chain([ODE(field, T), *outer], StandardNormal(3))
    x = jnp.exp(X)
    inside = np.log(np.expm1(x)) - LOC
    inside = inside if weight is None else inside - np.asarray(CONTEXT) @ weight.T
    inside = jnp.asarray(np.linalg.solve(SCALE, inside.T).T)
    settings = {"key": jr.key(1), "context": context}
    found, _ = flow_matching(whole, x, **settings)
    expected, _ = flow_matching(CNF(field, StandardNormal(3), T), inside, **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_flow_matching_does_not_train_fixed_parts():
    flow, inner = chain()

    def loss(flow):
        return flow_matching(flow, jnp.exp(X), jr.key(1))[0]

    gradient = eqx.filter_grad(loss)(flow)
    assert np.any(np.asarray(gradient.bijection.parts[0].field.matrix) != 0)
    for part in gradient.bijection.parts[1:]:
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(part))
    params = training.init(flow, training.make_optimizer(0.1, 10)).params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == inner.bijection.field.matrix.size


def test_flow_matching_refuses_other_chains(unchecked):
    ode = linear().bijection
    for parts in ([ode, ode], [Affine(LOC, SCALE), ode], [Affine(LOC, SCALE)]):
        with pytest.raises(ValueError, match=r"flow matching needs .*; got (ODE|Affine)"):
            flow_matching(Chain(parts, StandardNormal(3)), X, jr.key(0))


def test_float32_in_float32_out():
    flow, _ = chain()
    x = jnp.exp(X)
    expected = eqx.filter_jit(jcnf.log_prob)(flow, x)
    outer = Flow(Composition(flow.bijection.parts[1:]), StandardNormal(3))
    expected = eqx.filter_jit(jcnf.log_prob)(outer, x)
    found = eqx.filter_jit(jcnf.log_prob)(astype(outer, jnp.float32), x.astype(jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
