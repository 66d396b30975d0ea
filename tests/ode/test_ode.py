"""jcnf's diffrax solvers and adjoints in `diffeqsolve`: order, gradients, memory, failing rows."""

import itertools
import re
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, astype
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from scipy import linalg

from jcnf import ode
from jcnf.ode import (
    NORMS,
    NUM_BINS,
    OVER_ROWS,
    SOLVERS,
    FreezeFailingRows,
    PlannedSteps,
    Reversible,
    ReversibleAdjoint,
    StepCheckpointAdjoint,
    Unrolled,
    adjoint,
    rms_norm,
    unknown,
)

ORDERS = dict(euler=1, heun=2, midpoint=2, rk4=4, bosh3=3, tsit5=5, dopri5=5, dopri8=8)
EXPLICIT = [name for name, kind in SOLVERS.items() if issubclass(kind, diffrax.AbstractERK)]
FIXED = diffrax.ConstantStepSize()
ADJOINTS = {"checkpoint": StepCheckpointAdjoint(), "reversible": ReversibleAdjoint()}
BOTH = pytest.mark.parametrize("adjoint_name", ADJOINTS)
RNG = np.random.default_rng(0)
ARGS = {"weight": jnp.asarray(RNG.normal(size=(3, 3)))}
START = {
    "x": jnp.asarray(RNG.normal(size=(4, 3))),
    "logdet": jnp.asarray(RNG.normal(size=4)),
    "regularizers": {},
}


class Bernoulli(eqx.Module):
    """y' = y^2 cos t for a complex number y: y = y(0) / (1 - y(0) sin t)."""

    def __call__(self, t, y, args):
        return jnp.stack([y[0] ** 2 - y[1] ** 2, 2 * y[0] * y[1]]) * jnp.cos(t)


class Linear(eqx.Module):
    """y' = A y for every row of y."""

    def __call__(self, t, y, args):
        return y @ args.T


class Wall(eqx.Module):
    """y' = 1, but NaN beyond the wall."""

    def __call__(self, t, y, args):
        return jnp.where(y > args, jnp.nan, jnp.ones_like(y))


class Mixing(eqx.Module):
    """A batched state whose leaves depend on each other, with a weight in `args`."""

    def __call__(self, t, state, args):
        hidden = jnp.tanh(state["x"] @ args["weight"] + jnp.sin(3 * t))
        rate = jnp.sum(hidden**2, axis=1) - jnp.cos(t) * state["logdet"]
        return {"x": hidden - 0.3 * state["x"], "logdet": rate, "regularizers": {}}


class Scripted(diffrax.AbstractStepSizeController):
    """Steps that grow; every third one, and any that is not finite, is rejected and shrunk."""

    grow: float | Float[Array, ""] = 1.5
    shrink: float | Float[Array, ""] = 0.6
    third: int | Int[Array, ""] = 1  # which one of three is rejected; 3 stands for none

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, jnp.zeros((), int)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        leaves = jax.tree.leaves((y1_candidate, y_error))
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
        keep = (state % 3 != self.third) & jnp.all(jnp.stack(finite))
        start = jnp.where(keep, t1, t0)
        end = start + (t1 - t0) * jnp.where(keep, self.grow, self.shrink)
        return keep, start, end, False, state + 1, diffrax.RESULTS.successful

    def times(self, t0, t1, first, max_steps):
        """Return the times at which accepted steps start and end."""
        times, length, sign = [0.0], abs(first), np.sign(first)
        for number in range(max_steps):
            left = abs(t1 - t0) - times[-1]
            length = min(length, left)
            if number % 3 == self.third:
                length *= self.shrink
                continue
            if left < length + 1e-12:
                return t0 + sign * np.array([*times, abs(t1 - t0)])
            times.append(times[-1] + length)
            length *= self.grow
        return t0 + sign * np.array(times)


def adaptive(tolerance, norm=rms_norm):
    return diffrax.PIDController(tolerance, tolerance, norm=norm)


def stepper(adjoint_name, solver):
    """Return the solver for this method under this adjoint."""
    solver = SOLVERS[solver]()
    if adjoint_name == "reversible":
        return Reversible(solver)
    return Unrolled(solver) if isinstance(solver, diffrax.AbstractERK) else solver


class Solved(NamedTuple):
    """The final state of a solve, and its statistics."""

    y: Any
    t: Float[Array, ""]
    steps: Int[Array, ""]
    rejected: Int[Array, ""]
    step_plan: Float[Array, " parts"]
    solver_state: Any


