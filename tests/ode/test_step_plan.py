"""Step plans: their points, and solves with right plans, wrong plans and none."""

import itertools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tolerance
from scipy.special import erf

from jcnf import Solve
from jcnf.ode import (
    MIN_STEP_FRACTION,
    NUM_BINS,
    integrate,
    is_known,
    next_point,
    unknown,
    with_step,
)

EDGES = np.linspace(0, 1, NUM_BINS + 1)
LEVEL = np.ones(NUM_BINS)
MESHES = {
    "level": LEVEL * 0.3,
    "level and whole": LEVEL / 4,
    "one step": LEVEL / 1000,
    "many steps": LEVEL * 17.3,
    "steep": np.geomspace(1e-3, 3, NUM_BINS),
    "falling": np.geomspace(5, 1e-4, NUM_BINS),
    "nothing in the middle": np.where(abs(EDGES[:-1] - 0.5) < 0.1, 1e-9, 0.7),
    "nothing at the end": np.where(EDGES[:-1] > 0.9, 1e-9, 0.7),
    "a spike": np.where(np.arange(NUM_BINS) == 40, 9.5, 0.02),
    "random": np.random.default_rng(3).exponential(0.5, NUM_BINS),
}
OF_ALL = pytest.mark.parametrize("name", MESHES)
BOTH = pytest.mark.parametrize("adjoint", ["checkpoint", "reversible"])
# "direct" and "backsolve" take the same forward steps as "checkpoint", but in other programs.
ALL_ADJOINTS = ["checkpoint", "reversible", "direct", "backsolve"]
EACH = pytest.mark.parametrize("adjoint", ALL_ADJOINTS)
WAYS = ((0.3, 2.1), (2.1, 0.3))


