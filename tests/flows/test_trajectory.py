"""Trajectories of a neural ODE: gradients in states, parameters and times by every adjoint."""

import re
from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    MATRIX,
    TIGHT,
    Linear,
    NotANumber,
    Tally,
    Traced,
    affine,
    astype,
    carried,
    mlp,
    slope,
)
from jax.flatten_util import ravel_pytree

import jcnf
from jcnf import Solve
from jcnf.fields import TimeRescaling
from jcnf.flows import solve_trajectory
from jcnf.training import differentiator, partition

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 2)))
FIELD = mlp(2, (4,))  # depends on time
SHARED = np.array([0.1, 0.25, 0.9, 1.0])
# Time increases for the first sample and decreases for the second.
OWN = np.stack([SHARED, np.array([1.2, 0.7, 0.65, -0.2])], axis=1)
TIMES = {"up": SHARED, "down": SHARED[::-1].copy(), "own": OWN}
WEIGHTS = jnp.asarray(RNG.normal(size=(4, 2, 2)))
PRECISE = Solve(solver="dopri5", rtol=1e-10, atol=1e-10, max_steps=256)
EULER = Solve(solver="euler", step=0.19, max_steps=8)
ADJOINTS = ["checkpoint", "direct", "backsolve", "backsolve_seminorm", "reversible", "forward"]
# The cases of the quick suite.
QUICK = ["backsolve-down", "reversible-own"]
TABLE = [
    pytest.param(a, t, marks=() if f"{a}-{t}" in QUICK else pytest.mark.slow, id=f"{a}-{t}")
    for a in ADJOINTS
    for t in TIMES
]
in_time = eqx.filter_jit(solve_trajectory)


class Problem:
    """A loss of a trajectory with its gradient in the flat parameters, start and times, `at`."""

    def __init__(self, solve, times):
        params, static = partition(FIELD)
        self.at, self.unravel = ravel_pytree((params, X, jnp.asarray(times)))

        def value_and_grad(at):
            def loss(at):
                params, x, times = self.unravel(at)
                field = eqx.combine(params, static)
                xs, stats = solve_trajectory(field, x, times, solve=solve)
                return jnp.sum(WEIGHTS * xs**2), stats

            (value, stats), gradient = differentiator(solve)(loss)(at)
            return value, stats, gradient()

        self.value_and_grad = jax.jit(value_and_grad)

    def assert_slopes(self, times, rtol=1e-6):
        """Check the gradient at `times` against finite differences.

        They are along one random direction in the parameters, one in the start, and along each
        time.
        """
        params, x, _ = self.unravel(self.at)
        at = ravel_pytree((params, x, jnp.asarray(times)))[0]
        random = np.random.default_rng(1).normal(size=at.shape)
        random[-times.size :] = 1
        sizes = [at.size - x.size - times.size, x.size, *[1] * times.size]
        parts = np.repeat(np.arange(len(sizes)), sizes)
        directions = [np.where(parts == part, random, 0) for part in range(len(sizes))]
        *_, gradient = self.value_and_grad(at)

        def loss(at):
            value, stats, _ = self.value_and_grad(at)
            assert not np.any(stats.failed)
            return float(value)

        numerical = [slope(lambda h, d=d: loss(at + h * d)) for d in directions]
        assert np.all(np.abs(numerical) > 1e-3)
        np.testing.assert_allclose([gradient @ d for d in directions], numerical, rtol=rtol)


@cache
def problem(adjoint, own):
    return Problem(replace(PRECISE, adjoint=adjoint), OWN if own else SHARED)


@pytest.mark.parametrize(("adjoint", "times"), TABLE)
def test_gradients_in_start_parameters_and_every_time(adjoint, times):
    problem(adjoint, times == "own").assert_slopes(TIMES[times])


@pytest.mark.parametrize(
    "adjoint",
    ["checkpoint", *(pytest.param(a, marks=pytest.mark.slow) for a in ("direct", "reversible"))],
)
def test_times_of_each_sample_have_the_gradient_of_eulers_own_steps(adjoint):
    Problem(replace(EULER, adjoint=adjoint), OWN).assert_slopes(OWN, rtol=1e-8)


