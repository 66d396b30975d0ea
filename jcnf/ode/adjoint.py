"""Backpropagation through a Runge-Kutta solve, one accepted step at a time.

The gradient is exact for the numbers that the solve computed (discretize, then optimize). The
forward pass keeps the states that accepted steps start from: `MIN_KEPT_STATES` of them, or about
the square root of `max_steps` if that is more. When the buffer is full, every other state is
dropped to make room for later ones. The backward pass recomputes the states between two kept ones.
A solve of any number of steps therefore costs at most one extra forward pass, and memory grows as
the square root of `max_steps` (beside the time of each step). Step sizes are not differentiated,
and rejected steps leave no trace in the gradient.

diffrax's own `RecursiveCheckpointAdjoint` differentiates its loop as a whole, including the
step-size controller and the saving of outputs, and recomputes steps in a binomial schedule. This
adjoint is faster because it uses a fact about Runge-Kutta methods: the state at the start of a step
is all that the step needs.
"""

import functools
import math
from abc import abstractmethod
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jcnf.ode.failing_rows import FreezeFailingRows, with_copies

MIN_KEPT_STATES = 32


class AbstractEndAdjoint(diffrax.AbstractAdjoint):
    """Base class of adjoints that differentiate only the state at t1.

    They give first derivatives with respect to `y0`, `args` and `terms`, in reverse mode only.

    **Raises:** `ValueError` for any `SaveAt` other than `SaveAt(t1=True)`, for events, and if
    `max_steps` is None.
    """

    @abstractmethod
    def solve(self, y0_args_terms, **settings):
        """Return the final state of diffrax's loop; implementations define a custom backward pass.

        `settings` are passed on to `run_from`.
        """

    def loop(
        self,
        *,
        args,
        terms,
        saveat,
        event,
        init_state,
        max_steps,
        passed_solver_state,
        passed_controller_state,
        throw,
        **settings,
    ):
        subs, name = saveat.subs, type(self).__name__
        only_end = isinstance(subs, diffrax.SubSaveAt) and subs.t1 and not subs.t0
        if not only_end or subs.ts is not None or subs.steps or saveat.dense:
            raise ValueError(
                f"{name} differentiates only the state at t1: use SaveAt(t1=True), or "
                "RecursiveCheckpointAdjoint for a trajectory"
            )
        if event is not None or max_steps is None:
            raise ValueError(
                f"{name} needs an integer max_steps and no event; got max_steps={max_steps}, "
                f"event={event}"
            )
        # The initial state also holds what the solver and the controller computed from y0 (a
        # first slope, a first step size). The backward passes recompute the slopes and treat
        # step sizes as constants, so y is the only part of it that has a gradient.
        start = jax.tree.map(
            lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf,
            eqx.tree_at(lambda state: state.y, init_state, None),
        )
        final = self.solve(
            (init_state.y, args, terms),
            loop=self._loop,
            init_state=start,
            saveat=saveat,
            event=event,
            max_steps=max_steps,
            **settings,
        )
        return final, {}


class StepCheckpointAdjoint(AbstractEndAdjoint):
    """Exact gradients of a Runge-Kutta solve from the states kept on the way.

    The docstring of the module `jcnf.ode.adjoint` has the method and its cost.
    """

    def solve(self, y0_args_terms, **settings):
        return _solve(y0_args_terms, **settings)


class Kept(NamedTuple):
    """A buffer of every `stride`-th state."""

    states: Any  # one row more than `numbers` has: states that are not kept are written there
    numbers: Int[Array, " states"]  # the step that starts from each state; -1 for a free place
    stride: Int[Array, ""]


