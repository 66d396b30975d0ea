"""Likelihood gradients for every field, divergence and adjoint, against finite differences."""

from dataclasses import replace
from functools import cache, lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import FIELDS
from helpers import T, mlp, slope, strategies
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jcnf import CNF, Exact, ForwardMode, Hutchinson, Solve
from jcnf.distributions import StandardNormal
from jcnf.divergence import Divergence, FieldEvaluation, HutchPlusPlus, XTrace
from jcnf.divergence.estimators import NOISES
from jcnf.fields import Field
from jcnf.objectives import likelihood
from jcnf.regularizers import kinetic
from jcnf.training import differentiator, partition

RNG = np.random.default_rng(0)
X, CONTEXT = jnp.asarray(RNG.normal(size=(2, 3))), jnp.asarray(RNG.normal(size=(2, 2)))
STRATEGIES = {
    "exact": Exact(),
    "forward": ForwardMode(),
    **{noise: Hutchinson(2, noise) for noise in NOISES},
    "hutch++": HutchPlusPlus(),
    "xtrace": XTrace(2),
}
# Adjoints that differentiate the steps of a solve are exact for any number of steps. A continuous
# adjoint is exact only up to the error of the steps, so it needs tight tolerances.
FEW_STEPS = Solve(solver="euler", step=T / 3, max_steps=3)
TIGHT = Solve(rtol=1e-10, atol=1e-10)
SOLVES = {
    adjoint: replace(solve, adjoint=adjoint)
    for solve, adjoints in (
        (FEW_STEPS, ("checkpoint", "direct", "forward", "reversible")),
        (TIGHT, ("backsolve", "backsolve_seminorm")),
    )
    for adjoint in adjoints
}
# The fast tests run only these pairs of field and adjoint; all others are marked slow.
QUICK = {
    "mlp ignore": "reversible",
    "mlp concat": "direct",
    "mlp context": "checkpoint",
    "planar": "backsolve_seminorm",
    "residual without closed form": "backsolve",
    "mixture": "forward",
}
TABLE = [
    pytest.param(
        name,
        adjoint,
        marks=() if adjoint == QUICK.get(name) else pytest.mark.slow,
    )
    for name in FIELDS
    for adjoint in SOLVES
]
KINDS = {type(strategy): strategy for strategy in STRATEGIES.values()}


class Chosen(Divergence):
    """The divergence in `KINDS` that has weight 1 (the others have 0), on noise drawn in advance.

    The choice is a traced argument, so one compiled program serves all divergences.
    """

    weights: Float[Array, " kinds"]
    noise: list[Array | None]

    def draw_noise(self, key, batch, dim, dtype):
        return self.noise

    @jax.jit  # traced only once, although a solve traces its right-hand side several times
    def __call__(self, field, t, x, context, noise):
        found = [
            strategy(field, t, x, context, noise)
            for strategy, noise in zip(KINDS.values(), noise, strict=True)
        ]
        velocities = jnp.stack([local.velocity for local in found])
        divergences = jnp.stack([local.divergence for local in found])
        return FieldEvaluation(self.weights @ velocities, self.weights @ divergences)


@cache
def chosen(name):
    strategy = STRATEGIES[name]
    own = KINDS | {type(strategy): strategy}
    weights = jnp.asarray([float(kind is type(strategy)) for kind in KINDS])
    return Chosen(weights, [s.draw_noise(jr.key(0), *X.shape, X.dtype) for s in own.values()])


class Problem:
    """The loss of a field with an adjoint, and its gradient, as one compiled program.

    `at` holds the variables of the loss as one vector: parameters, data and context.
    """

    def __init__(self, name, adjoint):
        flow = CNF(FIELDS[name](), StandardNormal(3), t1=T)
        solve = SOLVES[adjoint]
        # The U-Net normalizes by the spread of only three numbers, so its loss is more curved.
        self.step = 3e-5 if name == "unet" else 1e-3
        params, static = partition(flow)
        context = CONTEXT if flow.bijection.field.context_dim else None
        at, unravel = ravel_pytree((params, X, context))
        self.at, self.unravel = at, unravel

        # The closure must not refer to `self`. Such a cycle would keep the compiled program alive
        # after the problem is gone; each program maps about 1,000 regions of memory, and the
        # process would reach the system's limit (65,530 on Linux) and crash.
        def value_and_grad(at, divergence):
            def loss(at):
                params, x, context = unravel(at)
                return likelihood(
                    eqx.combine(params, static),
                    x,
                    None,
                    context=context,
                    solve=solve,
                    divergence=divergence,
                    regularizers={kinetic: 0.5},
                )

            (value, metrics), gradient = differentiator(solve)(loss)(at)
            return value, metrics, gradient()

        self.value_and_grad = jax.jit(value_and_grad)

    def assert_slope(self, divergence, gradient, direction):
        """Compare `gradient` with the finite difference of the loss along a direction."""

        def loss_at(step):
            loss, metrics, _ = self.value_and_grad(self.at + step * direction, divergence)
            assert not metrics["failed"]
            return float(loss)

        expected = slope(loss_at, self.step)
        assert abs(expected) > 1e-3
        assert float(gradient @ direction) == pytest.approx(expected, rel=1e-6)


