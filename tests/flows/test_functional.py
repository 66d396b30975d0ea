"""Flows: densities, samples and paths against closed forms; failure, dtypes, jit and vmap."""

import re
import warnings
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    MATRIX,
    TIGHT,
    NotANumber,
    T,
    affine,
    astype,
    carried,
    linear,
    log_density,
    mlp,
)
from scipy import linalg

import jcnf
from jcnf import CNF, Exact, ForwardMode, Hutchinson, Solve
from jcnf.distributions import ScaledNormal, StandardNormal
from jcnf.fields import Field
from jcnf.regularizers import kinetic

pytestmark = pytest.mark.optimized

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 3)))
CONTEXT = jnp.asarray(RNG.normal(size=(5, 2)))
COARSE = Solve(solver="heun", step=0.4)

log_prob = eqx.filter_jit(jcnf.log_prob)
transform = eqx.filter_jit(jcnf.transform)


# Closed forms: v = A x + C c + b with tr A != 0 makes the base a general Gaussian


@pytest.mark.parametrize(
    ("make", "context", "divergence"),
    [(linear, None, Exact()), (affine, CONTEXT, Exact()), (affine, CONTEXT, ForwardMode())],
)
def test_log_prob_is_the_gaussians(make, context, divergence):
    log_p = log_prob(make(), X, context=context, solve=TIGHT, divergence=divergence)
    assert log_p.shape == (5,)
    np.testing.assert_allclose(log_p, log_density(X, context), rtol=0, atol=1e-8)


def test_hutchinsons_noise_is_fixed_within_a_solve_and_unbiased():
    num, key, strategy = 2000, jr.key(1), Hutchinson(2)
    x = jnp.tile(X[:1], (num, 1))
    log_p = log_prob(linear(), x, key=key, solve=TIGHT, divergence=strategy)
    noise = np.asarray(strategy.draw_noise(key, num, 3, x.dtype))
    estimate = np.einsum("nki,ij,nkj->n", noise, MATRIX, noise) / 2
    # d logdet/dt = mean_k e_k' A e_k is constant, and time runs backward from data to base.
    exact = log_density(X[:1])
    np.testing.assert_allclose(log_p, exact - T * (estimate - np.trace(MATRIX)), atol=1e-8)
    assert abs(np.mean(log_p) - exact) < 4 * np.std(log_p) / np.sqrt(num)
    assert np.std(log_p) > 0.1


def test_samples_are_base_samples_carried():
    num, key = 4000, jr.key(2)
    flow = affine()
    context = jnp.tile(CONTEXT[:1], (num, 1))
    x = eqx.filter_jit(jcnf.sample)(flow, key, num, context=context, solve=TIGHT)
    expected = carried(flow.base.sample(key, num), context=context)
    np.testing.assert_allclose(x, expected, atol=1e-8)
    propagator = linalg.expm(T * MATRIX)
    covariance = propagator @ propagator.T
    np.testing.assert_allclose(np.cov(x, rowvar=False), covariance, atol=0.1 * covariance.max())


def test_sample_and_log_prob_agrees_with_log_prob():
    compiled = eqx.filter_jit(jcnf.sample_and_log_prob)
    x, log_p = compiled(affine(), jr.key(3), 5, context=CONTEXT, solve=TIGHT)
    assert x.shape == (5, 3)
    np.testing.assert_allclose(log_p, log_density(x, CONTEXT), atol=1e-8)
    again = log_prob(affine(), x, context=CONTEXT, solve=TIGHT, divergence=Exact())
    np.testing.assert_allclose(log_p, again, atol=1e-8)


@pytest.mark.parametrize("direction", ["to_base", "to_data"])
def test_penalty_and_logdet_in_both_directions(direction):
    nodes, weights = np.polynomial.legendre.leggauss(12)
    z = X if direction == "to_data" else carried(X, -T)
    velocity = [carried(z, T * (1 + u) / 2) @ MATRIX.T for u in nodes]
    rates = np.sum(np.square(velocity), axis=2) / 2
    result = transform(linear(), X, direction=direction, solve=TIGHT, regularizers=(kinetic,))
    assert list(result.regularizers) == ["kinetic"]
    assert np.all(result.regularizers["kinetic"] > 0)
    np.testing.assert_allclose(result.regularizers["kinetic"], weights @ rates * T / 2, rtol=1e-8)
    sign = 1 if direction == "to_data" else -1
    np.testing.assert_allclose(result.logdet, sign * T * np.trace(MATRIX), atol=1e-9)
    np.testing.assert_allclose(result.value, carried(X, sign * T), atol=1e-9)
    assert not jnp.any(result.stats.failed)