def run_from(y0_args_terms, observe, record, *, loop, init_state, **settings):
    """Run diffrax's loop from y0; return its final state and a record made on the way.

    `observe(record, state)` returns the updated record. It is called before each attempt at a step
    and after the last one.
    """
    # diffrax's loop passes its condition and body to an outer while loop that adjoints may choose.
    # This one carries the record beside diffrax's state. The loop returns only diffrax's state, so
    # the record comes out through `found`.
    y0, args, terms = y0_args_terms
    init_state = eqx.tree_at(lambda s: s.y, init_state, y0, is_leaf=lambda leaf: leaf is None)
    found = []

    def outer_while_loop(condition, body, state, *, max_steps, buffers):
        final, last = eqxi.while_loop(
            lambda carry: condition(carry[0]),
            lambda carry: (body(carry[0]), observe(carry[1], carry[0])),
            (state, record),
            max_steps=max_steps,
            buffers=lambda carry: buffers(carry[0]),
            kind="lax",
        )
        found.append(observe(last, final))
        return final

    final, _ = loop(
        init_state=init_state,
        args=args,
        terms=terms,
        inner_while_loop=functools.partial(eqxi.while_loop, kind="lax"),
        outer_while_loop=outer_while_loop,
        **settings,
    )
    return final, found[0]


def no_record(record, state):
    """Record nothing."""


def record_time(times, state):
    """Record the time at which the next step starts; a retry writes the same time again."""
    return times.at[state.num_accepted_steps].set(state.tprev)


def failed_rows(solver, final):
    """Return which rows failed, or None for a solver that does not track failing rows."""
    return final.solver_state.failed if isinstance(solver, FreezeFailingRows) else None


def steps_to_pull_back(final, failed):
    """Return the number of steps to differentiate: the accepted ones, or 0 if all rows failed."""
    if failed is None:
        return final.num_accepted_steps
    return jnp.where(jnp.all(failed), 0, final.num_accepted_steps)


@eqx.filter_custom_vjp
def _solve(y0_args_terms, **settings):
    return run_from(y0_args_terms, no_record, None, **settings)[0]


@_solve.def_fwd
def _solve_forwards(perturbed, y0_args_terms, *, init_state, max_steps, **settings):
    def observe(record, state):
        times, kept = record
        # After max_steps accepted steps no further step can start, and the buffer has no place for
        # the state.
        number = jnp.where(state.num_accepted_steps < max_steps, state.num_accepted_steps, -1)
        return record_time(times, state), _keep(kept, number, state.y)

    times = jnp.zeros(max_steps + 1, init_state.tprev.dtype)
    final, (times, kept) = run_from(
        y0_args_terms,
        observe,
        (times, _room(y0_args_terms[0], max_steps)),
        init_state=init_state,
        max_steps=max_steps,
        **settings,
    )
    failed = failed_rows(settings["solver"], final)
    return final, (kept, times, steps_to_pull_back(final, failed), failed)


@_solve.def_bwd
def _solve_backwards(residuals, cotangents, perturbed, y0_args_terms, *, solver, **settings):
    kept, times, accepted, failed = residuals
    solver = unwrapped(solver)
    y0, args, terms = y0_args_terms
    moving, still = eqx.partition((args, terms), perturbed[1:])

    def step(number, y, moving):
        args, terms = eqx.combine(moving, still)
        return retake(solver, terms, times[number], times[number + 1], y, args)

    def pull(number, y, y_bar, moving_bar):
        if failed is not None:
            # The cotangent of a failed row is zero, but zero times the NaN that the row met before
            # it failed would be NaN. So the row is a copy of a good row in every step, also in
            # those before its failure.
            y = with_copies(y, failed)
        y_bar, more = jax.vjp(lambda *at: step(number, *at), y, moving)[1](y_bar)
        return y_bar, jax.tree.map(jnp.add, moving_bar, more)

    y_bar = end_cotangent(cotangents, y0)
    bars = y_bar, jax.tree.map(jnp.zeros_like, moving)
    y_bar, moving_bar = _walk_back(kept, accepted, len(times) - 1, bars, step, pull, moving)
    return y_bar, *moving_bar


def end_cotangent(cotangents, y0):
    """Return the cotangent of the state at t1, given the one of diffrax's final state."""
    ys_bar = cotangents.save_state.ys
    return jax.tree.map(
        lambda y, bar: jnp.zeros_like(y) if bar is None else bar[0],
        y0,
        ys_bar,
        is_leaf=lambda leaf: leaf is None,
    )