problem = lru_cache(maxsize=len(FIELDS))(Problem)


@pytest.mark.parametrize("divergence", STRATEGIES)
@pytest.mark.parametrize(("name", "adjoint"), TABLE)
def test_gradient_is_the_finite_difference(name, adjoint, divergence):
    here = problem(name, adjoint)
    loss, metrics, gradient = here.value_and_grad(here.at, chosen(divergence))
    assert metrics["kinetic"] > 0
    # A random direction plus the direction of the gradient, so that the slope is not tiny.
    random = np.random.default_rng(1).normal(size=gradient.shape)
    direction = random / np.linalg.norm(random) + gradient / np.linalg.norm(gradient)
    here.assert_slope(chosen(divergence), gradient, direction)
    exact, *_ = here.value_and_grad(here.at, chosen("exact"))
    assert (abs(loss - exact) < 1e-12) == (divergence in ("exact", "forward"))


def test_the_gradient_in_a_learnable_rate_is_the_finite_difference():
    here = problem("time change", "checkpoint")
    still = here.unravel(jnp.zeros_like(here.at))
    rate = eqx.tree_at(lambda at: at[0].bijection.field.sqrt_rate, still, jnp.ones(()))
    *_, gradient = here.value_and_grad(here.at, chosen("exact"))
    here.assert_slope(chosen("exact"), gradient, ravel_pytree(rate)[0])


def test_every_adjoint_and_divergence_is_in_the_table():
    assert {adjoint for name, adjoint in QUICK.items() if name in FIELDS} == set(SOLVES)
    assert set(KINDS) == strategies()


@pytest.mark.slow
def test_backsolve_keeps_its_tolerance_at_any_batch_size():
    # The mean loss of copies of a batch has the same gradient as that of the batch.
    x = X[:, :2]
    flow = CNF(mlp(2, (4, 4, 4), time="ignore", activation="silu"), StandardNormal(2), t1=T)

    def gradient(x, adjoint, tolerance):
        solve = Solve(rtol=tolerance, atol=tolerance, adjoint=adjoint)
        grads = jax.jit(jax.grad(lambda flow: likelihood(flow, x, None, solve=solve)[0]))(flow)
        return ravel_pytree(grads)[0]

    exact = gradient(x, "checkpoint", 1e-9)
    error = [
        np.linalg.norm(gradient(x, "backsolve", 1e-4) - exact) / np.linalg.norm(exact)
        for x in (x, jnp.tile(x, (100, 1)))
    ]
    assert error[0] < 1e-3
    assert error[1] < 2 * error[0]


class Ramp(Field):
    """v = (a x_0, b t x_1) with rates a and b."""

    rates: Float[Array, "2"]
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        return self.rates * jnp.stack([jnp.ones_like(t), t]) * x


STEER = 0.3


@jax.jit
@jax.value_and_grad
def steered(rates, key):
    """Return the loss, and its gradient, of a flow whose base is at a time within `STEER` of 0."""
    solve = Solve(step=T / 8, max_steps=8, adjoint="direct")
    flow = CNF(Ramp(rates), StandardNormal(2), t1=T)
    return likelihood(flow, X[:, :2], key, solve=solve, random_end_time=STEER)[0]


def test_steer_puts_the_base_at_a_random_time_and_has_its_gradient():
    squares, rates = np.mean(np.square(X[:, :2]), axis=0), np.array([0.7, -1.1])
    starts = []
    for key in jr.split(jr.key(1), 8):
        # At zero rates the gradient gives the integrals of 1 and t over the flow's interval.
        length, area = steered(jnp.zeros(2), key)[1] / (1 - squares)
        start, end = area / length - length / 2, area / length + length / 2
        assert end == pytest.approx(T, rel=1e-9)
        starts.append(start)
        # x_i is exp(growth_i) times a standard normal.
        integrals = np.array([T - start, (T**2 - start**2) / 2])
        growth = rates * integrals
        loss, gradient = steered(jnp.asarray(rates), key)
        shrunk = squares * np.exp(-2 * growth)
        np.testing.assert_allclose(loss, np.sum(shrunk / 2 + growth) + np.log(2 * np.pi), rtol=1e-7)
        np.testing.assert_allclose(gradient, integrals * (1 - shrunk), rtol=1e-6)
    assert np.max(np.abs(starts)) < STEER < np.ptp(starts)


def test_steer_is_fixed_by_its_key():
    first, again, other = (steered(jnp.ones(2), jr.key(seed))[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("random_end_time", "key"), [(T, jr.key(0)), (-0.1, jr.key(0)), (0.1, None)]
)
def test_random_end_time_is_less_than_the_flow_and_takes_a_key(random_end_time, key):
    flow = CNF(Ramp(jnp.ones(2)), StandardNormal(2), t1=T)
    with pytest.raises(
        ValueError,
        match=r"random_end_time must be in \[0, 0.8\); got|random_end_time draws a time: pass key",
    ):
        likelihood(flow, X[:, :2], key, random_end_time=random_end_time)
