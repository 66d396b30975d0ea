"""Runge-Kutta solves: their order, exact gradients, what they keep, their memory, and failure."""

import itertools
import re
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix
import pytest
from helpers import MATRIX, astype
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int
from scipy import linalg

from jcnf.norms import batch_norm
from jcnf.runge_kutta import (
    PARTS,
    integrate_reversibly,
    integrate_stepwise,
    reversible,
    stepwise,
    unknown,
)
from jcnf.solve import SOLVERS

ORDERS = dict(euler=1, heun=2, midpoint=2, rk4=4, bosh3=3, tsit5=5, dopri5=5, dopri8=8)
FIXED = diffrax.ConstantStepSize()
BOTH = pytest.mark.parametrize("integrate", [integrate_reversibly, integrate_stepwise])
RNG = np.random.default_rng(0)
ARGS = {"weight": jnp.asarray(RNG.normal(size=(3, 3)))}
START = {
    "x": jnp.asarray(RNG.normal(size=(4, 3))),
    "logdet": jnp.asarray(RNG.normal(size=4)),
    "penalties": {},
}


class Bernoulli(eqx.Module):
    """y' = y^2 cos t in the plane of complex numbers: y = y(0) / (1 - y(0) sin t)."""

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
    """A whole batch's state, leaves that feed each other, and a weight in `args`."""

    def __call__(self, t, state, args):
        hidden = jnp.tanh(state["x"] @ args["weight"] + jnp.sin(3 * t))
        rate = jnp.sum(hidden**2, axis=1) - jnp.cos(t) * state["logdet"]
        return {"x": hidden - 0.3 * state["x"], "logdet": rate, "penalties": {}}


class Scripted(diffrax.AbstractStepSizeController):
    """Steps that grow; rejected, and shrunk, are one in three and those whose end is not finite."""

    grow: float | Float[Array, ""] = 1.5
    shrink: float | Float[Array, ""] = 0.6
    third: int | Int[Array, ""] = 1  # which of the three; none of them is number 3

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, 0

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(y1_candidate)]
        keep = (state % 3 != self.third) & jnp.all(jnp.stack(finite))
        start = jnp.where(keep, t1, t0)
        end = start + (t1 - t0) * jnp.where(keep, self.grow, self.shrink)
        return keep, start, end, False, state + 1, diffrax.RESULTS.successful

    def times(self, t0, t1, first, max_steps):
        """When the steps that are accepted start and end."""
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


def adaptive(tolerance, norm=batch_norm):
    return diffrax.PIDController(tolerance, tolerance, norm, dtmin=1e-14, force_dtmin=False)


def solve(
    integrate, field, y0, args, t0, t1, first, solver="dopri5", controller=FIXED, max_steps=64
):
    t0, t1, first = (jnp.asarray(t) for t in (t0, t1, first))
    return integrate(
        field,
        y0,
        args,
        t0,
        t1,
        first,
        unknown(t0.dtype),
        solver=SOLVERS[solver](),
        controller=controller,
        max_steps=max_steps,
    )


def total(state):
    """A nonlinear number of every entry of a state."""
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(state))


def assert_close(tree, expected, rtol):
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=rtol)


@BOTH
@pytest.mark.parametrize("solver", SOLVERS)
def test_it_has_the_order_of_its_base_method(integrate, solver):
    order, errors, start = ORDERS[solver], [], 0.5 + 0.5j

    @jax.jit
    def compiled(end, first):
        y0 = jnp.array([start.real, start.imag])
        return solve(integrate, Bernoulli(), y0, None, 0.0, end, first, solver)[:4]

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
    """A step of the method itself."""
    y = y + increment(t, t_next - t, y)
    return y, y


def coupled(increment, t, t_next, y, z, lam=0.999):
    """A reversible step, as the paper writes it."""
    y = lam * y + (1 - lam) * z + increment(t, t_next - t, z)
    return y, z - increment(t_next, t - t_next, y)


@partial(jax.jit, static_argnums=(0, 1))
def by_plain_reverse_mode(step, increment, times):
    """Value and gradient of `total` after these steps, all of them stored."""

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