def solve(
    adjoint_name,
    field,
    y0,
    args,
    t0,
    t1,
    first,
    solver="dopri5",
    controller=FIXED,
    max_steps=64,
    freeze=lambda solver, end, max_steps: solver,
):
    t0, t1, first = (jnp.asarray(t) for t in (t0, t1, first))
    end = jnp.where(t0 < t1, 1, -1).astype(t1.dtype) * t1
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        freeze(stepper(adjoint_name, solver), end=end, max_steps=max_steps),
        t0,
        t1,
        None,
        y0,
        args,
        saveat=diffrax.SaveAt(t1=True, solver_state=True, controller_state=True),
        stepsize_controller=PlannedSteps(controller, jnp.abs(first), unknown(t0.dtype), max_steps),
        adjoint=ADJOINTS[adjoint_name],
        max_steps=max_steps,
        throw=False,
    )
    y, t = jax.tree.map(lambda rows: rows[0], (solution.ys, solution.ts))
    steps, rejected = (solution.stats[f"num_{of}steps"] for of in ("", "rejected_"))
    plan = solution.controller_state.step_plan
    return Solved(y, t, steps, rejected, plan, solution.solver_state)


def total(state):
    """Return a scalar that is nonlinear in every entry of a state."""
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(state))


def assert_close(tree, expected, rtol):
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=rtol)


@BOTH
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_has_the_order_of_its_base_method(adjoint_name, solver):
    order, errors, start = ORDERS[solver], [], 0.5 + 0.5j

    @jax.jit
    def compiled(end, first):
        y0 = jnp.array([start.real, start.imag])
        return solve(adjoint_name, Bernoulli(), y0, None, 0.0, end, first, solver)[:4]

    for end in (2.0, -2.0):
        for count in (8, 16) if order > 5 else (32, 64):
            y, t, steps, rejected = compiled(end, end / count)
            assert (float(t), int(steps), int(rejected)) == (end, count, 0)
            errors.append(abs(complex(*y) - start / (1 - start * np.sin(end))))
        assert order - 0.3 < np.log2(errors[-2] / errors[-1]) < order + 1


def euler(f, t, h, y):
    return h * f(t, y)


def heun(f, t, h, y):
    k1 = f(t, y)
    return h / 2 * (k1 + f(t + h, y + h * k1))


def bosh3(f, t, h, y):
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + 3 * h / 4, y + 3 * h / 4 * k2)
    return h / 9 * (2 * k1 + 3 * k2 + 4 * k3)


def plain(increment, t, t_next, y, _):
    """Take a step of the method itself."""
    y = y + increment(t, t_next - t, y)
    return y, y


def coupled(increment, t, t_next, y, z, lam=0.999):
    """Take a reversible step as written in the paper."""
    y = lam * y + (1 - lam) * z + increment(t, t_next - t, z)
    return y, z - increment(t_next, t - t_next, y)


@partial(jax.jit, static_argnums=(0, 1))
def by_plain_reverse_mode(step, increment, times):
    """Return value and gradient of `total` after these steps, with all states stored."""

    def loss(y0, args):
        y0, unravel = ravel_pytree(y0)

        def field(t, y):
            return ravel_pytree(Mixing()(t, unravel(y), args))[0]

        def body(state, interval):
            t, t_next = interval
            state_next = step(partial(increment, field), t, t_next, *state)
            return jax.tree.map(partial(jnp.where, t != t_next), state_next, state), None

        (y, _), _ = jax.lax.scan(body, (y0, y0), (times[:-1], times[1:]))
        return total(unravel(y))

    return jax.value_and_grad(loss, argnums=(0, 1))(START, ARGS)


# Numbers of steps around those at which the buffer of kept states is full.
COUNTS = (1, 31, 32, 33, 63, 64, 65, 125, 126, 128, 200)
CONTROLS = {
    "steady": {"grow": 1.0, "shrink": 1.0, "third": 3},
    "bumpy": {"grow": 1.25, "shrink": 0.64, "third": 1},
    "rejected first": {"grow": 1.1, "shrink": 0.5, "third": 0},
}


