"""Solves by `integrate`: order, tolerance, error norms, nfe, step plans and failures."""

import re

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import Tally, mlp, tolerance

import jcnf
from jcnf import CNF, Solve
from jcnf.distributions import StandardNormal
from jcnf.objectives import likelihood
from jcnf.ode import NUM_BINS, SOLVERS, Stats, integrate, is_known

ORDERS = dict(euler=1, heun=2, midpoint=2, rk4=4, bosh3=3, tsit5=5, dopri5=5, dopri8=8)
START = jnp.array([[1.0, -0.5], [0.3, 0.7]])
END = 2.0


class Growth(eqx.Module):
    """y' = y cos t: y = y(0) exp(sin t). It counts its evaluations on the host."""

    evaluations: Tally = eqx.field(static=True)

    def __call__(self, t, y, args):
        jax.debug.callback(self.add_one)
        return y * jnp.cos(t)

    def add_one(self):
        self.evaluations.count += 1


class Decay(eqx.Module):
    """y' = -rate y."""

    def __call__(self, t, y, args):
        return -args * y


class Wave(eqx.Module):
    """y' = w cos(w t): y = y(0) + sin(w t), where `args` holds a frequency w for each sample."""

    def __call__(self, t, y, args):
        return args * jnp.cos(args * t)


@eqx.filter_jit
def solve_to(field, y0, args, t1, solve):
    """Integrate from 0; compiled once for all steps and tolerances that are given as arrays."""
    return integrate(field, y0, args, jnp.asarray(0.0, y0.dtype), t1, solve)


def grow(solve):
    """Return the largest error at the end, the `Stats`, and the counted evaluations."""
    GROWTH.evaluations.count = 0
    y, stats = solve_to(GROWTH, START, None, jnp.asarray(END), solve)
    jax.effects_barrier()
    error = np.max(np.abs(y - START * np.exp(np.sin(END))))
    return error, stats, GROWTH.evaluations.count


GROWTH = Growth(Tally())


@pytest.mark.parametrize("solver", SOLVERS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver):
    solve = Solve(solver=solver, step=1.0)
    order, errors = ORDERS[solver], []
    for count in (4, 8) if order > 5 else (32, 64):
        stepped = eqx.tree_at(lambda s: s.step, solve, jnp.asarray(END / count))
        error, stats, evaluations = grow(stepped)
        errors.append(error)
        assert (int(stats.steps), int(stats.rejected)) == (count, 0)
        assert not jnp.any(stats.failed)
        assert int(stats.nfe) == evaluations
    assert order - 0.2 < np.log2(errors[0] / errors[1]) < order + 0.6


def test_tighter_tolerance_smaller_error_more_evaluations():
    values, errors, nfes = [1e-3, 1e-5, 1e-7, 1e-9], [], []
    for value in values:
        error, stats, evaluations = grow(tolerance(Solve(), value))
        errors.append(error)
        nfes.append(int(stats.nfe))
        assert nfes[-1] == evaluations
    assert np.all(np.diff(errors) < 0)
    assert np.all(np.diff(nfes) > 0)
    assert np.all(np.array(errors) < 10 * np.array(values))


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        *((name, "checkpoint") for name in ORDERS if name not in ("euler", "rk4")),
        ("heun", "reversible"),
        ("dopri5", "reversible"),
    ],
)
def test_evaluations_of_rejected_steps_are_counted_the_first_ones_too(solver, adjoint):
    solve = Solve(solver=solver, adjoint=adjoint, first_step=1.0)
    for value in (1e-3, 1e-4):
        _, stats, evaluations = grow(tolerance(solve, value))
        assert 0 < int(stats.rejected) < int(stats.steps)
        assert int(stats.nfe) == evaluations
        assert not jnp.any(stats.failed)


def test_a_step_plan_may_change_without_compiling_anew():
    traces = Tally()

    @eqx.filter_jit
    def decayed(solve, t1):
        traces.count += 1
        return integrate(Decay(), START, jnp.asarray(3.0), jnp.asarray(0.0), t1, solve)

    for end in (END, -END):
        steps, none = [], jnp.zeros(NUM_BINS)
        _, alone = decayed(Solve(first_step=1.0, step_plan=none), jnp.asarray(end))
        for step_plan in (
            none,
            alone.step_plan,
            3 * alone.step_plan,
            np.asarray(alone.step_plan) / 100,
        ):
            y, stats = decayed(Solve(first_step=1.0, step_plan=step_plan), jnp.asarray(end))
            np.testing.assert_allclose(y, START * np.exp(-3 * end), rtol=1e-3, atol=1e-5)
            steps.append((int(stats.steps), int(stats.rejected)))
        assert steps[0] == (int(alone.steps), int(alone.rejected))
        assert steps[1][0] < steps[0][0] < steps[2][0] == np.ceil(3 * np.sum(alone.step_plan))
        assert steps[2][1] == 0 < steps[0][1]
        assert steps[3][1] > steps[1][1]
    assert traces.count == 1


