"""The public functions compile once, and inside another jit they are part of its program."""

import re
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, Linear, NotANumber, astype, compilations, mlp

import jcnf
from jcnf import CNF, Hutchinson, Solve
from jcnf.distributions import StandardNormal
from jcnf.fields import Field
from jcnf.flows import Chain, augmented
from jcnf.flows.distrax import FlowDistribution
from jcnf.regularizers import kinetic

FLOW = CNF(mlp(2, (4,)), StandardNormal(2))
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
TIMES = jnp.linspace(0.0, 1.0, 4)
# Each is a function of the flow, a solve, a key and rows.
CALLS = {
    "log_prob": lambda flow, solve, key, x: jcnf.log_prob(flow, x, solve=solve),
    "log_prob, estimated": lambda flow, solve, key, x: jcnf.log_prob(
        flow, x, key=key, solve=solve, divergence=Hutchinson()
    ),
    "sample": lambda flow, solve, key, x: jcnf.sample(flow, key, len(x), solve=solve),
    "sample_and_log_prob": lambda flow, solve, key, x: jcnf.sample_and_log_prob(
        flow, key, len(x), solve=solve
    ),
    "transform": lambda flow, solve, key, x: jcnf.transform(flow, x, solve=solve),
    "trajectory": lambda flow, solve, key, x: jcnf.trajectory(flow, x, TIMES, solve=solve),
    "trajectory, times of each": lambda flow, solve, key, x: jcnf.trajectory(
        flow.bijection.field, x, jnp.tile(TIMES[:, None], (1, len(x))), solve=solve
    ),
    "transform, regularizers": lambda flow, solve, key, x: jcnf.transform(
        flow, x, direction="to_data", regularizers=(kinetic,), solve=solve
    ),
    "log_prob_bound": lambda flow, solve, key, x: augmented.log_prob_bound(
        flow, x[:, :1], key, solve=solve
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_call_compiles_nothing(name):
    call = CALLS[name]
    with compilations() as first:
        call(FLOW, Solve("bosh3"), jr.key(0), X)
    assert first
    trained = jax.tree.map(lambda a: 0.9 * a, FLOW)
    solve = Solve("bosh3", rtol=1e-4, atol=1e-6)
    key, x = jr.key(1), X + 0.1
    with compilations() as again:
        call(trained, solve, key, x)
    assert again == []


@pytest.mark.parametrize("kind", ["chain", "nice", "float32", "fixed steps", "distrax"])
def test_another_call_of_another_flow_compiles_nothing(kind):
    flow, x, solve, tighter = FLOW, X, Solve("bosh3"), Solve("bosh3", rtol=1e-6)
    match kind:
        case "chain":
            flow = Chain([FLOW.bijection, FLOW.bijection], StandardNormal(2))
        case "nice":
            flow = jcnf.NICE(2, (4,), key=jr.key(0))
        case "float32":
            flow, x = astype((flow, x), jnp.float32)
        case "fixed steps":
            solve, tighter = Solve(step=0.5, max_steps=np.int64(4)), Solve(step=0.5, max_steps=4)

    def call(solve, x):
        if kind == "distrax":
            return FlowDistribution(flow, solve=solve).log_prob(x)
        return jcnf.log_prob(flow, x, solve=solve)

    nearer = 0.5 * x
    first = call(solve, x)
    assert first.dtype == x.dtype
    with compilations() as again:
        call(tighter, nearer)
    assert again == []


class Listed(Field):
    """The field v = rate x, with the rate in a static list."""

    rates: list = eqx.field(static=True)
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        return self.rates[0] * x


def test_a_field_that_could_change_in_place_is_refused():
    """A compiled program would keep the values that it read when it was traced."""
    with pytest.raises(ValueError, match=r"got Listed\.rates, an unhashable type: 'list'"):
        CNF(Listed([0.5]), StandardNormal(2))


def test_functions_inside_a_module_are_compiled():
    class Wrapped(Field):
        network: eqx.nn.MLP
        dim: int = eqx.field(static=True, default=2)

        def __call__(self, t, x, context=None):
            return self.network(x)

    flow = CNF(Wrapped(eqx.nn.MLP(2, 2, 4, 1, jnp.tanh, key=jr.key(0))), StandardNormal(2))
    jcnf.log_prob(flow, X)
    with compilations() as again:
        jcnf.log_prob(flow, X)
    assert again == []


def test_array_tolerances_may_be_closed_over():
    solve = Solve(rtol=jnp.asarray(1e-3), atol=jnp.asarray(1e-3))
    found = jax.jit(lambda x: jcnf.log_prob(FLOW, x, solve=replace(solve, norm="worst")))(X)
    np.testing.assert_allclose(found, jcnf.log_prob(FLOW, X), atol=1e-2)


def test_tolerances_are_heeded_though_they_do_not_compile():
    steps = [
        int(jcnf.transform(FLOW, X, solve=Solve(rtol=rtol, atol=rtol)).stats.steps)
        for rtol in (1e-3, 1e-6, 1e-9)
    ]
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["log_prob, estimated", "sample", "trajectory"])
def test_inside_another_jit_the_values_are_the_same(name):
    call = CALLS[name]
    alone = call(FLOW, Solve("bosh3"), jr.key(0), X)
    inside = eqx.filter_jit(call)(FLOW, Solve("bosh3"), jr.key(0), X)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(inside), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.optimized
@pytest.mark.slow
def test_under_vmap_each_row_is_as_alone():
    flow = CNF(Linear(jnp.asarray(MATRIX)), StandardNormal(3))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2, 3)))
    solve = Solve(solver="rk4", step=0.25)
    log_prob = partial(jcnf.log_prob, flow, solve=solve)
    np.testing.assert_allclose(jax.vmap(log_prob)(x), jnp.stack([*map(log_prob, x)]), rtol=1e-12)
    sample = partial(jcnf.sample, flow, num_samples=3)
    keys = jr.split(jr.key(0), 2)
    np.testing.assert_allclose(jax.vmap(sample)(keys), jnp.stack([*map(sample, keys)]), rtol=1e-4)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "adjoint",
    [
        "checkpoint",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("backsolve", "direct", "reversible")),
    ],
)
def test_gradients_outside_of_jit_compile_once_and_are_those_inside(adjoint):
    def loss(flow, solve):
        return -jnp.mean(jcnf.log_prob(flow, X, solve=solve))

    gradient = eqx.filter_grad(loss)
    found = gradient(FLOW, Solve("bosh3", adjoint=adjoint))
    expected = eqx.filter_jit(gradient)(FLOW, Solve("bosh3", adjoint=adjoint))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    with compilations() as again:
        gradient(FLOW, Solve("bosh3", adjoint=adjoint, rtol=2e-5))
    assert again == []


def test_an_error_names_the_rows_that_failed():
    flow = CNF(NotANumber(), StandardNormal(2))  # v = x, NaN beyond 1
    x = jnp.full((30, 2), 0.1).at[jnp.array([3, 8, 21, 22])].set(2.0)
    message = "the flow failed for 4 of 30 rows (first: 3, 8, 21, ...): a value became NaN"
    for solve in (Solve("bosh3", norm="worst"), Solve("bosh3")):
        with pytest.raises(eqx.EquinoxRuntimeError, match=re.escape(message)):
            jcnf.log_prob(flow, x, solve=solve)
    with pytest.raises(eqx.EquinoxRuntimeError, match="the flow failed for some rows"):
        eqx.filter_jit(jcnf.log_prob)(flow, x, solve=solve)