@pytest.mark.parametrize(
    ("adjoint_name", "step", "increment", "max_steps"),
    [
        ("reversible", coupled, euler, 37),
        ("reversible", coupled, bosh3, 37),
        ("checkpoint", plain, euler, 37),
        ("checkpoint", plain, heun, 201),
        *(("checkpoint", plain, bosh3, most) for most in (1, 64, 201)),
    ],
)
def test_gradient_is_that_of_plain_reverse_mode_through_the_same_steps(
    adjoint_name, step, increment, max_steps
):
    @jax.jit
    def compiled(t0, t1, first, controller):
        @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def loss(y0, args):
            settings = increment.__name__, controller, max_steps
            y, *stats = solve(adjoint_name, Mixing(), y0, args, t0, t1, first, *settings)
            return total(y), stats

        return loss(START, ARGS)

    cases = [("steady", count) for count in (*COUNTS, max_steps) if count <= max_steps + 1]
    cases += [("bumpy", max_steps), ("bumpy", max_steps / 2), ("rejected first", 20)]
    # The times stay within [1, 2], where they add up without rounding: diffrax takes steps down to
    # 100 ulp.
    for (control, count), (t0, t1) in zip(cases, itertools.cycle([(1.05, 1.95), (1.95, 1.05)])):
        first, settings = (t1 - t0) / count, CONTROLS[control]
        times = Scripted(**settings).times(t0, t1, first, max_steps)
        script = Scripted(**jax.tree.map(jnp.asarray, settings))
        (value, (t, steps, rejected, *_)), gradient = compiled(t0, t1, first, script)
        assert int(steps - rejected) == len(times) - 1
        assert (int(rejected) > 0) == (settings["third"] < min(int(steps), 3))
        assert float(t) == pytest.approx(times[-1], rel=1e-12)
        moved, times = len(times) > 1, np.pad(times, (0, 202 - len(times)), mode="edge")
        assert_close((value, gradient), by_plain_reverse_mode(step, increment, times), rtol=1e-11)
        assert (np.max(np.abs(gradient[1]["weight"])) > 1e-3) == moved


def test_walking_back_reversibly_finds_the_start_and_passes_over_rejected_steps():
    solver, term = Reversible(diffrax.Bosh3()), diffrax.ODETerm(Mixing())

    @jax.jit
    def there_and_back(t0, t1):
        solution = diffrax.diffeqsolve(
            *(term, solver, t0, t1, (t1 - t0) / 40, START, ARGS),
            saveat=diffrax.SaveAt(t0=True, steps=True, solver_state=True),
            stepsize_controller=Scripted(),
            max_steps=64,
        )
        times, accepted = solution.ts, solution.stats["num_accepted_steps"]
        end = jax.tree.map(lambda rows: rows[accepted], solution.ys), solution.solver_state

        def back(i, state):
            y1, z1 = state
            t0, t1 = times[accepted - 1 - i], times[accepted - i]
            y0, _, z0, _ = solver.backward_step(term, t0, t1, y1, ARGS, (), z1, False)
            return y0, z0

        return solution.stats, times, end, jax.lax.fori_loop(0, accepted, back, end)

    for ends in ((0.2, 3.0), (3.0, 0.2)):
        stats, times, (y, _), start = there_and_back(*(jnp.asarray(t) for t in ends))
        accepted = int(stats["num_accepted_steps"])
        assert (float(times[0]), float(times[accepted])) == ends
        assert np.all(np.diff(times[: accepted + 1]) * (ends[1] - ends[0]) > 0)
        assert 0 < accepted < int(stats["num_steps"])
        assert_close(start, (START, START), rtol=1e-10)
        assert np.max(np.abs(y["x"] - START["x"])) > 0.1


@pytest.mark.parametrize(
    ("adjoint_name", "step", "increment"),
    [("checkpoint", plain, heun), ("reversible", coupled, bosh3)],
)
def test_gradient_of_what_the_terms_hold_is_that_of_the_same_in_args(adjoint_name, step, increment):
    @jax.jit
    @jax.grad
    def compiled(held):
        settings = 1.05, 1.95, 0.1, increment.__name__
        return total(solve(adjoint_name, eqx.Partial(_of_terms, held), START, {}, *settings).y)

    times = np.pad(np.linspace(1.05, 1.95, 10), (0, 192), mode="edge")
    assert_close(compiled(ARGS), by_plain_reverse_mode(step, increment, times)[1][1], rtol=1e-11)


def _of_terms(held, t, y, args):
    return Mixing()(t, y, held | args)


@BOTH
def test_gradient_through_rejected_steps_is_the_finite_difference(adjoint_name):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compiled(y0, args):
        settings = 1.9, 0.2, -0.1, "heun", Scripted()
        y, *stats = solve(adjoint_name, Mixing(), y0, args, *settings)
        return total(y), stats

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (START, ARGS))

    def at(step):
        moved = jax.tree.map(lambda a, d: a + step * d, (START, ARGS), direction)
        return float(compiled(*moved)[0][0])

    (_, (t, steps, rejected, *_)), gradient = compiled(START, ARGS)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    slope, h = float(sum(jax.tree.leaves(products))), 3e-4
    by_difference = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
    assert float(t) == 0.2
    assert 1 < int(rejected) < int(steps)
    assert abs(slope) > 0.1
    assert slope == pytest.approx(by_difference, rel=1e-9)