# Without XLA's optimizations, the programs with and without a plan differ in the last bit.
@pytest.mark.optimized
@pytest.mark.parametrize(
    "adjoint", ["checkpoint", pytest.param("reversible", marks=pytest.mark.slow)]
)
def test_a_solve_tells_what_the_next_may_take_for_its_step_plan(adjoint):
    def decay(rate, end, first_step, **settings):
        solve = Solve(adjoint=adjoint, **settings)
        solve = eqx.tree_at(lambda s: s.first_step, solve, jnp.asarray(first_step))
        return solve_to(Decay(), START, jnp.asarray(rate), jnp.asarray(end), solve)

    for end in (END, -END):
        y, alone = decay(3.0, end, first_step=1.0)
        assert (alone.step_plan.shape, alone.step_plan.dtype) == ((NUM_BINS,), START.dtype)
        assert is_known(alone.step_plan)
        assert float(jnp.sum(alone.step_plan)) < int(alone.steps)
        again = decay(3.0, end, first_step=1.0, step_plan=alone.step_plan)[1]
        assert int(again.rejected) < int(alone.rejected)
        assert int(again.nfe) < 0.8 * int(alone.nfe)
        # A plan of zeros changes nothing, and a known plan overrides `first_step`.
        y_of_zeros, of_zeros = decay(3.0, end, first_step=1.0, step_plan=jnp.zeros(NUM_BINS))
        assert eqx.tree_equal((y_of_zeros, of_zeros), (y, alone))
        other = decay(3.0, end, first_step=1e-3, step_plan=alone.step_plan)[1]
        np.testing.assert_array_equal(other.step_plan, again.step_plan)
        assert int(decay(3.0, end, first_step=1e-3)[1].rejected) < int(alone.rejected)
        # An easy solve takes a single step.
        easy = decay(1e-4, end, first_step=0.3)[1]
        assert (int(easy.steps), float(jnp.sum(easy.step_plan)) < 1) == (2, True)
        assert int(decay(1e-4, end, first_step=0.3, step_plan=easy.step_plan)[1].steps) == 1
        for both in (alone + easy, easy + alone):
            np.testing.assert_array_equal(
                both.step_plan, np.maximum(alone.step_plan, easy.step_plan)
            )


def test_a_step_plan_is_of_no_use_to_fixed_steps_and_unknown_where_a_solve_ended():
    step_plan, rate, end = jnp.full(NUM_BINS, 0.1), jnp.asarray(3.0), jnp.asarray(END)
    y, stats = solve_to(Decay(), START, rate, end, Solve(step=0.25))
    given = solve_to(Decay(), START, rate, end, Solve(step_plan=step_plan, step=0.25))
    assert eqx.tree_equal(given, (y, stats))
    for adjoint in ("direct", "backsolve"):
        _, stats = solve_to(Decay(), START, rate, end, Solve(adjoint=adjoint, first_step=0.01))
        planned = Solve(adjoint=adjoint, step_plan=stats.step_plan, first_step=0.01)
        assert int(solve_to(Decay(), START, rate, end, planned)[1].steps) < int(stats.steps)
    _, stats = solve_to(Decay(), START, rate, end, Solve(max_steps=3))
    assert np.all(stats.failed)
    assert not is_known(stats.step_plan)
    assert float(stats.step_plan[0]) > 0
    np.testing.assert_array_equal(Stats.unsolved(START).step_plan, np.zeros(NUM_BINS))


def waves(norm, start, frequencies):
    """Return the error at t = 1 at a tolerance of 1e-4, and the `Stats`."""
    solve = Solve(rtol=1e-4, atol=1e-4, norm=norm)
    y, stats = solve_to(Wave(), start, frequencies, jnp.asarray(1.0), solve)
    return np.max(np.abs(y - start - np.sin(frequencies))), stats


STILL = jnp.zeros((2001, 1))
ONE_MOVES = STILL.at[-1].set(20.0)


def test_worst_norm_bounds_every_sample_where_batch_does_not():
    error, stats = waves("worst", STILL, ONE_MOVES)
    assert error < 1e-4
    assert 0 < int(stats.rejected) < int(stats.steps)
    assert int(stats.nfe) == 6 * int(stats.steps) + 1
    assert waves("batch", STILL, ONE_MOVES)[0] > 1e-2


@pytest.mark.parametrize("norm", ["batch", "worst"])
def test_nan_in_the_field_or_in_one_sample_fails_in_few_evaluations(norm):
    for start, frequencies in ((STILL, STILL.at[7].set(np.nan)), (STILL.at[7].set(np.nan), STILL)):
        _, stats = waves(norm, start, frequencies)
        assert bool(jnp.any(stats.failed))
        assert int(stats.steps) < 50
    assert not jnp.any(waves(norm, STILL, STILL)[1].failed)


def test_worst_norm_joins_a_samples_leaves_and_is_the_largest_over_the_batch():
    from jcnf.ode import max_sample_rms_norm, rms_norm

    error = {"x": jnp.array([[3.0, 0.0], [1.0, 1.0]]), "logdet": jnp.array([0.0, 1.0])}
    assert max_sample_rms_norm(error) == pytest.approx(np.sqrt(9 / 3))
    assert rms_norm(error) == pytest.approx(np.sqrt(12 / 6))
    error["logdet"] = jnp.array([jnp.nan, 1.0])
    assert max_sample_rms_norm(error) == rms_norm(error) == jnp.inf