# Steps around where the states that are kept have no more room.
COUNTS = (1, 31, 32, 33, 63, 64, 65, 125, 126, 128, 200)
CONTROLS = {
    "steady": {"grow": 1.0, "shrink": 1.0, "third": 3},
    "bumpy": {"grow": 1.25, "shrink": 0.64, "third": 1},
    "rejected first": {"grow": 1.1, "shrink": 0.5, "third": 0},
}


@pytest.mark.parametrize(
    ("integrate", "step", "increment", "max_steps"),
    [
        (integrate_reversibly, coupled, euler, 37),
        (integrate_reversibly, coupled, bosh3, 37),
        (integrate_stepwise, plain, euler, 37),
        (integrate_stepwise, plain, heun, 201),
        *((integrate_stepwise, plain, bosh3, most) for most in (1, 32, 64, 128, 201)),
    ],
)
def test_gradient_is_that_of_plain_reverse_mode_through_the_same_steps(
    integrate, step, increment, max_steps
):
    @jax.jit
    def compiled(t0, t1, first, controller):
        @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def loss(y0, args):
            settings = increment.__name__, controller, max_steps
            y, *stats = solve(integrate, Mixing(), y0, args, t0, t1, first, *settings)
            return total(y), stats

        return loss(START, ARGS)

    cases = [("steady", count) for count in (*COUNTS, max_steps) if count <= max_steps + 1]
    cases += [("bumpy", max_steps), ("bumpy", max_steps / 2), ("rejected first", 20)]
    for (control, count), (t0, t1) in zip(cases, itertools.cycle([(0.2, 1.9), (1.9, 0.2)])):
        first, settings = (t1 - t0) / count, CONTROLS[control]
        times = Scripted(**settings).times(t0, t1, first, max_steps)
        script = Scripted(**jax.tree.map(jnp.asarray, settings))
        (value, (t, steps, rejected, _)), gradient = compiled(t0, t1, first, script)
        assert int(steps - rejected) == len(times) - 1
        assert (int(rejected) > 0) == (settings["third"] < min(int(steps), 3))
        assert float(t) == pytest.approx(times[-1], rel=1e-12)
        moved, times = len(times) > 1, np.pad(times, (0, 202 - len(times)), mode="edge")
        assert_close((value, gradient), by_plain_reverse_mode(step, increment, times), rtol=1e-11)
        assert (np.max(np.abs(gradient[1]["weight"])) > 1e-3) == moved


def test_walking_back_reversibly_finds_the_start_and_every_rejected_step_is_passed_over():
    scheme = reversible._Scheme(Mixing(), diffrax.Bosh3(), 0.999)

    @jax.jit
    def there_and_back(t0, t1):
        first = (t1 - t0) / 40
        settings = first, unknown(float), Scripted(), 64
        loop = reversible._march((START, ARGS), scheme, t0, t1, *settings)
        y, z = loop.state
        return loop, reversible._walk_back(scheme, loop.times, loop.accepted, y, z, y, None, ARGS)

    for ends in ((0.2, 3.0), (3.0, 0.2)):
        loop, (y, z, _, _) = there_and_back(*(jnp.asarray(t) for t in ends))
        times = loop.times[: int(loop.accepted) + 1]
        assert (float(times[0]), float(times[-1])) == ends
        assert np.all(np.diff(times) * (ends[1] - ends[0]) > 0)
        assert 0 < int(loop.accepted) < int(loop.steps)
        assert_close((y, z), (START, START), rtol=1e-10)
        assert np.max(np.abs(loop.state[0]["x"] - START["x"])) > 0.1


@BOTH
def test_gradient_through_rejected_steps_is_the_finite_difference(integrate):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compiled(y0, args):
        settings = 1.9, 0.2, -0.1, "heun", Scripted()
        y, *stats = solve(integrate, Mixing(), y0, args, *settings)
        return total(y), stats

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (START, ARGS))

    def at(step):
        moved = jax.tree.map(lambda a, d: a + step * d, (START, ARGS), direction)
        return float(compiled(*moved)[0][0])

    (_, (t, steps, rejected, _)), gradient = compiled(START, ARGS)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    slope, h = float(sum(jax.tree.leaves(products))), 3e-4
    by_difference = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
    assert float(t) == 0.2
    assert 1 < int(rejected) < int(steps)
    assert abs(slope) > 0.1
    assert slope == pytest.approx(by_difference, rel=1e-9)