@BOTH
def test_adaptive_solve_and_gradient_of_a_linear_field_are_exact(adjoint_name):
    start, weights = np.array(START["x"]), RNG.normal(size=(4, 3))
    controller = adaptive(1e-10)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compiled(y0, matrix, t0, t1):
        y, *stats = solve(
            adjoint_name,
            Linear(),
            y0,
            matrix,
            t0,
            t1,
            (t1 - t0) / 2,
            controller=controller,
            max_steps=256,
        )
        return jnp.sum(weights * y), stats

    for t0, t1 in ((0.0, 1.2), (1.2, 0.0)):
        (value, (t, steps, rejected, *_)), (y_bar, matrix_bar) = compiled(start, MATRIX, t0, t1)
        propagator = linalg.expm((t1 - t0) * MATRIX)
        pulled = linalg.expm_frechet((t1 - t0) * MATRIX.T, (t1 - t0) * weights.T @ start)[1]
        assert float(t) == t1
        assert 0 < int(rejected) < int(steps)
        assert float(value) == pytest.approx(np.sum(weights * (start @ propagator.T)), rel=1e-8)
        np.testing.assert_allclose(y_bar, weights @ propagator, rtol=1e-8)
        np.testing.assert_allclose(matrix_bar, pulled, rtol=1e-7)


def test_a_reversible_step_over_the_wall_that_only_z_meets_is_refused():
    # Euler's slope for y is taken before the wall, and the slope for z at y, beyond it.
    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def compiled(y0):
        settings = 1.3, 0.0, 2.0, 0.1, "euler", Scripted()
        solved = solve("reversible", Wall(), y0, *settings)
        return jnp.sum(solved.y), solved[:4]

    (_, (y, t, steps, _)), y_bar = compiled(jnp.zeros(2))
    assert (1.2 < float(t) < 1.3, int(steps)) == (True, 64)
    np.testing.assert_allclose((y, y_bar), (np.full(2, float(t)), np.ones(2)), rtol=1e-12)


def gradient_program(adjoint_name, max_steps):
    def loss(matrix, x):
        settings = 0.0, 1.0, 1 / max_steps, "bosh3"
        return total(solve(adjoint_name, Linear(), x, matrix, *settings, max_steps=max_steps)[0])

    return jax.jit(jax.grad(loss)).lower(ARGS["weight"], jnp.zeros((64, 3))).compile()


def growth(few, many):
    return many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes


def test_reversible_memory_grows_by_the_times_alone_and_evaluations_are_as_promised():
    few, many = (gradient_program("reversible", most) for most in (20, 1280))
    assert 0 <= growth(few, many) <= 3 * 8 * 1260
    # 6 products in the forward pass and 6 to invert the step. The vjp computes the same 6 again,
    # but XLA reuses the first and drops the last, which nobody reads. Its backward pass takes 2 for
    # each, one for y and one for the matrix.
    assert many.as_text().count(" dot(") == 6 + 6 + 4 + 6 * 2


def test_stepwise_memory_grows_by_one_segment_and_evaluations_are_as_promised():
    few, some, many = (gradient_program("checkpoint", most) for most in (32, 64, 4096))
    segment, state = 4096 // ode.MIN_KEPT_STATES, 2 * 64 * 3 * 8  # y and its slope
    assert 0 < growth(some, many) <= segment * state + 3 * 8 * 4032 < 4096 * state / 20
    # 1 product at the start and 3 per step. The backward pass recomputes 2 of the step's 3 (the
    # value of the last is not used), and takes 2 for each of the 3. Recomputing missing states
    # takes 3 more.
    products = [program.as_text().count(" dot(") for program in (few, some, many)]
    assert products == [4 + 2 + 2 * 3, 4 + 2 + 2 * 3 + 3, 4 + 2 + 2 * 3 + 3]
    # For very many steps, memory grows as their square root: of 10^6 states, 1000 are kept, and at
    # most 1024 between two of them are recomputed.
    most = gradient_program("checkpoint", 10**6)
    assert growth(some, most) <= (1000 + 1024) * state + 3 * 8 * 10**6


def test_a_solve_that_is_not_differentiated_keeps_no_states():
    def end(x):
        settings = 0.0, 1.0, 0.01, "bosh3"
        solved = solve("checkpoint", Linear(), x, MATRIX, *settings, max_steps=128)
        return total(solved.y)

    states = f"{ode.MIN_KEPT_STATES + 1}x64x3x"
    programs = [jax.jit(f).lower(jnp.zeros((64, 3))).as_text() for f in (end, jax.grad(end))]
    assert [states in program for program in programs] == [False, True]