def test_trajectory_follows_the_path_both_ways():
    trajectory = eqx.filter_jit(jcnf.trajectory)
    times = np.array([0, 0.1, 0.35, 0.36, T])
    exact = np.stack([carried(X, t, CONTEXT) for t in times])
    settings = {"context": CONTEXT, "solve": TIGHT}
    up = trajectory(affine(), X, jnp.asarray(times), **settings)
    down = trajectory(affine(), jnp.asarray(exact[-1]), jnp.asarray(times[::-1].copy()), **settings)
    assert up.shape == down.shape == (5, 5, 3)
    np.testing.assert_allclose(up, exact, atol=1e-7)
    np.testing.assert_allclose(down[::-1], exact, atol=1e-7)
    np.testing.assert_allclose(up[-1], exact[-1], atol=1e-9)
    np.testing.assert_allclose(up[0], X, atol=0)


# A field without a closed form


@eqx.filter_jit
def jacobian(flow, x, direction):
    """Return the end, its log-det, and the Jacobian (batch, dim, batch, dim) by autodiff."""
    solve = Solve(rtol=1e-10, atol=1e-10, adjoint=diffrax.ForwardMode())

    def run(x):
        result = jcnf.transform(flow, x, direction=direction, solve=solve)
        return result.value, (result.value, result.logdet)

    derivative, (x, logdet) = jax.jacfwd(run, has_aux=True)(x)
    return x, logdet, derivative


def test_logdet_is_that_of_the_jacobian_both_ways_and_the_way_back_leads_home():
    flow = CNF(mlp(3, (8, 8)), StandardNormal(3), t1=T)
    x = X[:3]
    start = x
    for direction in ("to_base", "to_data"):
        x, logdet, derivative = jacobian(flow, x, direction)
        blocks = jnp.stack([derivative[i, :, i] for i in range(3)])
        sign, expected = jnp.linalg.slogdet(blocks)
        assert np.all(sign == 1)
        assert np.ptp(logdet) > 0.1
        np.testing.assert_allclose(logdet, expected, rtol=0, atol=1e-7)
        others = derivative.at[jnp.arange(3), :, jnp.arange(3)].set(0)
        np.testing.assert_allclose(others, 0, atol=1e-7)  # samples do not interact
        if direction == "to_base":
            assert np.max(np.abs(x - start)) > 0.5
            there = logdet
    np.testing.assert_allclose(x, start, rtol=0, atol=1e-8)
    np.testing.assert_allclose(logdet, -there, rtol=0, atol=1e-8)