def test_the_velocity_at_the_times_is_evaluated_only_for_their_gradient():
    def evaluations(function, *args):
        tally = Tally()
        field = Traced(FIELD, tally)
        jax.eval_shape(lambda *args: function(field, *args), *args)
        return tally.count

    def loss(x, times, field):
        return jnp.sum(solve_trajectory(field, x, times, solve=EULER)[0])

    times = jnp.asarray(SHARED)
    bare = evaluations(lambda f, x, t: loss(x, t, f), X, times)
    in_x = evaluations(lambda f, x, t: jax.grad(loss)(x, t, f), X, times)
    in_both = evaluations(lambda f, x, t: jax.grad(loss, (0, 1))(x, t, f), X, times)
    assert bare == in_x < in_both


# States


def test_each_sample_has_its_own_times():
    context = jnp.asarray(RNG.normal(size=(3, 2)))
    x = jnp.asarray(RNG.normal(size=(3, 3)))
    times = np.array([[0.2, 1.0, 0.0], [0.3, 0.4, 0.1], [0.3, 0.2, 0.1], [1.0, -0.3, 0.1]])
    xs, stats = in_time(affine(), x, jnp.asarray(times), context=context, solve=TIGHT)
    assert xs.shape == (4, 3, 3)
    assert not np.any(stats.failed)
    for i in range(3):
        one = slice(i, i + 1)
        alone = [carried(x[one], t - times[0, i], context[one])[0] for t in times[:, i]]
        np.testing.assert_allclose(xs[:, i], alone, atol=1e-9)
    np.testing.assert_array_equal(xs[0], x)
    # A repeated time repeats the state.
    np.testing.assert_array_equal(xs[1, 0], xs[2, 0])
    np.testing.assert_array_equal(xs[2, 2], xs[3, 2])


def test_both_shapes_of_times_agree():
    shared, _ = in_time(FIELD, X, jnp.asarray(SHARED), solve=PRECISE)
    # A field that wraps another field is accepted, too.
    own = jnp.stack([jnp.asarray(SHARED / 2)] * 2, axis=1)
    twice, _ = in_time(TimeRescaling(FIELD, 2.0), X, own, solve=PRECISE)
    np.testing.assert_allclose(twice, shared, atol=1e-7)


def test_no_step_is_longer_than_asked_and_the_error_is_of_eulers_order():
    times = np.array([[0.0, 0.5], [0.3, 0.1], [0.3, -0.2], [1.1, -0.5]])
    x = jnp.asarray(RNG.normal(size=(2, 3)))
    exact = np.stack(
        [
            np.concatenate([carried(x[i : i + 1], t - times[0, i]) for i, t in enumerate(row)])
            for row in times
        ]
    )
    errors, solve = [], Solve(solver="euler", step=1.0)
    for step in (0.02, 0.01, 0.005):
        solve = eqx.tree_at(lambda s: s.step, solve, jnp.asarray(step))
        xs, stats = in_time(Linear(jnp.asarray(MATRIX)), x, jnp.asarray(times), solve=solve)
        # The longest intervals are 0.4, 0.3 and 0.8.
        assert int(stats.nfe) == int(stats.steps) == round(1.5 / step)
        errors.append(np.max(np.abs(xs - exact)))
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.03)
    # An interval that is not a whole number of steps takes one more, and all are equal.
    solve = Solve(solver="euler", step=0.3)
    ends = jnp.array([[0.0], [1.0]])
    xs, stats = in_time(Linear(jnp.asarray(MATRIX)), x[:1], ends, solve=solve)
    assert int(stats.steps) == 4
    quarter = np.eye(3) + MATRIX / 4
    np.testing.assert_allclose(xs[1, 0], np.linalg.matrix_power(quarter, 4) @ x[0], rtol=1e-12)