@pytest.mark.parametrize("max_steps", [1, 5, 32, 33, 64, 300, 1100])
def test_states_are_kept_at_the_least_stride_that_has_room(max_steps):
    def tried_twice(kept, number):
        state = jnp.stack([number, -number]).astype(float)
        kept = adjoint._keep(adjoint._keep(kept, number, state), number, state)
        return kept, kept

    places, numbers = adjoint._places(max_steps), jnp.arange(max_steps, dtype=jnp.int32)
    _, kept = jax.lax.scan(tried_twice, adjoint._room(jnp.zeros(2), max_steps), numbers)
    strides = [next(2**i for i in range(9) if places * 2**i > n) for n in range(max_steps)]
    np.testing.assert_array_equal(kept.stride, strides)
    assert strides[-1] == adjoint._longest_stride(places, max_steps)
    kept = jax.tree.map(np.asarray, kept)
    for number, stride in enumerate(strides):
        held, rows = jax.tree.map(lambda leaf, n=number: leaf[n], (kept.numbers, kept.states))
        expected = np.arange(0, number + 1, stride)
        assert (len(held), len(rows)) == (places, places + 1)
        np.testing.assert_array_equal(np.sort(held[held >= 0]), expected)
        np.testing.assert_array_equal(rows[:-1][held >= 0], np.outer(held[held >= 0], [1, -1]))


@BOTH
def test_the_step_plan_tells_how_many_steps_of_the_right_size_each_part_has(adjoint_name):
    @jax.jit
    def compiled(t0, t1, first, controller):
        return solve(adjoint_name, Mixing(), START, ARGS, t0, t1, first, "heun", controller)

    edges = np.linspace(0, 1, NUM_BINS + 1)
    for t0, t1 in ((0.2, 1.9), (1.9, 0.2)):
        first = (t1 - t0) / 40
        for third, grow in ((1, 1.5), (0, 1.5), (3, 1.0), (3, 0.99)):
            script = Scripted(jnp.asarray(grow), jnp.asarray(0.6), jnp.asarray(third))
            solved = compiled(t0, t1, first, script)
            times = script.times(t0, t1, first, 64)
            assert (float(solved.t), int(solved.steps - solved.rejected)) == (t1, len(times) - 1)
            assert (int(solved.rejected) > 0) == (third < 3)
            # After a step of length h the controller proposes grow * h, so it counts as 1 / grow.
            counts = np.arange(len(times)) / grow
            expected = np.diff(np.interp(edges, (times - t0) / (t1 - t0), counts))
            np.testing.assert_allclose(solved.step_plan, expected, rtol=1e-9)


def test_the_step_plan_is_of_the_sizes_that_diffrax_chooses_next():
    @eqx.filter_jit
    def both(t0, t1, first, controller):
        """Return this solve, and diffrax's solution with all accepted steps."""
        problem = t0, t1, first, START, ARGS
        own = solve("checkpoint", Mixing(), START, ARGS, *problem[:3], controller=controller)
        return own, diffrax.diffeqsolve(
            diffrax.ODETerm(Mixing()),
            diffrax.Dopri5(),
            *problem,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(t0=True, steps=True),
            max_steps=64,
        )

    edges = np.linspace(0, 1, NUM_BINS + 1)
    for t0, t1, tolerance in ((1.0, 1.9, 1e-8), (1.0, 0.2, 1e-5)):
        ends = jnp.asarray(t0), jnp.asarray(t1), jnp.asarray((t1 - t0) / 50)
        solved, solution = both(*ends, adaptive(jnp.asarray(tolerance)))
        taken = int(solution.stats["num_accepted_steps"])
        assert int(solved.steps) == taken > 4
        assert int(solved.rejected) == int(solution.stats["num_rejected_steps"]) == 0
        # The right size of a step is the size of the next one, except where t1 cuts that short.
        shares = (np.asarray(solution.ts)[: taken - 1] - t0) / (t1 - t0)
        sizes = np.diff(solution.ts[:taken])
        counts = np.append(0, np.cumsum(sizes[:-1] / sizes[1:]))
        within = edges[edges <= shares[-1]]
        expected = np.diff(np.interp(within, shares, counts))
        assert len(expected) > NUM_BINS // 4
        np.testing.assert_allclose(solved.step_plan[: len(expected)], expected, rtol=1e-9)


@eqx.filter_jit
def train(adjoint_name, weight, args, state):
    """Take two gradient steps in a while loop; return the weight and the last solve's results."""

    def loss(weight):
        interval = [jnp.asarray(t, weight.dtype) for t in (0.0, 1.0, 0.25)]
        settings = *interval, "heun", adaptive(1e-3)
        solved = solve(adjoint_name, Mixing(), state, args | {"weight": weight}, *settings)
        return total(solved[0]["x"]), solved[:2]  # no cotangent for the rest of the state

    def body(carry):
        i, weight, *_ = carry
        (value, (y, t)), slope = jax.value_and_grad(loss, has_aux=True)(weight)
        return i + 1, weight - 0.1 * slope, value, y, t

    zero = jnp.zeros((), weight.dtype)
    start = (0, weight, zero, state, zero)
    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, start)[1:]