def test_round_trip_in_float32():
    flow = astype(CNF(mlp(3, (8, 8)), StandardNormal(3), t1=T), jnp.float32)
    x, solve = X.astype(jnp.float32), Solve(rtol=1e-6, atol=1e-6)
    there = transform(flow, x, solve=solve, regularizers=(kinetic,))
    back = transform(flow, there.value, direction="to_data", solve=solve, regularizers=(kinetic,))
    assert not jnp.any(there.stats.failed)
    assert np.max(np.abs(back.value - x)) < 1e-5
    assert np.max(np.abs(back.logdet + there.logdet)) < 1e-5
    floats = [leaf for leaf in jax.tree.leaves((there, back)) if eqx.is_inexact_array(leaf)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def test_regularizers_add_up_by_name():
    def squared_norm(field, t, x, context, local):
        return jnp.sum(x**2)

    run = partial(jcnf.transform, linear(), solve=COARSE, regularizers=(kinetic, squared_norm))
    assert sorted(jax.eval_shape(run, X).regularizers) == ["kinetic", "squared_norm"]


# dtypes


def test_float32_in_float32_out():
    flow = CNF(mlp(3, (4, 4), context_dim=2), ScaledNormal(3, 2.0), t1=T)
    flow, x, context = astype((flow, X, CONTEXT), jnp.float32)
    settings = {"context": context, "solve": COARSE}

    def everything(flow, x):
        path = jcnf.trajectory(flow, x, jnp.linspace(0, T, 3), **settings)
        estimated = settings | {"divergence": Hutchinson(), "key": jr.key(0)}
        loss = lambda flow: jnp.mean(jcnf.log_prob(flow, x, **estimated))  # noqa: E731
        return path, jax.value_and_grad(loss)(flow)

    leaves = jax.tree.leaves(jax.eval_shape(everything, flow, x))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("x64", [False, True])
def test_samples_have_the_default_dtype(x64):
    dtype = jnp.float64 if x64 else jnp.float32
    with jax.enable_x64(x64):
        flow = CNF(astype(mlp(3, (4,)), dtype), StandardNormal(3))
        draw = lambda key: jcnf.sample_and_log_prob(flow, key, 4, solve=COARSE)  # noqa: E731
        x, log_p = jax.eval_shape(draw, jr.key(0))
        only_x = jax.eval_shape(lambda key: jcnf.sample(flow, key, 4, solve=COARSE), jr.key(0))
    assert x.dtype == only_x.dtype == log_p.dtype == dtype


@pytest.mark.usefixtures("unchecked")
def test_numpy_of_float64_is_taken_in_silence_without_x64():
    x = np.asarray(X)
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("error")
        flow, key, times = astype(linear(), jnp.float32), jr.key(0), np.array([0.0, T])
        log_p = lambda: jcnf.log_prob(flow, x, key=key, solve=COARSE, divergence=Hutchinson())  # noqa: E731
        assert jax.eval_shape(log_p).dtype == jnp.float32
        path = jax.eval_shape(lambda: jcnf.trajectory(flow, x, times, solve=COARSE))
        assert path.dtype == jnp.float32


# jit and vmap


def test_vmap_over_flows_keys_and_single_samples():
    matrices = jnp.asarray(np.stack([MATRIX, MATRIX.T - 0.1]))
    flows = jax.vmap(
        lambda matrix: eqx.tree_at(lambda f: f.bijection.field.matrix, linear(), matrix)
    )(matrices)
    solve, keys = Solve(solver="euler", step=T / 2), jr.split(jr.key(0))

    @eqx.filter_jit
    @eqx.filter_vmap
    def mapped(flow, key, x):
        samples = jcnf.sample(flow, key, 3, solve=solve)
        return samples, jcnf.log_prob(flow, x[None], solve=solve)

    samples, log_p = mapped(flows, keys, X[:2])
    for i in range(2):
        up, down = (np.linalg.matrix_power(np.eye(3) + h * matrices[i], 2) for h in (T / 2, -T / 2))
        z = linear().base.sample(keys[i], 3)
        np.testing.assert_allclose(samples[i], z @ up.T, atol=1e-12)
        base = linear().base.log_prob(X[i : i + 1] @ down.T)
        np.testing.assert_allclose(log_p[i], base - T * np.trace(matrices[i]), atol=1e-12)


# Failure


def test_a_failed_solve_is_a_value_of_transform():
    solve = Solve(rtol=1e-10, atol=1e-10, max_steps=2)
    result = transform(linear(), X, solve=solve)
    assert jnp.all(result.stats.failed)
    assert int(result.stats.steps) == 2
    assert np.all(np.isnan(result.value))
    assert np.all(np.isnan(result.logdet))


@pytest.mark.parametrize("name", ["log_prob", "sample", "trajectory"])
def test_a_failed_solve_raises_advice_elsewhere(name):
    arguments = {
        "log_prob": (X,),
        "sample": (jr.key(0), 5),
        "trajectory": (X, jnp.array([0.0, T])),
    }
    run = eqx.filter_jit(getattr(jcnf, name)) if name == "log_prob" else getattr(jcnf, name)
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"raise max_steps in jcnf\.Solve"):
        run(linear(), *arguments[name], solve=Solve(solver="euler", step=0.1, max_steps=2))


# Errors at trace time


FLOW = CNF(mlp(2, ()), StandardNormal(2))
CONDITIONAL = CNF(mlp(2, (), context_dim=3), StandardNormal(2))
TWO = jnp.zeros((4, 2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda f: f(FLOW, jnp.zeros(2)), "(batch, 2); got (2,): add a batch axis with x[None]"),
        (lambda f: f(FLOW, jnp.zeros((4, 3))), "(batch, 2); got (4, 3)"),
        (lambda f: f(FLOW, jnp.zeros(())), "(batch, 2); got ()"),
        (lambda f: f(FLOW, jnp.zeros((0, 2))), "at least one sample; got an empty batch"),
        (lambda f: f(FLOW, jnp.zeros((4, 2), int)), "a floating dtype; got int64"),
        (lambda f: f(FLOW, TWO, context=jnp.zeros((4, 1))), "context of size 0; got 1"),
        (lambda f: f(CONDITIONAL, TWO), "context of size 3; got none: pass one of shape"),
        (lambda f: f(CONDITIONAL, TWO, context=jnp.zeros((4, 2))), "context of size 3; got 2"),
        (lambda f: f(CONDITIONAL, TWO, context=jnp.zeros((3, 3))), "(4, context); got (3, 3)"),
        (lambda f: f(CONDITIONAL, TWO, context=jnp.zeros(3)), "(4, context); got (3,)"),
        (lambda f: f(CONDITIONAL, TWO, context=jnp.zeros(())), "(4, context); got ()"),
    ],
)
@pytest.mark.parametrize("name", ["log_prob", "transform", "trajectory"])
def test_wrong_shapes_say_what_to_do(name, run, message):
    function = getattr(jcnf, name)
    if name == "trajectory":
        function = lambda flow, x, **kw: jcnf.trajectory(flow, x, jnp.array([0.0, 1.0]), **kw)  # noqa: E731
    with pytest.raises(ValueError, match=re.escape(message)):
        run(function)


