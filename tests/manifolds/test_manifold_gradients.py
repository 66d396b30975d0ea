"""Likelihood gradients of flows on manifolds by every adjoint, and estimates of the divergence."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import T, slope
from jax.flatten_util import ravel_pytree
from manifold_table import random_field

from jcnf import CNF, Exact, Hutchinson, HutchPlusPlus, Solve, XTrace
from jcnf.manifolds import SO3, Sphere, TangentProbes, Torus, Uniform
from jcnf.objectives import likelihood
from jcnf.training import differentiator, partition

pytestmark = pytest.mark.optimized

# Few steps are enough for the adjoints that differentiate them, but not for continuous ones.
FEW, TIGHT = Solve(solver="euler", step=T / 3, max_steps=3), Solve(rtol=1e-10, atol=1e-10)
CASES = {
    "checkpoint": (FEW, SO3()),
    "direct": (FEW, Sphere(2)),
    "forward": (FEW, Torus(2)),
    "reversible": (FEW, Sphere(2)),
    "backsolve": (TIGHT, Sphere(2)),
    "backsolve_seminorm": (TIGHT, Torus(1)),
}


@pytest.mark.parametrize(
    "adjoint",
    [pytest.param(a, marks=[] if a == "checkpoint" else [pytest.mark.slow]) for a in CASES],
)
def test_gradient_is_the_finite_difference(adjoint):
    solve, manifold = CASES[adjoint]
    solve = replace(solve, adjoint=adjoint)
    flow = CNF(random_field(manifold), Uniform(manifold), t1=T)
    params, static = partition(flow)
    x = manifold.uniform(jr.key(0), 3)
    at, unravel = ravel_pytree((params, jnp.zeros_like(x)))

    @jax.jit
    def value_and_gradient(at):
        def loss(at):
            params, moved = unravel(at)
            points = jax.vmap(manifold.exp)(x, jax.vmap(manifold.tangent)(x, moved))
            flow = eqx.combine(params, static)
            return likelihood(flow, points, None, solve=solve, divergence=Exact())

        (value, metrics), gradient = differentiator(solve)(loss)(at)
        return value, metrics["failed"], gradient()

    _, failed, gradient = value_and_gradient(at)
    assert not failed
    direction = gradient / jnp.linalg.norm(gradient)
    expected = slope(lambda h: float(value_and_gradient(at + h * direction)[0]))
    assert abs(expected) > 1e-3
    assert float(gradient @ direction) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "manifold",
    [
        pytest.param(Sphere(2), id="sphere"),
        pytest.param(SO3(), id="rotations", marks=pytest.mark.slow),
    ],
)
def test_estimates_are_unbiased_and_tangent_probes_have_less_variance(manifold):
    field, time = random_field(manifold), jnp.asarray(0.3)
    x = manifold.uniform(jr.key(1), 1)[0]
    count, products = 4000, manifold.intrinsic_dim
    strategies = {
        "ambient": Hutchinson(),
        "tangent": TangentProbes(Hutchinson(), manifold),
        "gaussian": Hutchinson(noise="gaussian"),
        "tangent gaussian": TangentProbes(Hutchinson(noise="gaussian"), manifold),
        "hutch++": TangentProbes(HutchPlusPlus(1), manifold),
        "xtrace": TangentProbes(XTrace(2), manifold),
        "all": TangentProbes(Hutchinson(products, "orthogonal"), manifold),
    }

    @jax.jit
    def drawn(key):
        def draw(strategy):
            noise = strategy.draw_noise(key, count, manifold.dim, x.dtype)
            return jax.vmap(lambda noise: strategy(field, time, x, None, noise))(noise)

        exact = field.velocity_and_divergence(time, x)
        return exact, {name: draw(strategy) for name, strategy in strategies.items()}

    (v, exact), found = drawn(jr.key(2))
    assert abs(exact) > 1e-2
    variance = {}
    for name, local in found.items():
        np.testing.assert_allclose(local.velocity, np.tile(v, (count, 1)), rtol=0, atol=1e-12)
        error = np.asarray(local.divergence) - float(exact)
        assert abs(error.mean()) < 4 * error.std() / np.sqrt(count) + 1e-10, name
        variance[name] = float(np.var(error))
    print(variance)
    assert variance["tangent"] < variance["ambient"]
    assert variance["tangent gaussian"] == pytest.approx(variance["gaussian"], rel=0.15)
    assert variance["all"] < 1e-20