@BOTH
def test_any_args_in_a_while_loop_in_either_dtype(adjoint_name):
    args = {"rate": 2.0, "none": None, "call": jnp.tanh, "key": jr.key(0), "name": "a field"}
    args |= {"counts": jnp.arange(3), "flags": np.array([True]), "empty": {}}
    weight, _, y, t = in64 = train(adjoint_name, ARGS["weight"], args, START)
    in32 = train(adjoint_name, *astype((ARGS["weight"], args, START), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(in32)} == {np.dtype("float32")}
    assert_close(in32, in64, rtol=1e-4)
    assert float(t) == 1.0
    assert y["regularizers"] == {}
    assert np.max(np.abs(weight - ARGS["weight"])) > 0.01


class Rows(eqx.Module):
    """Each row of y follows a sine at its own rate, with a cubic term, and NaN below -2.

    All rows share the height of the sine. With sign -1 they do the same in -t.
    """

    def __call__(self, t, y, args):
        sign, rate, cubic, height = (args[name] for name in ("sign", "rate", "cubic", "height"))
        slope = rate * (height * jnp.sin(sign * t) - y) + cubic * y**3
        return sign * jnp.where(y < -2, jnp.nan, slope)


def rows(count, dtype=float):
    """Return y0 and args of a batch whose rows are all easy to solve."""
    rng = np.random.default_rng(2)
    y0, rate = rng.uniform(-1, 1, (count, 2)), rng.uniform(0.5, 3, (count, 1))
    args = {"rate": rate, "cubic": np.full((count, 1), 0.3), "height": np.array(1.0)}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (y0, args))


def set_row(problem, row, y0=None, **numbers):
    y, args = problem
    if y0 is not None:
        y = y.at[row].set(jnp.asarray(y0, y.dtype))
    return y, args | {name: args[name].at[row].set(number) for name, number in numbers.items()}


BY_STATE = {  # rows that fail because of their initial state
    2: {"y0": -2.5},
    5: {"y0": -1.9, "rate": 0.5},  # NaN from t = 0.1 on
    7: {"y0": 30.0},  # blows up at once
    8: {"y0": 1.7, "rate": 0.5},  # blows up later
    12: {"y0": np.array([0.0, 30.0])},
}
BY_ARGS = {  # rows that fail because of their args
    1: {"rate": jnp.nan},
    3: {"rate": 1e8},
    6: {"y0": 0.0, "rate": 1e8},
    10: {"y0": 30.0, "cubic": 1.0},
    11: {"y0": 1.0, "rate": 0.0, "cubic": 1.0},  # blows up at t = 1/2
}


def with_failing(kinds, dtype=float):
    """Return a batch with failing rows, the batch without them, and a mask of the good rows."""
    problem = rows(16, dtype)
    good = np.array([row not in kinds for row in range(16)])
    alone = jax.tree.map(lambda leaf: leaf[good] if leaf.ndim else leaf, problem)
    for row, numbers in kinds.items():
        problem = set_row(problem, row, **numbers)
    return problem, alone, good


def solve_rows(
    problem,
    sign,
    over_rows,
    tolerance,
    adjoint_name="checkpoint",
    *,
    field=Rows(),  # noqa: B008
    controller=None,
    max_steps=1024,
):
    """Solve from 0 to `sign` with `FreezeFailingRows`."""
    (y0, args), zero = problem, jnp.zeros((), problem[0].dtype)
    if controller is None:
        [name] = [name for name, function in OVER_ROWS.items() if function is over_rows]
        controller = adaptive(tolerance, NORMS[name])
    freeze = partial(FreezeFailingRows, rtol=tolerance, atol=tolerance, over_rows=over_rows)
    problem = field, y0, args | {"sign": sign}, zero, zero + sign, zero + 0.1
    settings = {"controller": controller, "max_steps": max_steps, "freeze": freeze}
    return solve(adjoint_name, *problem, **settings)


compiled_rows = eqx.filter_jit(solve_rows)
OVER = pytest.mark.parametrize("over_rows", OVER_ROWS.values(), ids=OVER_ROWS)
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])


