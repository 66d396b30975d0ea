"""Gradients of the likelihood by every field, divergence and adjoint, by finite differences."""

from functools import cache, lru_cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import FIELDS, quick_jit
from helpers import MATRIX, SHIFT, Swing, T, mlp, slope
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy import linalg, optimize, stats

from jcnf import CNF, Exact, ForwardMode, Hutchinson, Solve
from jcnf.distributions import StandardNormal
from jcnf.divergence import Divergence, HutchPlusPlus, Local, XTrace
from jcnf.divergence.estimators import NOISES
from jcnf.objectives import likelihood
from jcnf.regularizers import kinetic
from jcnf.train import differentiator, partition

RNG = np.random.default_rng(0)
X, CONTEXT = jnp.asarray(RNG.normal(size=(2, 3))), jnp.asarray(RNG.normal(size=(2, 2)))
DIVERGENCES = {
    "exact": Exact(),
    "forward": ForwardMode(),
    **{noise: Hutchinson(2, noise) for noise in NOISES},
    "hutch++": HutchPlusPlus(),
    "xtrace": XTrace(2),
}
# The gradient of a solve's own steps is exact however few they are; that of a continuous adjoint
# differs from it by the error of the steps.
FEW_STEPS = dict(solver="euler", step=T / 3, max_steps=3)
TIGHT = dict(solver="dopri8", rtol=1e-10, atol=1e-10, max_steps=256)
SETTINGS = {
    "checkpoint": FEW_STEPS,
    "direct": FEW_STEPS,
    "forward": FEW_STEPS,
    "reversible": FEW_STEPS,
    "backsolve": TIGHT,
    "backsolve_seminorm": TIGHT,
}
QUICK = {  # the adjoint that each field is tested with when there are seconds and not minutes
    "mlp ignore": "reversible",
    "mlp concat": "direct",
    "mlp squash": "reversible",
    "mlp concatsquash": "direct",
    "mlp hyper": "forward",
    "mlp blend": "direct",
    "mlp one hidden layer": "backsolve_seminorm",
    "mlp three hidden layers": "reversible",
    "mlp context": "checkpoint",
    "mlp modulated": "direct",
    "planar": "backsolve",
    "planar summed": "backsolve_seminorm",
    "potential": "forward",
    "residual": "reversible",
    "residual without closed form": "backsolve",
    "time change": "checkpoint",
    "mixture": "forward",
    "mixture without closed form": "forward",
}
TABLE = [
    pytest.param(name, adjoint, marks=() if QUICK[name] == adjoint else pytest.mark.slow)
    for name in FIELDS
    for adjoint in SETTINGS
]
KINDS = {type(strategy): strategy for strategy in DIVERGENCES.values()}


class Chosen(Divergence):
    """One of `KINDS`, by the weight 1 among zeros, on noise drawn before.

    One compiled program serves all divergences.
    """

    weights: Float[Array, " kinds"]
    noise: list[Array | None]

    def draw(self, key, batch, dim, dtype):
        return self.noise

    @jax.jit  # traced once, for all the traces of a right-hand side in a solve
    def __call__(self, field, t, x, context, noise):
        found = [
            strategy(field, t, x, context, noise)
            for strategy, noise in zip(KINDS.values(), noise, strict=True)
        ]
        velocities = jnp.stack([local.velocity for local in found])
        divergences = jnp.stack([local.divergence for local in found])
        return Local(self.weights @ velocities, self.weights @ divergences)


@cache
def chosen(name):
    strategy = DIVERGENCES[name]
    own = KINDS | {type(strategy): strategy}
    weights = jnp.asarray([float(kind is type(strategy)) for kind in KINDS])
    return Chosen(weights, [s.draw(jr.key(0), *X.shape, X.dtype) for s in own.values()])


class Problem:
    """The loss of a field by an adjoint, and its gradient, as one program.

    `at` are its variables, flat: the parameters, the data and the context.
    """

    def __init__(self, name, adjoint):
        flow = CNF(FIELDS[name](), StandardNormal(3), t1=T)
        solve = Solve(adjoint=adjoint, **SETTINGS[adjoint])
        params, static = partition(flow)
        context = CONTEXT if flow.field.context_dim else None
        self.at, self.unravel = ravel_pytree((params, X, context))

        def value_and_grad(at, divergence):
            def loss(at):
                params, x, context = self.unravel(at)
                return likelihood(
                    eqx.combine(params, static),
                    x,
                    None,
                    context=context,
                    solve=solve,
                    divergence=divergence,
                    penalties={kinetic: 0.5},
                )

            (value, metrics), gradient = differentiator(solve)(loss)(at)
            return value, metrics, gradient()

        self.value_and_grad = quick_jit(value_and_grad)

    def assert_slope(self, divergence, gradient, direction):
        """`gradient` is the finite difference of the loss along a direction."""

        def loss_at(step):
            loss, metrics, _ = self.value_and_grad(self.at + step * direction, divergence)
            assert not metrics["failed"]
            return float(loss)

        expected = slope(loss_at)
        assert abs(expected) > 1e-3
        assert float(gradient @ direction) == pytest.approx(expected, rel=1e-6)