@pytest.mark.parametrize(
    "adjoint", ["checkpoint", pytest.param("reversible", marks=pytest.mark.slow)]
)
def test_a_sample_that_does_not_arrive_is_nan_from_there_on_and_the_others_go_on(adjoint):
    # v = x, NaN beyond 1, which the first sample reaches at t = 0.69.
    x, times = jnp.array([[0.5, 0.1], [0.3, 0.2]]), jnp.array([0.0, 0.5, 0.8, 1.0, 1.1])
    solve = replace(TIGHT, norm="worst", max_steps=128, adjoint=adjoint)
    own = jnp.stack([times, times], axis=1)
    xs, stats = in_time(NotANumber(), x, own, solve=solve)
    np.testing.assert_array_equal(stats.failed, [True, False])
    exact = x[None] * np.exp(times[:, None, None])
    np.testing.assert_allclose(xs[:2, 0], exact[:2, 0], rtol=1e-8)
    assert np.all(np.isnan(xs[2:, 0]))
    np.testing.assert_allclose(xs[:, 1], exact[:, 1], rtol=1e-8)
    if adjoint == "checkpoint":
        xs, stats = in_time(NotANumber(), x, times, solve=solve)
        np.testing.assert_array_equal(stats.failed, [True, False])
        np.testing.assert_allclose(xs[:2, 0], exact[:2, 0], rtol=1e-8)
        assert np.all(np.isnan(xs[2:, 0]))
        np.testing.assert_allclose(xs[:, 1], exact[:, 1], rtol=1e-8)
    with pytest.raises(eqx.EquinoxRuntimeError, match="the flow failed for some rows"):
        eqx.filter_jit(jcnf.trajectory)(NotANumber(), x, own, solve=solve)


def test_float32_in_float32_out():
    field, x, own = astype((FIELD, X, jnp.asarray(OWN)), jnp.float32)
    for solve, times in (
        (EULER, own[:, 0]),
        (replace(EULER, adjoint="reversible"), own),
        (Solve(adjoint="backsolve"), own),
    ):
        loss = lambda *args, solve=solve: jnp.sum(solve_trajectory(*args, solve=solve)[0])  # noqa: E731
        shapes = jax.eval_shape(jax.value_and_grad(loss, (0, 1, 2)), field, x, times)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("field", "times", "message"),
    [
        (
            lambda t, x, context: x,
            SHARED,
            "field must be a jcnf.fields.Field: subclass it",
        ),
        (FIELD, OWN[:, :1], "a column for each of the 2 samples; got shape (4, 1)"),
        (FIELD, OWN[:1], "vector of at least 2, or of shape (times, batch)"),
        (FIELD, OWN[..., None], "got shape (4, 2, 1)"),
        (FIELD, OWN[[0, 1, 0]], "times must be monotone for each sample"),
        (FIELD, OWN * np.nan, "times has NaN or inf in 4 of 4 rows"),
    ],
)
def test_wrong_fields_and_times_say_what_to_do(field, times, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jcnf.trajectory(field, X, times)


@pytest.mark.usefixtures("unchecked")
def test_times_that_float32_cannot_tell_apart_are_refused_and_nan_is_a_failure():
    x = jnp.ones((3, 2), jnp.float32)
    field = astype(Linear(jnp.asarray(-np.eye(2)), dim=2), jnp.float32)
    late = np.array([1e9, 1e9 + 1, 1e9 + 2])
    for times in (late, np.stack([late] * 3, axis=1)):
        with pytest.raises(ValueError, match="equal in float32"):
            jcnf.trajectory(field, x, times)
    with pytest.raises(ValueError, match="monotone for each sample"):
        jcnf.trajectory(field, x, np.array([[2, 0, 1], [0, 1, 2], [1, 2, 3]], np.uint8))
    solve = Solve(solver="euler", step=0.25)
    stats = jax.jit(lambda times: solve_trajectory(field, x, times, solve=solve)[1])
    assert stats(jnp.array([0, jnp.nan, 1.0])).failed.all()
    assert not stats(jnp.array([0, 0.3, 1.0])).failed.any()