@OVER
@DTYPES
def test_rows_that_cannot_be_solved_fail_alone_and_hold_up_no_others(over_rows, dtype):
    for sign, value in itertools.product((1.0, -1.0), (1e-4, 1e-6)):
        sign, tolerance = (jnp.asarray(number, dtype) for number in (sign, value))
        *problems, good = with_failing(BY_STATE | BY_ARGS, dtype)
        solved, alone = (compiled_rows(p, sign, over_rows, tolerance) for p in problems)
        assert float(solved.t) == float(alone.t) == float(sign)
        np.testing.assert_array_equal(solved.solver_state.failed, ~good)
        assert not np.any(alone.solver_state.failed)
        assert np.all(np.isfinite(solved.y))
        np.testing.assert_allclose(solved.y[good], alone.y, atol=5 * value)
        # Three rows fail after the start, and finding each of them takes 20 to 30 steps.
        assert int(solved.steps) <= int(alone.steps) + 100


@eqx.filter_jit
def gradient_of_rows(adjoint_name, over_rows, problem, sign):
    """Return value and gradient of a loss of the good rows, and which rows failed."""

    @partial(jax.value_and_grad, has_aux=True)
    def loss(problem):
        solved = solve_rows(problem, sign, over_rows, 1e-9, adjoint_name)
        failed = solved.solver_state.failed
        return jnp.sum(jnp.where(failed[:, None], 0, jnp.sin(solved.y))), failed

    return loss(problem)


# Without the rows whose args make the field bad at any state: shared gradients would be NaN.
GOOD_AT_SOME_STATES = {row: BY_ARGS[row] for row in (10, 11)}


@pytest.mark.parametrize(
    ("adjoint_name", "over_rows", "kinds"),
    [
        ("checkpoint", jnp.mean, BY_STATE),
        pytest.param("reversible", jnp.max, GOOD_AT_SOME_STATES, marks=pytest.mark.slow),
        pytest.param("checkpoint", jnp.mean, GOOD_AT_SOME_STATES, marks=pytest.mark.slow),
        pytest.param("reversible", jnp.max, BY_STATE, marks=pytest.mark.slow),
    ],
)
def test_gradient_with_failed_rows_masked_is_that_of_the_batch_without_them(
    adjoint_name, over_rows, kinds
):
    *problems, good = with_failing(kinds)
    for sign in (1.0, -1.0):
        ((value, failed), gradient), ((alone, _), expected) = (
            gradient_of_rows(adjoint_name, over_rows, problem, jnp.asarray(sign))
            for problem in problems
        )
        np.testing.assert_array_equal(failed, ~good)
        assert float(value) == pytest.approx(float(alone), abs=1e-6)
        assert min(np.min(np.abs(leaf)) for leaf in (expected[0], expected[1]["height"])) > 1e-3
        of_good = jax.tree.map(lambda leaf: leaf[good] if leaf.ndim else leaf, gradient)
        assert_close(of_good, expected, rtol=1e-6)
        of_failed = jax.tree.map(lambda leaf: leaf[~good] if leaf.ndim else 0, gradient)
        assert_close(of_failed, jax.tree.map(np.zeros_like, of_failed), rtol=0)


class Wave(eqx.Module):
    """y' = w cos(w t) in each row: from 0, y = sin(w t)."""

    def __call__(self, t, y, args):
        return args["w"] * jnp.cos(args["w"] * t)


@OVER
def test_a_row_that_needs_ten_to_fifty_times_the_steps_of_the_others_does_not_fail(over_rows):
    w, steps = jnp.linspace(2.0, 3.0, 16)[:, None], []
    for sign, fast in itertools.product((1.0, -1.0), (2.0, 60.0, 100.0, 150.0)):
        args = {"w": w.at[3].set(fast)}
        problem = jnp.zeros((16, 1)), args
        solved = compiled_rows(problem, jnp.asarray(sign), over_rows, 1e-5, field=Wave())
        assert float(solved.t) == sign
        assert not np.any(solved.solver_state.failed)
        np.testing.assert_allclose(solved.y, np.sin(sign * args["w"]), atol=1e-4)
        steps.append(int(solved.steps))
    assert 10 * steps[0] < steps[1] < steps[2] < steps[3] < 50 * steps[0]


@OVER
@DTYPES
def test_a_solve_of_which_all_rows_fail_ends_at_t1_with_all_of_them_flagged(over_rows, dtype):
    sign, tolerance = jnp.asarray(1, dtype), jnp.asarray(1e-4, dtype)
    for kind in (*BY_STATE.values(), *BY_ARGS.values()):
        problem = rows(16, dtype)
        for row in range(16):
            problem = set_row(problem, row, **kind)
        solved = compiled_rows(problem, sign, over_rows, tolerance)
        assert np.all(solved.solver_state.failed)
        assert float(solved.t) == 1
        assert int(solved.steps) < 100