def test_rows_that_fail_under_fixed_steps_keep_the_last_finite_state():
    solve = Solve(solver="euler", step=0.5)
    y, stats = solve_to(Decay(), START, jnp.asarray(-1e200), jnp.asarray(END), solve)
    np.testing.assert_array_equal(y, START)  # the mean square of a state overflows in one step
    assert np.all(stats.failed)


def test_under_the_worst_norm_the_samples_at_fault_are_flagged():
    for frequency, settings in ((1e6, {"max_steps": 50}), (np.nan, {}), (np.nan, {"step": 0.1})):
        solve = Solve(norm="worst", **settings)
        y, stats = solve_to(Wave(), STILL, STILL.at[7].set(frequency), jnp.asarray(1.0), solve)
        assert np.flatnonzero(stats.failed).tolist() == [7]
        assert np.all(np.isfinite(y))
        assert int(stats.steps) <= 50
    # If max_steps is reached, all samples have failed: here each needs more than two steps.
    solve = Solve(norm="worst", max_steps=2)
    _, stats = solve_to(Wave(), STILL, STILL + 20, jnp.asarray(1.0), solve)
    assert np.all(stats.failed)


def test_a_solve_is_hashable_and_takes_diffrax_objects():
    assert hash(Solve()) == hash(Solve())
    assert Solve() == Solve()
    own = Solve(solver=diffrax.Ralston(), adjoint=diffrax.ForwardMode(), step=0.5)
    y, stats = solve_to(Decay(), START, jnp.asarray(0.1), jnp.asarray(1.0), own)
    np.testing.assert_allclose(y, START * np.exp(-0.1), rtol=1e-3)
    assert int(stats.nfe) == 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rk9"}, "unknown solver 'rk9': use one of euler, heun, midpoint, rk4, bosh3"),
        ({"solver": "rk4"}, "solver 'rk4' has no error estimate and needs a fixed step; got step="),
        ({"adjoint": "magic"}, "unknown adjoint 'magic': use one of checkpoint, direct, backsolve"),
        ({"norm": "max"}, "unknown norm 'max': use one of batch, worst"),
        ({"step": -1}, "step must be positive and finite; got -1"),
        ({"rtol": 0}, "rtol must be positive and finite; got 0"),
        ({"atol": float("nan")}, "atol must be positive and finite; got nan"),
        ({"first_step": 0}, "first_step must be in (0, 1]; got 0"),
        ({"max_steps": 0}, "max_steps must be a whole number, at least 1"),
        ({"max_steps": 10.5}, "got max_steps=10.5"),
        ({"rtol": None}, "rtol must be positive and finite; got None"),
        ({"step": "0.1"}, "step must be positive and finite; got '0.1'"),
        ({"norm": None}, "norm must be one of batch, worst"),
        ({"solver": "euler"}, "give it one, as in Solve(solver='euler', step=0.05)"),
    ],
)
def test_errors_say_what_is_known(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Solve(**settings)


@pytest.mark.parametrize("settings", [{}, {"solver": "euler", "step": 0.1}, {"norm": "worst"}])
@pytest.mark.parametrize("adjoint", ["checkpoint", "reversible"])
def test_a_training_step_calls_nothing_on_the_host(settings, adjoint):
    """A callback would stop every step to wait, and keep the program out of XLA's cache."""
    flow, solve = CNF(mlp(2, (4,)), StandardNormal(2)), Solve(adjoint=adjoint, **settings)

    def loss(flow, x):
        return likelihood(flow, x, jr.key(0), solve=solve)[0]

    text = eqx.filter_jit(eqx.filter_grad(loss)).lower(flow, jnp.ones((3, 2))).as_text()
    assert "while" in text
    assert "callback" not in text


def test_an_implicit_solver_carries_to_where_an_explicit_one_does():
    flow, x = CNF(mlp(2, (4,)), StandardNormal(2)), jnp.array([[0.3, -0.4], [1.0, 0.2]])
    explicit, implicit = (
        jcnf.transform(flow, x, solve=Solve(solver, rtol=1e-6, atol=1e-6))
        for solver in ("dopri5", diffrax.Kvaerno3())
    )
    np.testing.assert_allclose(implicit.value, explicit.value, atol=1e-5)
    np.testing.assert_allclose(implicit.logdet, explicit.logdet, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["checkpoint", "direct", "backsolve"])
def test_an_implicit_solver_has_the_gradient_of_an_explicit_one(adjoint):
    flow, x = CNF(mlp(2, (4,)), StandardNormal(2)), jnp.array([[0.3, -0.4], [1.0, 0.2]])

    def loss(flow, solve):
        return jnp.mean(jcnf.log_prob(flow, x, solve=solve))

    expected = eqx.filter_grad(loss)(flow, Solve(rtol=1e-8, atol=1e-8))
    implicit = Solve(diffrax.Kvaerno3(), rtol=1e-6, atol=1e-6, adjoint=adjoint)
    found = eqx.filter_grad(loss)(flow, implicit)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