@pytest.mark.usefixtures("unchecked")
def test_other_errors_say_what_to_do():
    with pytest.raises(ValueError, match="pass one of shape"):
        jcnf.sample(CONDITIONAL, jr.key(0), 3)
    with pytest.raises(ValueError, match="pass key="):
        jcnf.log_prob(FLOW, TWO, divergence=Hutchinson())
    with pytest.raises(ValueError, match="'to_base' or 'to_data'; got 'forward'"):
        jcnf.transform(FLOW, TWO, direction="forward")
    for times in ([0.0, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, np.nan]):
        with pytest.raises(ValueError, match=r"strictly increase or strictly decrease|NaN or inf"):
            jcnf.trajectory(FLOW, TWO, jnp.array(times))
    for times in (jnp.array(1.0), jnp.array([1.0])):
        with pytest.raises(ValueError, match="vector of at least 2"):
            jcnf.trajectory(FLOW, TWO, times)
    with pytest.raises(ValueError, match="same dim; got 2 and 3"):
        CNF(mlp(2, ()), StandardNormal(3))
    for t1 in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="t1 must be positive"):
            CNF(mlp(2, ()), StandardNormal(2), t1=t1)


class Narrow(Field):
    """A field that returns one component instead of two."""

    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        return x[:1]


def test_what_has_a_wrong_shape_is_refused_and_not_broadcast(unchecked):
    def per_component(field, t, x, context, local):
        return x**2

    flow = CNF(Narrow(), StandardNormal(2))
    for run in (jcnf.log_prob, partial(jcnf.trajectory, times=jnp.array([0.0, 1.0]))):
        with pytest.raises(ValueError, match=r"the field must give an array of shape \(.*2,?\)"):
            run(flow, X[:, :2])
    with pytest.raises(ValueError, match=r"per_component must give an array of shape \(\)"):
        transform(linear(), X, regularizers=(per_component,))
    with pytest.raises(ValueError, match="functions such as"):
        transform(linear(), X, regularizers=("kinetic",))
    with pytest.raises(ValueError, match=r"use x.astype\(jnp.float64\)"):
        jcnf.log_prob(linear(), X.astype(jnp.float32))


@pytest.mark.parametrize(
    "adjoint",
    ["backsolve", *(pytest.param(a, marks=pytest.mark.slow) for a in ("checkpoint", "reversible"))],
)
def test_fields_may_have_empty_parts(adjoint):
    class Empty(Field):
        matrix: jax.Array
        nothing: tuple = ()
        none: None = None
        dim: int = eqx.field(static=True, default=3)

        def __call__(self, t, x, context=None):
            return self.matrix @ x

    def loss(matrix):
        flow = CNF(Empty(matrix), StandardNormal(3))
        return jnp.sum(jcnf.transform(flow, X, solve=Solve("bosh3", adjoint=adjoint)).logdet)

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(MATRIX))
    np.testing.assert_allclose(gradient, -len(X) * np.eye(3), atol=1e-4)


@pytest.mark.slow
def test_a_field_too_stiff_for_its_solver_ends_soon():
    flow = CNF(mlp(3, (8, 8), scale=300.0), StandardNormal(3), t1=T)
    adaptive = Solve("bosh3", max_steps=64)
    fixed = Solve("euler", step=T / 64)
    for solve, direction in ((adaptive, "to_base"), (adaptive, "to_data"), (fixed, "to_data")):
        result = transform(flow, X, direction=direction, solve=solve)
        np.testing.assert_array_equal(np.isnan(result.value).any(axis=1), result.stats.failed)
        assert int(result.stats.steps) <= 64
        assert np.all(result.stats.failed) or solve is fixed
    with pytest.raises(eqx.EquinoxRuntimeError, match="the flow failed for 5 of 5 rows"):
        jcnf.sample(flow, jr.key(0), 5, solve=adaptive)


def test_the_times_of_a_trajectory_that_were_not_reached_are_nan():
    flow = CNF(NotANumber(), StandardNormal(2))  # v = x, NaN beyond 1
    x, times = jnp.array([[0.5, 0.1]]), jnp.linspace(0.0, 1.0, 5)
    path, stats = jcnf.flows.solve_trajectory(flow, x, times, solve=TIGHT)
    assert np.all(stats.failed)
    np.testing.assert_allclose(path[:3, 0], x * np.exp(times[:3, None]), rtol=1e-8)
    assert np.all(np.isnan(path[3:]))