@BOTH
def test_adaptive_solve_and_gradient_of_a_linear_field_are_exact(integrate):
    start, weights = np.array(START["x"]), RNG.normal(size=(4, 3))
    controller = adaptive(1e-10)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compiled(y0, matrix, t0, t1):
        y, *stats = solve(
            integrate,
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
        (value, (t, steps, rejected, _)), (y_bar, matrix_bar) = compiled(start, MATRIX, t0, t1)
        propagator = linalg.expm((t1 - t0) * MATRIX)
        pulled = linalg.expm_frechet((t1 - t0) * MATRIX.T, (t1 - t0) * weights.T @ start)[1]
        assert float(t) == t1
        assert 0 < int(rejected) < int(steps)
        assert float(value) == pytest.approx(np.sum(weights * (start @ propagator.T)), rel=1e-8)
        np.testing.assert_allclose(y_bar, weights @ propagator, rtol=1e-8)
        np.testing.assert_allclose(matrix_bar, pulled, rtol=1e-7)


@BOTH
@pytest.mark.parametrize("norm", [batch_norm, optimistix.rms_norm])
def test_failure_ends_the_loop_with_the_last_good_state(integrate, norm):
    controller = adaptive(1e-6, norm)

    @partial(jax.jit, static_argnums=2)
    @partial(jax.value_and_grad, has_aux=True)
    def compiled(y0, wall, max_steps):
        interval, settings = (0.0, 2.0, 0.1), {"controller": controller, "max_steps": max_steps}
        march = solve(integrate, Wall(), y0, wall, *interval, **settings)
        return jnp.sum(march.y), march[:4]

    start = jnp.zeros((2, 1))
    (_, (y, t, steps, rejected)), y_bar = compiled(start, 1.3, 400)
    assert 1.2 < float(t) < 1.3
    np.testing.assert_allclose(y, np.full((2, 1), float(t)), rtol=1e-12)
    np.testing.assert_allclose(y_bar, np.ones((2, 1)), rtol=1e-12)
    assert 5 < int(rejected) < int(steps) < 100

    (_, (y, t, steps, _)), _ = compiled(start, -1.0, 400)
    assert (float(t), int(steps) < 40) == (0.0, True)
    np.testing.assert_array_equal(y, start)

    (_, (y, t, steps, _)), y_bar = compiled(start, 3.0, 1)
    assert (float(t), int(steps)) == (0.1, 1)
    np.testing.assert_allclose(y, np.full((2, 1), 0.1))
    np.testing.assert_allclose(y_bar, np.ones((2, 1)))


def test_a_reversible_step_over_the_wall_that_only_z_meets_is_refused():
    # Euler's slope is taken before the wall, and z's at y, beyond it.
    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def compiled(y0):
        settings = 1.3, 0.0, 2.0, 0.1, "euler", Scripted()
        march = solve(integrate_reversibly, Wall(), y0, *settings)
        return jnp.sum(march.y), march[:4]

    (_, (y, t, steps, _)), y_bar = compiled(jnp.zeros(2))
    assert (1.2 < float(t) < 1.3, int(steps)) == (True, 64)
    np.testing.assert_allclose((y, y_bar), (np.full(2, float(t)), np.ones(2)), rtol=1e-12)


def gradient_program(integrate, max_steps):
    def loss(matrix, x):
        settings = 0.0, 1.0, 1 / max_steps, "bosh3"
        return total(solve(integrate, Linear(), x, matrix, *settings, max_steps=max_steps)[0])

    return jax.jit(jax.grad(loss)).lower(ARGS["weight"], jnp.zeros((64, 3))).compile()


def growth(few, many):
    return many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes


def test_reversible_memory_grows_by_the_times_alone_and_evaluations_are_as_promised():
    few, many = (gradient_program(integrate_reversibly, most) for most in (20, 1280))
    assert 0 <= growth(few, many) <= 3 * 8 * 1260
    # 6 products forwards, 6 backwards with one for y and one for the matrix each, and no more.
    assert many.as_text().count(" dot(") == 6 + 6 * 3


def test_stepwise_memory_grows_by_one_segment_and_evaluations_are_as_promised():
    few, some, many = (gradient_program(integrate_stepwise, most) for most in (32, 64, 4096))
    segment, state = 4096 // stepwise.STATES, 2 * 64 * 3 * 8  # y and its slope
    assert 0 < growth(some, many) <= segment * state + 3 * 8 * 4032 < 4096 * state / 20
    # 1 product at the start and 3 a step; on the way back 2 of the step's 3 anew, the last one's
    # value not being used, and 2 for each vjp; and where states are missing, 3 more.
    products = [program.as_text().count(" dot(") for program in (few, some, many)]
    assert products == [4 + 2 + 2 * 3, 4 + 2 + 2 * 3 + 3, 4 + 2 + 2 * 3 + 3]
    # Of very many steps the root: states of every thousandth, and a thousand between two of them.
    most = gradient_program(integrate_stepwise, 10**6)
    assert growth(some, most) <= (1000 + 1024) * state + 3 * 8 * 10**6


def test_a_solve_that_is_not_differentiated_keeps_no_states():
    def end(x):
        settings = 0.0, 1.0, 0.01, "bosh3"
        march = solve(integrate_stepwise, Linear(), x, MATRIX, *settings, max_steps=128)
        return total(march.y)

    states = f"{stepwise.STATES + 1}x64x3x"
    programs = [jax.jit(f).lower(jnp.zeros((64, 3))).as_text() for f in (end, jax.grad(end))]
    assert [states in program for program in programs] == [False, True]


@pytest.mark.parametrize("max_steps", [1, 5, 32, 33, 64, 300, 1100])
def test_states_are_kept_at_the_least_stride_that_has_room(max_steps):
    scheme = stepwise._Scheme(Bernoulli(), diffrax.Heun(), keeps=True)

    def tried_twice(kept, number):
        state = jnp.stack([number, -number]).astype(float), None
        kept = scheme.kept(scheme.kept(kept, number, state), number, state)
        return kept, kept

    places, numbers = stepwise._places(max_steps), jnp.arange(max_steps, dtype=jnp.int32)
    _, kept = jax.lax.scan(tried_twice, scheme.room(jnp.zeros(2), max_steps), numbers)
    strides = [next(2**i for i in range(9) if places * 2**i > n) for n in range(max_steps)]
    np.testing.assert_array_equal(kept.stride, strides)
    assert strides[-1] == stepwise._longest_stride(places, max_steps)
    kept = jax.tree.map(np.asarray, kept)
    for number, stride in enumerate(strides):
        held, rows = jax.tree.map(lambda leaf, n=number: leaf[n], (kept.numbers, kept.states))
        expected = np.arange(0, number + 1, stride)
        assert (len(held), len(rows)) == (places, places + 1)
        np.testing.assert_array_equal(np.sort(held[held >= 0]), expected)
        np.testing.assert_array_equal(rows[:-1][held >= 0], np.outer(held[held >= 0], [1, -1]))


@BOTH
def test_the_step_plan_tells_how_many_steps_of_the_right_size_each_part_has(integrate):
    @jax.jit
    def compiled(t0, t1, first, controller):
        return solve(integrate, Mixing(), START, ARGS, t0, t1, first, "heun", controller)

    edges = np.linspace(0, 1, PARTS + 1)
    for t0, t1 in ((0.2, 1.9), (1.9, 0.2)):
        first = (t1 - t0) / 40
        for third, grow in ((1, 1.5), (0, 1.5), (3, 1.0), (3, 0.99)):
            script = Scripted(jnp.asarray(grow), jnp.asarray(0.6), jnp.asarray(third))
            march = compiled(t0, t1, first, script)
            times = script.times(t0, t1, first, 64)
            assert (float(march.t), int(march.steps - march.rejected)) == (t1, len(times) - 1)
            assert (int(march.rejected) > 0) == (third < 3)
            # A step of length h says that grow h is right: it is 1 / grow of one that is.
            counts = np.arange(len(times)) / grow
            expected = np.diff(np.interp(edges, (times - t0) / (t1 - t0), counts))
            np.testing.assert_allclose(march.step_plan, expected, rtol=1e-9)


def test_the_step_plan_is_of_the_sizes_that_diffrax_chooses_next():
    @eqx.filter_jit
    def both(t0, t1, first, controller):
        """Our solve, and diffrax's with all steps that it accepts."""
        problem = t0, t1, first, START, ARGS
        own = solve(integrate_stepwise, Mixing(), START, ARGS, *problem[:3], controller=controller)
        return own, diffrax.diffeqsolve(
            diffrax.ODETerm(Mixing()),
            diffrax.Dopri5(),
            *problem,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(t0=True, steps=True),
            max_steps=64,
        )

    edges = np.linspace(0, 1, PARTS + 1)
    for t0, t1, tolerance in ((1.0, 1.9, 1e-8), (1.0, 0.2, 1e-5)):
        ends = jnp.asarray(t0), jnp.asarray(t1), jnp.asarray((t1 - t0) / 50)
        march, solution = both(*ends, adaptive(jnp.asarray(tolerance)))
        taken = int(solution.stats["num_accepted_steps"])
        assert int(march.steps) == taken > 4
        assert int(march.rejected) == int(solution.stats["num_rejected_steps"]) == 0
        # The right size of a step is that of the next, but where that goes no farther than t1.
        shares = (np.asarray(solution.ts)[: taken - 1] - t0) / (t1 - t0)
        sizes = np.diff(solution.ts[:taken])
        counts = np.append(0, np.cumsum(sizes[:-1] / sizes[1:]))
        within = edges[edges <= shares[-1]]
        expected = np.diff(np.interp(within, shares, counts))
        assert len(expected) > PARTS // 4
        np.testing.assert_allclose(march.step_plan[: len(expected)], expected, rtol=1e-9)


@eqx.filter_jit
def train(integrate, weight, args, state):
    """Two gradient steps inside a while loop, and what the last solve gave."""

    def loss(weight):
        interval = [jnp.asarray(t, weight.dtype) for t in (0.0, 1.0, 0.25)]
        settings = *interval, "heun", adaptive(1e-3)
        solved = solve(integrate, Mixing(), state, args | {"weight": weight}, *settings)
        return total(solved[0]["x"]), solved[:2]  # no cotangent for the rest of the state

    def body(carry):
        i, weight, *_ = carry
        (value, (y, t)), slope = jax.value_and_grad(loss, has_aux=True)(weight)
        return i + 1, weight - 0.1 * slope, value, y, t

    zero = jnp.zeros((), weight.dtype)
    start = (0, weight, zero, state, zero)
    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, start)[1:]