@DTYPES
def test_fixed_steps_fail_the_rows_that_are_not_finite_alone(dtype):
    step, good = jnp.asarray(0.1, dtype), np.delete(np.arange(16), [2, 5])
    alone = problem = rows(16, dtype)
    for row in (2, 5):
        problem = set_row(problem, row, **BY_STATE[row])
    for sign in (1.0, -1.0):
        sign = jnp.asarray(sign, dtype)
        solved, expected = (
            compiled_rows(p, sign, None, step, controller=FIXED, max_steps=16)
            for p in (problem, alone)
        )
        assert int(solved.steps) == int(expected.steps)
        assert float(solved.t) == float(sign)
        assert np.flatnonzero(solved.solver_state.failed).tolist() == [2, 5]
        np.testing.assert_array_equal(solved.y[good], expected.y[good])
        assert np.all(np.isfinite(solved.y))


@OVER
@DTYPES
@pytest.mark.parametrize("spread", [0.01, 0.2])
def test_a_batch_whose_every_row_is_stiff_does_not_fail(spread, over_rows, dtype):
    y0, args = rows(16, dtype)
    # All rows are about equally stiff; stability limits the step to 3.3 / rate.
    args["rate"] = jnp.linspace(900 * (1 - spread), 900 * (1 + spread), 16, dtype=dtype)[:, None]
    for sign in (1.0, -1.0):
        sign = jnp.asarray(sign, dtype)
        solved = compiled_rows((y0, args), sign, over_rows, jnp.asarray(1e-4, dtype))
        assert float(solved.t) == float(sign)
        assert int(solved.steps) > 300
        assert not np.any(solved.solver_state.failed)
        np.testing.assert_allclose(solved.y, np.sin(1), atol=2e-3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("bosh3", "dopri5") else pytest.mark.slow)
        for name in EXPLICIT
    ],
)
def test_unrolled_gives_what_diffrax_s_own_solver_does(name):
    own, term, times = SOLVERS[name](), diffrax.ODETerm(Mixing()), jnp.linspace(0.2, 1.9, 9)

    @jax.jit
    def compiled(times):
        return tuple(solved(solver, times) for solver in (Unrolled(own), own))

    def solved(solver, times):
        t0, t1 = times[0], times[-1]
        solution = diffrax.diffeqsolve(
            *(term, solver, t0, t1, (t1 - t0) / 5, START, ARGS),
            saveat=diffrax.SaveAt(ts=times, t1=True),
            stepsize_controller=FIXED,
            max_steps=16,
        )
        # After a jump, the slope from the end of the last step must not be used.
        state = solver.init(term, t0, t1, jax.tree.map(jnp.zeros_like, START), ARGS)
        step = solver.step(term, t0, t0 + 0.3 * (t1 - t0), START, ARGS, state, made_jump=True)
        return solution.ys, step[:2]

    for ends in (times, times[::-1]):
        ours, expected = compiled(ends)
        assert_close(ours, expected, rtol=1e-13)
        error = np.max(np.abs(ours[1][1]["x"]))
        assert (error > 1e-6) == bool(np.any(own.tableau.b_error))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saveat": diffrax.SaveAt(ts=[0.5])}, "StepCheckpointAdjoint differentiates only the"),
        ({"saveat": diffrax.SaveAt(t0=True, t1=True)}, "use SaveAt(t1=True), or Recursive"),
        ({"saveat": diffrax.SaveAt(dense=True)}, "only the state at t1: use SaveAt(t1=True)"),
        ({"max_steps": None}, "StepCheckpointAdjoint needs an integer max_steps and no event; got"),
        ({"event": diffrax.Event(lambda t, y, args, **_: t > 1)}, "and no event; got max_steps=16"),
        (
            {"adjoint": ReversibleAdjoint(), "saveat": diffrax.SaveAt(steps=True)},
            "ReversibleAdjoint differentiates only the state at t1",
        ),
        ({"adjoint": ReversibleAdjoint()}, "ReversibleAdjoint needs a reversible solver; got Heun"),
    ],
)
def test_errors_say_what_is_wrong(settings, message):
    settings = {"adjoint": StepCheckpointAdjoint(), "max_steps": 16} | settings
    problem = diffrax.ODETerm(Bernoulli()), diffrax.Heun(), 0.0, 1.0, 0.1, jnp.ones(2)
    with pytest.raises(ValueError, match=re.escape(message)):
        diffrax.diffeqsolve(*problem, **settings)


@pytest.mark.parametrize("coupling", [0.0, 1.5])
def test_a_coupling_out_of_range_is_refused(coupling):
    with pytest.raises(ValueError, match=f"above 0 and at most 1; got {coupling}"):
        Reversible(diffrax.Heun(), coupling)
