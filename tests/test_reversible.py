"""The reversible solve: its order, its way back, exact gradients, its memory, and failure."""

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
from scipy import linalg

from jcnf.runge_kutta.reversible import _march, _Scheme, _walk_back, integrate_reversibly
from jcnf.solve import SOLVERS, _batch_norm

ORDERS = dict(euler=1, heun=2, midpoint=2, rk4=4, bosh3=3, tsit5=5, dopri5=5, dopri8=8)
FIXED = diffrax.ConstantStepSize()
RNG = np.random.default_rng(0)
ARGS = {"weight": jnp.asarray(RNG.normal(size=(3, 3)))}
START = {
    "x": jnp.asarray(RNG.normal(size=(4, 3))),
    "logdet": jnp.asarray(RNG.normal(size=4)),
    "penalties": {},
}


class Bernoulli(eqx.Module):
    """y' = y^2 cos t: y = y(0) / (1 - y(0) sin t)."""

    def __call__(self, t, y, args):
        return y**2 * jnp.cos(t)


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
    """Steps that grow by half; rejected are one in three, and those whose end is not finite."""

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return t0 + dt0, 0

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(y1_candidate)]
        keep = (state % 3 != 1) & jnp.all(jnp.stack(finite))
        start = jnp.where(keep, t1, t0)
        end = start + (t1 - t0) * jnp.where(keep, 1.5, 0.6)
        return keep, start, end, False, state + 1, diffrax.RESULTS.successful


def adaptive(tolerance, norm=_batch_norm):
    return diffrax.PIDController(tolerance, tolerance, norm, dtmin=1e-14, force_dtmin=False)


def solve(field, y0, args, t0, t1, first, solver="dopri5", controller=FIXED, max_steps=64):
    t0, t1, first = (jnp.asarray(t) for t in (t0, t1, first))
    return integrate_reversibly(
        field,
        y0,
        args,
        t0,
        t1,
        first,
        solver=SOLVERS[solver](),
        controller=controller,
        max_steps=max_steps,
    )[:4]


def total(state):
    """A nonlinear number of every entry of a state."""
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(state))


def assert_close(tree, expected, rtol):
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_has_the_order_of_its_base_method(solver):
    order, errors, start = ORDERS[solver], [], jnp.array([0.5, -0.5])
    compiled = jax.jit(lambda end, first: solve(Bernoulli(), start, None, 0.0, end, first, solver))
    for end in (2.0, -2.0):
        for count in (4, 8) if order > 5 else (32, 64):
            y, t, steps, rejected = compiled(end, end / count)
            assert (float(t), int(steps), int(rejected)) == (end, count, 0)
            errors.append(np.max(np.abs(y - start / (1 - start * np.sin(end)))))
        assert order - 0.2 < np.log2(errors[-2] / errors[-1]) < order + 0.8


def euler(f, t, h, y):
    return h * f(t, y)


def bosh3(f, t, h, y):
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + 3 * h / 4, y + 3 * h / 4 * k2)
    return h / 9 * (2 * k1 + 3 * k2 + 4 * k3)


def unrolled(increment, y0, args, times, lam=0.999):
    """The scheme as the paper writes it, for plain autodiff."""
    y0, unravel = ravel_pytree(y0)

    def field(t, y):
        return ravel_pytree(Mixing()(t, unravel(y), args))[0]

    y = z = y0
    for t, t_next in itertools.pairwise(times):
        y = lam * y + (1 - lam) * z + increment(field, t, t_next - t, z)
        z = z - increment(field, t_next, t - t_next, y)
    return unravel(y)


@pytest.mark.parametrize("increment", [euler, bosh3])
def test_value_and_gradient_are_those_of_the_scheme_unrolled(increment):
    @jax.jit
    def both(t0, t1):
        times = t0 + (t1 - t0) * jnp.linspace(0, 1, 4)

        def own(y0, args):
            step = (t1 - t0) / 3
            return total(solve(Mixing(), y0, args, t0, t1, step, increment.__name__)[0])

        def expected(y0, args):
            return total(unrolled(increment, y0, args, times))

        return [jax.value_and_grad(f, argnums=(0, 1))(START, ARGS) for f in (own, expected)]

    for interval in ((0.2, 1.1), (1.1, 0.2)):
        own, expected = both(*interval)
        assert_close(own, expected, rtol=1e-12)
        assert np.max(np.abs(own[1][1]["weight"])) > 0.1


def test_walking_back_finds_the_start_and_every_rejected_step_is_passed_over():
    scheme = _Scheme(Mixing(), diffrax.Bosh3(), 0.999)

    @jax.jit
    def there_and_back(t0, t1):
        first = (t1 - t0) / 40
        loop = _march((START, ARGS), scheme, t0, t1, first, Scripted(), 64)
        y, z = loop.state
        back = _walk_back(scheme, loop.times, loop.accepted, y, z, y, None, ARGS)
        return loop, back

    for ends in ((0.2, 3.0), (3.0, 0.2)):
        loop, (y, z, _, _) = there_and_back(*(jnp.asarray(t) for t in ends))
        times = loop.times[: int(loop.accepted) + 1]
        assert (float(times[0]), float(times[-1])) == ends
        assert np.all(np.diff(times) * (ends[1] - ends[0]) > 0)
        assert 0 < int(loop.accepted) < int(loop.steps)
        assert_close((y, z), (START, START), rtol=1e-10)
        assert np.max(np.abs(loop.state[0]["x"] - START["x"])) > 0.1


