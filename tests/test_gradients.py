"""Gradients of the likelihood by every adjoint, divergence and field, by finite differences."""

from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import T, mlp
from jaxtyping import Array, Float

from jcnf import CNF, Exact, ForwardMode, Hutchinson, Solve
from jcnf.distributions import StandardNormal
from jcnf.divergence import Divergence
from jcnf.objectives import likelihood
from jcnf.regularizers import kinetic

RNG = np.random.default_rng(0)
X, CONTEXT = jnp.asarray(RNG.normal(size=(3, 2))), jnp.asarray(RNG.normal(size=(3, 2)))
DIVERGENCES = {"exact": Exact(), "forward": ForwardMode(), "hutchinson": Hutchinson(2)}
FIELDS = {
    "none hidden": mlp(2, (), scale=1.0, time="squash"),
    "one": mlp(2, (4,)),
    "two, context": mlp(2, (4, 4), time="concat", activation="softplus", context_dim=2),
    "three": mlp(2, (4, 4, 4), time="ignore", activation="silu"),
}
ADJOINTS = {
    "checkpoint": "three",
    "direct": "none hidden",
    "backsolve": "two, context",
    "backsolve_seminorm": "one",
}


class Chosen(Divergence):
    """One of `DIVERGENCES`, by the weight 1 among zeros: one compiled program serves them all."""

    weights: Float[Array, " strategies"]

    def draw(self, key, batch, dim, dtype):
        return DIVERGENCES["hutchinson"].draw(key, batch, dim, dtype)

    def __call__(self, field, t, x, context, noise):
        all_of_them = [d(field, t, x, context, noise) for d in DIVERGENCES.values()]
        v, divergences = (jnp.stack(parts) for parts in zip(*all_of_them, strict=True))
        return self.weights @ v, self.weights @ divergences


@cache
def compiled(adjoint):
    context = CONTEXT if "context" in ADJOINTS[adjoint] else None
    solve = Solve(rtol=1e-10, atol=1e-10, adjoint=adjoint, max_steps=256)

    @jax.jit
    def value_and_grad(flow, weights):
        def loss(flow):
            return likelihood(
                flow,
                X,
                jr.key(0),
                context=context,
                solve=solve,
                divergence=Chosen(weights),
                penalties={kinetic: 0.5},
            )

        return jax.value_and_grad(loss, has_aux=True)(flow)

    return value_and_grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_gradient_is_the_finite_difference(adjoint, divergence):
    weights = jnp.array([float(name == divergence) for name in DIVERGENCES])
    flow = CNF(FIELDS[ADJOINTS[adjoint]], StandardNormal(2), t1=T)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), flow)

    def loss_at(step):
        moved = jax.tree.map(lambda p, d: p + step * d, flow, direction)
        (loss, metrics), _ = compiled(adjoint)(moved, weights)
        assert not metrics["failed"]
        return float(loss)

    (loss, metrics), gradient = compiled(adjoint)(flow, weights)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    slope = float(sum(jax.tree.leaves(products)))
    h = 1e-3  # of a formula of order 4, so that both rounding and truncation are below 1e-8
    by_difference = (8 * (loss_at(h) - loss_at(-h)) - loss_at(2 * h) + loss_at(-2 * h)) / (12 * h)
    assert abs(slope) > 0.1
    assert slope == pytest.approx(by_difference, rel=1e-6)
    assert loss == pytest.approx(metrics["nll"] + 0.5 * metrics["kinetic"])
    assert metrics["kinetic"] > 0


def test_divergences_agree_and_differ_where_they_should():
    flow = CNF(FIELDS["three"], StandardNormal(2), t1=T)
    losses = [float(compiled("checkpoint")(flow, w)[0][0]) for w in jnp.eye(3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert abs(losses[0] - losses[2]) > 1e-3


@pytest.mark.slow
def test_backsolve_keeps_its_tolerance_at_any_batch_size():
    # The mean over copies of a batch has the batch's own gradient.
    flow = CNF(FIELDS["three"], StandardNormal(2), t1=T)

    def gradient(x, adjoint, tolerance):
        solve = Solve(rtol=tolerance, atol=tolerance, adjoint=adjoint)
        grads = jax.jit(jax.grad(lambda flow: likelihood(flow, x, jr.key(0), solve=solve)[0]))(flow)
        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])

    exact = gradient(X, "checkpoint", 1e-9)
    error = [
        np.linalg.norm(gradient(x, "backsolve", 1e-4) - exact) / np.linalg.norm(exact)
        for x in (X, jnp.tile(X, (100, 1)))
    ]
    assert error[0] < 1e-3
    assert error[1] < 2 * error[0]