def unwrapped(solver):
    """Return the solver inside `FreezeFailingRows`, or the solver itself."""
    return solver.solver if isinstance(solver, FreezeFailingRows) else solver


def retake(solver, terms, t0, t1, y, args):
    """Take one step from t0 to t1 again and return the state at t1."""
    state = solver.init(terms, t0, t1, y, args)
    return solver.step(terms, t0, t1, y, args, state, made_jump=False)[0]


def _room(y, max_steps):
    """Return an empty buffer for states like `y`."""
    places = _places(max_steps)
    states = jax.tree.map(lambda a: jnp.zeros((places + 1, *a.shape), a.dtype), y)
    return Kept(states, jnp.full(places, -1, jnp.int32), jnp.ones((), jnp.int32))


def _keep(kept, number, y):
    """Keep the state that step `number` starts from, if it falls on the stride.

    A state that is already there is not written again: a rejected step is tried from it repeatedly.
    When the buffer is full, the stride doubles and every other state is dropped. A state that is
    not kept goes to the spare last row, so that the write needs no branch.
    """
    due = (number > jnp.max(kept.numbers)) & (number % kept.stride == 0)
    full = jnp.min(kept.numbers) >= 0
    stride = jnp.where(due & full, 2 * kept.stride, kept.stride)
    numbers = jnp.where(kept.numbers % stride == 0, kept.numbers, -1)
    free, places = jnp.argmin(numbers), len(numbers)
    place = jnp.where(due, free, places)
    states = jax.tree.map(
        lambda rows, a: jax.lax.dynamic_update_index_in_dim(rows, a, place, 0), kept.states, y
    )
    numbers = jnp.where(jnp.arange(places) == place, number, numbers)
    return Kept(states, numbers, stride)


def _walk_back(kept, accepted, max_steps, bars, step, pull, moving):
    """Pull the cotangents back from the end to the start, one segment at a time.

    A segment is the steps from one kept state to the next. Its states are first recomputed into the
    buffer `within`, then its steps are pulled back in reverse order.
    """
    places = len(kept.numbers)
    # The final state may have been kept too, but no accepted step starts from it.
    started = jnp.where(kept.numbers < accepted, kept.numbers, -1)
    order = jnp.argsort(started)
    numbers = jnp.append(started[order], accepted)
    longest = _longest_stride(places, max_steps)

    def state_in(states, i):
        return jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, i, 0, False), states)

    def put(states, i, state):
        return jax.tree.map(
            lambda rows, a: jax.lax.dynamic_update_index_in_dim(rows, a, i, 0), states, state
        )

    def segment(i, carry):
        bars, within = carry
        place = places - 1 - i
        first, end = numbers[place], numbers[place + 1]
        state = state_in(kept.states, order[place])
        if longest == 1:
            return pull(first, state, *bars), within

        def onwards(number, carry):
            state, within = carry
            state = step(number, state, moving)
            return state, put(within, number + 1 - first, state)

        def backwards(i, bars):
            number = end - 1 - i
            return pull(number, state_in(within, number - first), *bars)

        within = put(within, 0, state)
        _, within = jax.lax.fori_loop(first, end - 1, onwards, (state, within))
        return jax.lax.fori_loop(0, end - first, backwards, bars), within

    within = jax.tree.map(
        lambda rows: jnp.zeros((longest, *rows.shape[1:]), rows.dtype), kept.states
    )
    return jax.lax.fori_loop(0, jnp.sum(started >= 0), segment, (bars, within))[0]


def _places(max_steps):
    """Return how many states are kept: an even number, or one for each step.

    With an even number of places, the state that finds the buffer full (number places * stride)
    is a multiple of the doubled stride, so it can be kept.
    """
    return min(max_steps, max(MIN_KEPT_STATES, 2 * math.ceil(math.sqrt(max_steps) / 2)))


def _longest_stride(places, max_steps):
    """Return the stride of the kept states after `max_steps` steps, its largest value."""
    stride = 1
    while places * stride < max_steps:
        stride *= 2
    return stride