@BOTH
def test_any_args_in_a_while_loop_in_either_dtype(integrate):
    args = {"rate": 2.0, "none": None, "call": jnp.tanh, "key": jr.key(0), "name": "a field"}
    args |= {"counts": jnp.arange(3), "flags": np.array([True]), "empty": {}}
    weight, _, y, t = in64 = train(integrate, ARGS["weight"], args, START)
    in32 = train(integrate, *astype((ARGS["weight"], args, START), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(in32)} == {np.dtype("float32")}
    assert_close(in32, in64, rtol=1e-4)
    assert float(t) == 1.0
    assert y["penalties"] == {}
    assert np.max(np.abs(weight - ARGS["weight"])) > 0.01


@pytest.mark.parametrize(
    ("integrate", "settings", "message"),
    [
        *(
            (each, {"solver": diffrax.Kvaerno3()}, "an explicit Runge-Kutta method; got Kvaerno3")
            for each in (integrate_reversibly, integrate_stepwise)
        ),
        *(
            (integrate_reversibly, {"coupling": lam}, f"above 0 and at most 1; got {lam}")
            for lam in (0.0, 1.5)
        ),
    ],
)
def test_errors_say_what_is_wrong(integrate, settings, message):
    settings = {"solver": diffrax.Heun(), "controller": FIXED, "max_steps": 16} | settings
    interval = (jnp.asarray(t) for t in (0.0, 1.0, 0.1))
    with pytest.raises(ValueError, match=re.escape(message)):
        integrate(Bernoulli(), jnp.ones(2), None, *interval, unknown(float), **settings)