problem = lru_cache(maxsize=len(FIELDS))(Problem)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("name", "adjoint"), TABLE)
def test_gradient_is_the_finite_difference(name, adjoint, divergence):
    here = problem(name, adjoint)
    loss, metrics, gradient = here.value_and_grad(here.at, chosen(divergence))
    assert metrics["kinetic"] > 0
    # A random direction, turned to one in which the loss rises.
    random = np.random.default_rng(1).normal(size=gradient.shape)
    direction = random / np.linalg.norm(random) + gradient / np.linalg.norm(gradient)
    here.assert_slope(chosen(divergence), gradient, direction)
    exact, *_ = here.value_and_grad(here.at, chosen("exact"))
    assert (abs(loss - exact) < 1e-12) == (divergence in ("exact", "forward"))


def test_the_gradient_in_a_learnable_rate_is_the_finite_difference():
    here = problem("time change", QUICK["time change"])
    still = here.unravel(jnp.zeros_like(here.at))
    rate = eqx.tree_at(lambda at: at[0].field.sqrt_rate, still, jnp.ones(()))
    *_, gradient = here.value_and_grad(here.at, chosen("exact"))
    here.assert_slope(chosen("exact"), gradient, ravel_pytree(rate)[0])


def test_every_adjoint_is_in_the_quick_table():
    assert set(QUICK) == set(FIELDS)
    for adjoint in SETTINGS:
        assert list(QUICK.values()).count(adjoint) >= 2


@pytest.mark.slow
def test_backsolve_keeps_its_tolerance_at_any_batch_size():
    # The mean over copies of a batch has the batch's own gradient.
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


STEER = 0.3


@quick_jit
@jax.value_and_grad
def steered(matrix, key):
    """The loss of a flow whose base is at a time within `STEER` of 0, and its gradient."""
    flow = CNF(Swing(matrix), StandardNormal(3), t1=T)
    solve = Solve(step=T / 8, max_steps=8, adjoint="direct")
    return likelihood(flow, X, key, solve=solve, steer=STEER)[0]


def steered_from(start, matrix=MATRIX):
    """The same in closed form, with the base at `start`."""
    propagator = linalg.expm((np.sin(T) - np.sin(start)) * matrix)
    density = stats.multivariate_normal(np.zeros(3), propagator @ propagator.T)
    return -np.mean(density.logpdf(np.asarray(X)))


def start_of(loss):
    """The time of the base, which the loss tells: it falls as the flow gets longer."""
    return optimize.brentq(lambda start: steered_from(start) - loss, -STEER, STEER, xtol=1e-13)


def test_steer_puts_the_base_at_a_random_time_and_has_its_gradient():
    pairs = [steered(jnp.asarray(MATRIX), key) for key in jr.split(jr.key(1), 8)]
    losses, gradients = (np.stack(parts) for parts in zip(*pairs, strict=True))
    starts = [start_of(loss) for loss in losses]
    assert np.ptp(starts) > STEER
    along = np.outer(SHIFT, SHIFT)
    expected = [slope(lambda h, s=s: steered_from(s, MATRIX + h * along)) for s in starts]
    np.testing.assert_allclose(np.sum(gradients * along, axis=(1, 2)), expected, rtol=1e-5)


def test_steer_is_fixed_by_its_key():
    first, again, other = (steered(jnp.asarray(MATRIX), jr.key(seed))[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("steer", "key"), [(T, jr.key(0)), (-0.1, jr.key(0)), (0.1, None)])
def test_steer_is_less_than_the_flow_and_takes_a_key(steer, key):
    flow = CNF(Swing(jnp.asarray(MATRIX)), StandardNormal(3), t1=T)
    with pytest.raises(ValueError, match=r"steer must be in \[0, 0.8\) and needs a key; got"):
        likelihood(flow, X, key, steer=steer)
