"""Forward mode: an error that says which adjoint has it, and none where it is not used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mlp

import jcnf
from jcnf import CNF, Solve
from jcnf.distributions import StandardNormal

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
FLOW = CNF(mlp(2, (4,)), StandardNormal(2))


def score(adjoint):
    return lambda x: jnp.sum(jcnf.log_prob(FLOW, x, solve=Solve(adjoint=adjoint)))


USES = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X,), (X,)),
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "hessian": lambda f: jax.hessian(f)(X),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("adjoint", ["checkpoint", "reversible", "backsolve"])
def test_forward_mode_is_refused_with_the_adjoint_that_has_it(use, adjoint):
    with pytest.raises(ValueError, match=f"adjoint='{adjoint}' does not have.*'forward'"):
        USES[use](score(adjoint))


def test_forward_mode_of_a_trajectory_is_refused():
    with pytest.raises(ValueError, match="adjoint='forward'"):
        jax.jvp(lambda x: jcnf.trajectory(FLOW, x, jnp.linspace(0, 1, 3)), (X,), (X,))


@pytest.mark.parametrize("adjoint", ["forward", "direct"])
def test_forward_mode_is_the_derivative(adjoint):
    f, eps = score(adjoint), 1e-5
    _, found = jax.jvp(f, (X,), (X,))
    expected = (f(X + eps * X) - f(X - eps * X)) / (2 * eps)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.slow
def test_reverse_mode_goes_through_every_transformation():
    """The gradient of the sum over rows, taken in each of the ways in which JAX gets there."""
    f = score("checkpoint")
    expected = jax.grad(f)(X)
    one = jax.grad(lambda row: f(row[None]))
    batches = jnp.stack([X, 2 * X])
    found = [
        jax.jit(jax.grad(f))(X),
        jax.grad(jax.jit(f))(X),
        jax.grad(jax.checkpoint(f))(X),
        jax.jacrev(f)(X),
        jax.vmap(jax.grad(f))(batches)[0],
        jax.grad(lambda batches: jnp.sum(jax.vmap(f)(batches)))(batches)[0],
        jax.grad(lambda batches: jnp.sum(jax.lax.map(f, batches)))(batches)[0],
    ]
    for gradient in found:
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(jnp.stack([one(row) for row in X]), expected, rtol=1e-2, atol=1e-4)