@OF_ALL
def test_the_next_point_is_the_next_quantile_that_is_no_short_step_away(name):
    step_plan = MESHES[name]
    steps = np.concatenate([[0], np.cumsum(step_plan)])
    number = int(np.ceil(steps[-1]))
    quantiles = np.interp(np.arange(number + 1) / number, steps / steps[-1], EDGES)
    starts = np.random.default_rng(0).uniform(0, 1, 50)
    done = np.interp(starts, EDGES, steps / steps[-1] * number)
    # The next quantile, or the one after it where the next has almost been reached.
    expected = [
        quantiles[min(next(n for n in itertools.count(1) if n - d > MIN_STEP_FRACTION), number)]
        for d in done
    ]
    found = jax.jit(jax.vmap(partial(next_point, jnp.asarray(step_plan))))(jnp.asarray(starts))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    left = quantiles[1:-1] - 1e-7 if number > 1 else quantiles[:0]
    if np.min(step_plan) > 1e-6 and len(left):
        found = jax.vmap(partial(next_point, jnp.asarray(step_plan)))(jnp.asarray(left))
        np.testing.assert_allclose(found, quantiles[2:], rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@OF_ALL
def test_points_followed_from_the_start_reach_the_end_in_as_many_steps(name, dtype):
    step_plan = jnp.asarray(MESHES[name], dtype)
    points, step = [jnp.zeros((), dtype)], jax.jit(next_point)
    while points[-1] < 1:
        points.append(step(step_plan, points[-1]))
        assert points[-1].dtype == dtype
        assert points[-1] > points[-2]
    assert points[-1] == 1
    assert len(points) - 1 == np.ceil(np.cumsum(step_plan)[-1])


class Still(eqx.Module):
    """y' = 0: no step is ever rejected."""

    def __call__(self, t, y, args):
        return jnp.zeros_like(y)


@eqx.filter_jit
def stand_still(solve, t0, t1):
    return integrate(Still(), jnp.zeros((1, 1), t0.dtype), None, t0, t1, solve)[1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@EACH
def test_a_solve_that_is_never_refused_takes_these_steps_in_either_direction(adjoint, dtype):
    settings = {"solver": "heun", "adjoint": adjoint, "norm": "worst", "max_steps": 1200}
    for name, way in itertools.product(MESHES, WAYS):
        step_plan = jnp.asarray(MESHES[name], dtype)
        solve = Solve(rtol=1e-3, atol=1e-3, step_plan=step_plan, **settings)
        stats = stand_still(solve, *(jnp.asarray(t, dtype) for t in way))
        assert not np.any(stats.failed)
        assert int(stats.rejected) == 0
        assert int(stats.steps) == np.ceil(np.cumsum(step_plan)[-1])


def test_a_step_adds_to_the_parts_that_it_is_in():
    step_plan = unknown(float)
    ends = 0.0, 0.3 / NUM_BINS, 10.3 / NUM_BINS, 10.8 / NUM_BINS, 0.9, 1.0
    rates = [50.0, 3.0, 640.0, 6.4, 11.0]
    for start, end, rate in zip(ends, ends[1:], rates, strict=False):
        assert not is_known(step_plan)
        step_plan = with_step(step_plan, *(jnp.asarray(number) for number in (start, end, rate)))
    assert is_known(step_plan)
    assert float(jnp.sum(step_plan)) == pytest.approx(np.dot(np.diff(ends), rates), rel=1e-12)
    np.testing.assert_allclose(step_plan[1:10], 3.0 / NUM_BINS, rtol=1e-9)
    np.testing.assert_allclose(step_plan[0] * NUM_BINS, 0.3 * 50 + 0.7 * 3, rtol=1e-12)
    np.testing.assert_allclose(
        step_plan[10] * NUM_BINS, 0.3 * 3 + 0.5 * 640 + 0.2 * 6.4, rtol=1e-12
    )
    np.testing.assert_allclose(step_plan[11:57], 6.4 / NUM_BINS, rtol=1e-9)
    np.testing.assert_allclose(step_plan[58:], 11.0 / NUM_BINS, rtol=1e-9)


def test_known_is_what_is_positive_and_finite_everywhere():
    step_plan = jnp.asarray(LEVEL)
    assert is_known(step_plan)
    for bad in (0.0, -1.0, jnp.nan, jnp.inf):
        assert not is_known(step_plan.at[17].set(bad))
    assert not is_known(unknown(jnp.float32))
    assert unknown(jnp.float32).dtype == jnp.float32


class Turn(eqx.Module):
    """A rotation of the plane, fast near t = 0.8, by t + rate width sqrt(pi) / 2 erf(...)."""

    width: float = 0.2

    def __call__(self, t, y, rate):
        speed = 1 + rate * jnp.exp(-(((t - 0.8) / self.width) ** 2))
        return speed * jnp.stack([-y[:, 1], y[:, 0]], axis=1)

    def turned(self, y, t0, t1, rate):
        """Return the solution and its derivative by the rate, in closed form."""
        ends = (np.array([t0, t1]) - 0.8) / self.width
        by_rate = self.width * np.sqrt(np.pi) / 2 * np.diff(erf(ends))[0]
        angle = t1 - t0 + rate * by_rate
        cos, sin = np.cos(angle), np.sin(angle)
        end = np.asarray(y) @ np.array([[cos, sin], [-sin, cos]])
        return end, by_rate * np.stack([-end[:, 1], end[:, 0]], axis=1)


START = jnp.array([[1.0, -0.5], [0.3, 0.7]])
RATE = 10.0


@eqx.filter_jit
def turn(solve, t0, t1, rate=RATE):
    y, stats = integrate(Turn(), START, jnp.asarray(rate), t0, t1, solve)
    return y, stats


def turned(adjoint, way, step_plan=None, value=1e-5, **settings):
    """Return the error at the end and the `Stats`; plan, tolerance and direction are traced."""
    solve = Solve(
        adjoint=adjoint, step_plan=unknown(float) if step_plan is None else step_plan, **settings
    )
    y, stats = turn(tolerance(solve, value), *(jnp.asarray(t) for t in way))
    assert not np.any(stats.failed)
    return np.max(np.abs(y - Turn().turned(START, *way, RATE)[0])), stats


@EACH
@pytest.mark.parametrize("way", WAYS)
def test_the_step_plan_of_a_solve_saves_its_rejections_and_a_fifth_of_its_evaluations(adjoint, way):
    for value in (1e-4, 1e-5, 1e-6, 1e-7):
        error, alone = turned(adjoint, way, value=value)
        assert int(alone.rejected) > 2
        step_plan = alone.step_plan
        for bound in (4 * error, *3 * [20 * value]):
            again, stats = turned(adjoint, way, step_plan, value)
            assert int(stats.rejected) <= 1
            if int(stats.rejected) == 0:
                assert int(stats.steps) == np.ceil(np.sum(step_plan))
            assert int(stats.nfe) < 0.8 * int(alone.nfe)
            assert again < bound
            step_plan = stats.step_plan


@BOTH
@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_step_plan_costs_evaluations_and_no_accuracy(adjoint, way):
    value, rng = 1e-5, np.random.default_rng(0)
    _, alone = turned(adjoint, way, value=value)
    right = np.asarray(alone.step_plan)
    wrong = {"a thousandth": right / 1000, "a third": right / 3, "one step": LEVEL / NUM_BINS}
    wrong |= {"reversed": right[::-1], "random": rng.exponential(np.mean(right), NUM_BINS)}
    for step_plan in wrong.values():
        error, stats = turned(adjoint, way, jnp.asarray(step_plan), value)
        assert error < 20 * value
        assert int(stats.rejected) > 1  # then the plan is dropped
        assert int(stats.nfe) < 1.5 * int(alone.nfe)
        again = turned(adjoint, way, stats.step_plan, value)[1]
        assert int(again.rejected) <= 1
        assert int(again.nfe) < 0.8 * int(alone.nfe)


@BOTH
@pytest.mark.parametrize("way", WAYS)
def test_a_step_plan_that_is_too_fine_is_followed_and_more_accurate(adjoint, way):
    for factor, value in ((10, 1e-5), (100, 1e-4)):
        _, alone = turned(adjoint, way, value=value)
        error, stats = turned(adjoint, way, factor * alone.step_plan, value)
        assert int(stats.rejected) == 0
        assert int(stats.steps) == np.ceil(factor * np.sum(alone.step_plan))
        assert error < 1e-3 * value
        # The controller lets steps grow at most tenfold, so the new plan is coarser by that much.
        assert float(jnp.sum(stats.step_plan)) < 1.2 * float(jnp.sum(alone.step_plan)) * factor / 10


@EACH
def test_a_step_plan_that_is_not_known_or_of_too_many_steps_is_as_none(adjoint):
    way = WAYS[0]
    alone = turned(adjoint, way)
    for bad in (0.0, -1.0, np.nan, np.inf, 1025.0):
        for where in (0, 30, NUM_BINS - 1):
            step_plan = alone[1].step_plan.at[where].set(bad)
            assert eqx.tree_equal(turned(adjoint, way, step_plan), alone)
    assert not eqx.tree_equal(turned(adjoint, way, alone[1].step_plan), alone)
    assert not eqx.tree_equal(turned(adjoint, way, alone[1].step_plan.at[30].set(900.0)), alone)


@EACH
@pytest.mark.parametrize("way", [WAYS[0], pytest.param(WAYS[1], marks=pytest.mark.slow)])
def test_gradients_on_a_step_plan_are_those_of_the_closed_form_and_none_flow_through_it(
    adjoint, way
):
    ends, weights = tuple(jnp.asarray(t) for t in way), np.array([[0.3, -1.1], [0.8, 0.4]])

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(y0, rate, step_plan):
        given = Solve(rtol=1e-10, atol=1e-10, adjoint=adjoint, step_plan=step_plan * rate / rate)
        y, stats = integrate(Turn(), y0, rate, *ends, given)
        return jnp.sum(weights * y), stats

    nfe, step_plan = [], unknown(float)
    end, slope = Turn().turned(START, *way, RATE)
    back = Turn().turned(weights, *way[::-1], RATE)[0]  # the inverse of a rotation is its transpose
    for _ in range(3):
        (value, stats), (by_start, by_rate) = loss(START, jnp.asarray(RATE), step_plan)
        assert float(value) == pytest.approx(np.sum(weights * end), abs=1e-8)
        assert float(by_rate) == pytest.approx(np.sum(weights * slope), abs=1e-8)
        np.testing.assert_allclose(by_start, back, atol=1e-8)
        nfe.append(int(stats.nfe))
        step_plan = stats.step_plan
    assert max(nfe[1:]) < 0.9 * nfe[0]


@pytest.mark.parametrize("solver", ["heun", "bosh3", "tsit5", "dopri8"])
def test_other_methods_heed_a_step_plan_too(solver):
    for way in WAYS:
        value = 1e-3 if solver == "heun" else 1e-5
        error, alone = turned("checkpoint", way, value=value, solver=solver)
        again, stats = turned("checkpoint", way, alone.step_plan, value, solver=solver)
        assert int(stats.rejected) <= 1 < int(alone.rejected)
        assert int(stats.nfe) < 0.95 * int(alone.nfe)
        assert again < 5 * error


def test_in_x64_a_solve_of_float32_takes_a_step_plan_of_float64():
    @jax.jit
    def solved(step_plan):
        ends = (jnp.asarray(t, jnp.float32) for t in WAYS[0])
        field, y0, rate = Turn(), START.astype(jnp.float32), jnp.asarray(RATE, jnp.float32)
        return integrate(field, y0, rate, *ends, Solve(step_plan=step_plan))

    (_, alone), (y, stats) = solved(unknown(float)), solved(jnp.asarray(MESHES["level"]))
    assert {y.dtype, alone.step_plan.dtype, stats.step_plan.dtype} == {np.dtype("float32")}
    y, stats = solved(alone.step_plan.astype(float))
    assert int(stats.steps) < int(alone.steps)
    np.testing.assert_allclose(y, Turn().turned(START, *WAYS[0], RATE)[0], atol=3e-4)
