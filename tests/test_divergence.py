"""Divergences: the exact ones against the Jacobian, Hutchinson's against its own statistics."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, Linear, mlp
from jaxtyping import Array, Float

import jcnf

NUM = 8000  # draws of an estimator
TIME, X = jnp.asarray(0.4), jnp.array([0.3, -1.0, 0.7])
LINEAR = Linear(jnp.asarray(MATRIX))
FIELDS = {
    "linear": LINEAR,
    "one hidden layer": mlp(3, (4,), time="squash", activation="softplus"),
    "two": mlp(3, (4, 5)),
    "three": mlp(3, (4, 5, 4), time="concat", activation="silu"),
}


class Diagonal(eqx.Module):
    """v_i = sin(i x_i): a diagonal Jacobian."""

    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        return jnp.sin(x * jnp.arange(1.0, 4.0))


def estimates(strategy, field, num=NUM):
    """The velocity, and many draws of the estimate, at one point."""
    noise = strategy.draw(jr.key(0), num, 3, X.dtype)
    over_noise = jax.vmap(lambda e: strategy(field, TIME, X, None, e), out_axes=(None, 0))
    v, divergences = jax.jit(over_noise)(noise)
    return v, np.asarray(divergences)


@pytest.mark.parametrize("name", FIELDS)
def test_exact_ones_are_the_trace_of_the_jacobian(name):
    field = FIELDS[name]

    @jax.jit
    def everything(x):
        pairs = [s(field, TIME, x, None, None) for s in (jcnf.Exact(), jcnf.ForwardMode())]
        return pairs, field(TIME, x), jnp.trace(jax.jacrev(field, argnums=1)(TIME, x))

    pairs, expected, trace = everything(X)
    assert abs(trace) > 1e-3
    for v, divergence in pairs:
        np.testing.assert_allclose(v, expected, atol=1e-14)
        np.testing.assert_allclose(divergence, trace, rtol=0, atol=1e-10)


def test_exact_asks_the_field_first():
    class Known(Diagonal):
        def velocity_and_divergence(self, t, x, context=None):
            return self(t, x), jnp.asarray(42.0)

    assert jcnf.Exact()(Known(), TIME, X, None, None)[1] == 42
    assert jcnf.ForwardMode()(Known(), TIME, X, None, None)[1] != 42


@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_and_its_variance_falls_as_one_over_probes(noise, probes):
    field = FIELDS["three"]
    v, draws = estimates(jcnf.Hutchinson(probes, noise), field)
    jacobian = np.asarray(jax.jacfwd(field, argnums=1)(TIME, X))
    np.testing.assert_allclose(v, field(TIME, X), atol=1e-14)
    assert abs(draws.mean() - np.trace(jacobian)) < 4 * draws.std() / np.sqrt(NUM)
    # Var(e' J e) = 2 |S|^2 for Gaussian e, without the diagonal for Rademacher; S symmetrises J.
    symmetric = (jacobian + jacobian.T) / 2
    if noise == "rademacher":
        symmetric -= np.diag(np.diag(symmetric))
    assert draws.var() == pytest.approx(2 * np.sum(symmetric**2) / probes, rel=0.1)


def test_rademacher_is_exact_for_a_diagonal_jacobian():
    exact = float(jcnf.ForwardMode()(Diagonal(), TIME, X, None, None)[1])
    draws = estimates(jcnf.Hutchinson(), Diagonal(), num=50)[1]
    np.testing.assert_allclose(draws, exact, atol=1e-14)
    assert estimates(jcnf.Hutchinson(noise="gaussian"), Diagonal(), num=50)[1].std() > 0.1


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_probes_differ_between_samples_and_probes(noise):
    draws = jcnf.Hutchinson(2, noise).draw(jr.key(0), 500, 3, jnp.float32)
    assert draws.shape == (500, 2, 3)
    assert draws.dtype == jnp.float32
    flat = np.asarray(draws, np.float64).reshape(500, 6)
    np.testing.assert_allclose(flat.T @ flat / 500, np.eye(6), atol=0.25)
    if noise == "rademacher":
        assert set(np.unique(flat)) == {-1, 1}


def test_exact_ones_draw_nothing():
    assert jcnf.Exact().draw(None, 5, 3, jnp.float32) is None
    assert jcnf.ForwardMode().draw(jr.key(0), 5, 3, jnp.float32) is None


def test_a_strategy_of_ones_own_is_one_class():
    class Constant(jcnf.divergence.Divergence):
        value: Float[Array, ""]

        def __call__(self, field, t, x, context, noise):
            return field(t, x, context), self.value

    flow = jcnf.CNF(LINEAR, jcnf.distributions.StandardNormal(3))
    solve = jcnf.Solve(solver="euler", step=0.25)
    result = jcnf.transform(flow, X[None], solve=solve, divergence=Constant(jnp.asarray(3.0)))
    np.testing.assert_allclose(result.logdet, [-3.0], rtol=1e-14)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    with pytest.raises(ValueError, match=r"pass key=jax.random.key\(seed\).*jcnf.Exact"):
        jcnf.Hutchinson().draw(None, 5, 3, jnp.float32)
    with pytest.raises(ValueError, match="at least 1 probe; got 0"):
        jcnf.Hutchinson(0)
    with pytest.raises(ValueError, match="unknown noise 'cauchy': use 'rademacher' or 'gaussian'"):
        jcnf.Hutchinson(noise="cauchy")