def test_gradient_through_rejected_steps_is_the_finite_difference():
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compiled(y0, args):
        y, t, steps, rejected = solve(Mixing(), y0, args, 1.9, 0.2, -0.1, "heun", Scripted())
        return total(y), (t, steps, rejected)

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (START, ARGS))

    def at(step):
        moved = jax.tree.map(lambda a, d: a + step * d, (START, ARGS), direction)
        return float(compiled(*moved)[0][0])

    (_, (t, steps, rejected)), gradient = compiled(START, ARGS)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    slope, h = float(sum(jax.tree.leaves(products))), 3e-4
    by_difference = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
    assert float(t) == 0.2
    assert 1 < int(rejected) < int(steps)
    assert abs(slope) > 0.1
    assert slope == pytest.approx(by_difference, rel=1e-9)


def test_adaptive_solve_and_gradient_of_a_linear_field_are_exact():
    start, weights = np.array(START["x"]), RNG.normal(size=(4, 3))
    controller = adaptive(1e-10)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def compiled(y0, matrix, t0, t1):
        y, *stats = solve(
            Linear(), y0, matrix, t0, t1, (t1 - t0) / 2, controller=controller, max_steps=256
        )
        return jnp.sum(weights * y), stats

    for t0, t1 in ((0.0, 1.2), (1.2, 0.0)):
        (value, (t, steps, rejected)), (y_bar, matrix_bar) = compiled(start, MATRIX, t0, t1)
        propagator = linalg.expm((t1 - t0) * MATRIX)
        pulled = linalg.expm_frechet((t1 - t0) * MATRIX.T, (t1 - t0) * weights.T @ start)[1]
        assert float(t) == t1
        assert 0 < int(rejected) < int(steps)
        assert float(value) == pytest.approx(np.sum(weights * (start @ propagator.T)), rel=1e-8)
        np.testing.assert_allclose(y_bar, weights @ propagator, rtol=1e-8)
        np.testing.assert_allclose(matrix_bar, pulled, rtol=1e-7)


@pytest.mark.parametrize("norm", [_batch_norm, optimistix.rms_norm])
def test_failure_ends_the_loop_with_the_last_good_state(norm):
    controller = adaptive(1e-6, norm)

    @partial(jax.jit, static_argnums=2)
    @partial(jax.value_and_grad, has_aux=True)
    def compiled(y0, wall, max_steps):
        y, *stats = solve(
            Wall(), y0, wall, 0.0, 2.0, 0.1, controller=controller, max_steps=max_steps
        )
        return jnp.sum(y), (y, *stats)

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


def test_a_step_over_the_wall_that_only_z_meets_is_refused():
    # Euler's slope is taken before the wall, and z's at y, beyond it.
    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def compiled(y0):
        y, *stats = solve(Wall(), y0, 1.3, 0.0, 2.0, 0.1, "euler", Scripted())
        return jnp.sum(y), (y, *stats)

    (_, (y, t, steps, _)), y_bar = compiled(jnp.zeros(2))
    assert (1.2 < float(t) < 1.3, int(steps)) == (True, 64)
    np.testing.assert_allclose((y, y_bar), (np.full(2, float(t)), np.ones(2)), rtol=1e-12)


def gradient_program(max_steps):
    def loss(matrix, x):
        step = 1 / max_steps
        return total(solve(Linear(), x, matrix, 0.0, 1.0, step, "bosh3", max_steps=max_steps)[0])

    return jax.jit(jax.grad(loss)).lower(ARGS["weight"], jnp.zeros((64, 3))).compile()


def test_memory_grows_by_the_times_alone_and_evaluations_are_as_promised():
    few, many = gradient_program(20), gradient_program(1280)
    growth = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert 0 <= growth <= 3 * 8 * 1260
    # 6 products forwards, 6 backwards with one for y and one for the matrix each, and no more.
    assert many.as_text().count(" dot(") == 6 + 6 * 3


@eqx.filter_jit
def train(weight, args, state):
    """Two gradient steps inside a while loop, and what the last solve gave."""

    def loss(weight):
        interval = [jnp.asarray(t, weight.dtype) for t in (0.0, 1.0, 0.25)]
        solved = solve(
            Mixing(), state, args | {"weight": weight}, *interval, "heun", adaptive(1e-3)
        )
        return total(solved[0]["x"]), solved[:2]  # no cotangent for the rest of the state

    def body(carry):
        i, weight, *_ = carry
        (value, (y, t)), slope = jax.value_and_grad(loss, has_aux=True)(weight)
        return i + 1, weight - 0.1 * slope, value, y, t

    zero = jnp.zeros((), weight.dtype)
    start = (0, weight, zero, state, zero)
    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, start)[1:]


def test_any_args_in_a_while_loop_in_either_dtype():
    args = {"rate": 2.0, "none": None, "call": jnp.tanh, "key": jr.key(0), "name": "a field"}
    args |= {"counts": jnp.arange(3), "flags": np.array([True]), "empty": {}}
    weight, _, y, t = in64 = train(ARGS["weight"], args, START)
    in32 = train(*astype((ARGS["weight"], args, START), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(in32)} == {np.dtype("float32")}
    assert_close(in32, in64, rtol=1e-4)
    assert float(t) == 1.0
    assert y["penalties"] == {}
    assert np.max(np.abs(weight - ARGS["weight"])) > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": diffrax.Kvaerno3()}, "needs an explicit Runge-Kutta method; got Kvaerno3"),
        ({"coupling": 0.0}, "coupling must be above 0 and at most 1; got 0"),
        ({"coupling": 1.5}, "coupling must be above 0 and at most 1; got 1.5"),
    ],
)
def test_errors_say_what_is_wrong(settings, message):
    settings = {"solver": diffrax.Heun(), "controller": FIXED, "max_steps": 16} | settings
    interval = (jnp.asarray(t) for t in (0.0, 1.0, 0.1))
    with pytest.raises(ValueError, match=re.escape(message)):
        integrate_reversibly(Bernoulli(), jnp.ones(2), None, *interval, **settings)
