"""Backpropagation through a Runge-Kutta solve that takes each accepted step again, once.

The gradient is that of the very numbers the solve computed (discretise, then optimise). Forwards,
the states that accepted steps start from are kept: `STATES` of them, or the root of `max_steps` if
that is more. Where there are more steps, every other state gives its place to a later one, again
and again, and the states between two that were kept are computed anew on the way back. So a solve
of any number of steps costs at most one forward pass more, and memory as the root of `max_steps`.
The step sizes are not differentiated, and rejected steps leave nothing behind.

diffrax's own `RecursiveCheckpointAdjoint` differentiates its loop as a whole, controller and saving
included, and recomputes steps in the order of a binomial schedule. Knowing that the state of a
Runge-Kutta method at the start of a step is all that the step needs is what makes this one faster.
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

STATES = 32  # kept at least


class AbstractEndAdjoint(diffrax.AbstractAdjoint):
    """Base of adjoints that differentiate the state at t1, and nothing else.

    They differentiate with respect to `y0`, `args` and `terms`, in reverse mode, once.

    **Raises:** `ValueError` for anything but `SaveAt(t1=True)`, for events, and without
    `max_steps`.
    """

    @abstractmethod
    def solve(self, y0_args_terms, **settings):
        """Return diffrax's last state, by a function with a backward pass of its own.

        `settings` are those of `run_from`.
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
                f"{name} differentiates the state at t1 only: use SaveAt(t1=True), or "
                "RecursiveCheckpointAdjoint for a trajectory"
            )
        if event is not None or max_steps is None:
            raise ValueError(f"{name} needs max_steps, and cannot handle events")
        # What the solver and the controller computed from y0 at the start has no gradient.
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
    """The backward pass of this module, for Runge-Kutta methods."""

    def solve(self, y0_args_terms, **settings):
        return _solve(y0_args_terms, **settings)


class Kept(NamedTuple):
    """The states that are kept: every `stride`-th one."""

    states: Any  # one place more than `numbers`, for what is not kept
    numbers: Int[Array, " states"]  # of the step that starts there; -1 for a free place
    stride: Int[Array, ""]


def run_from(y0_args_terms, observe, record, *, loop, init_state, **settings):
    """Run diffrax's loop from y0; return its last state, and the record made on the way.

    `observe(record, state)` updates the record before each attempt at a step, and after the last.
    """
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
    """Write nothing down."""


def record_time(times, state):
    """Write down where the next step starts; a rejected step writes the same again."""
    return times.at[state.num_accepted_steps].set(state.tprev)


def failed_rows(solver, final):
    """Return which rows failed, or None for a solver that has no such rows."""
    return final.solver_state.failed if isinstance(solver, FreezeFailingRows) else None


def steps_to_pull_back(final, failed):
    """Return the number of accepted steps, 0 if all rows failed: nothing depends on them."""
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
        # No step starts from the state after the last that there may be, and it has no place.
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
            # Rows that fail later are copies from the start: no cotangent comes from there, but
            # the NaN that they met would turn the zero into NaN.
            y = with_copies(y, failed)
        y_bar, more = jax.vjp(lambda *at: step(number, *at), y, moving)[1](y_bar)
        return y_bar, jax.tree.map(jnp.add, moving_bar, more)

    y_bar = end_cotangent(cotangents, y0)
    bars = y_bar, jax.tree.map(jnp.zeros_like, moving)
    y_bar, moving_bar = _walk_back(kept, accepted, len(times) - 1, bars, step, pull, moving)
    return y_bar, *moving_bar


def end_cotangent(cotangents, y0):
    """Return the cotangent of the state at t1, from that of diffrax's last state."""
    ys_bar = cotangents.save_state.ys
    return jax.tree.map(
        lambda y, bar: jnp.zeros_like(y) if bar is None else bar[0],
        y0,
        ys_bar,
        is_leaf=lambda leaf: leaf is None,
    )


def unwrapped(solver):
    """Return the solver that takes the steps of rows that have not failed."""
    return solver.solver if isinstance(solver, FreezeFailingRows) else solver


def retake(solver, terms, t0, t1, y, args):
    """Return the state at t1 of a step that is known to be accepted."""
    state = solver.init(terms, t0, t1, y, args)
    return solver.step(terms, t0, t1, y, args, state, made_jump=False)[0]


def _room(y, max_steps):
    """Return places for states like `y`, all free."""
    places = _places(max_steps)
    states = jax.tree.map(lambda a: jnp.zeros((places + 1, *a.shape), a.dtype), y)
    return Kept(states, jnp.full(places, -1, jnp.int32), jnp.ones((), jnp.int32))


def _keep(kept, number, y):
    """Keep the state that step `number` starts from, if it is due and not there yet."""
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
    """Pull the cotangents of the end back to the start, segment by segment between kept states."""
    places = len(kept.numbers)
    # The state at t1, or after a rejected last attempt, starts no step of the way back.
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
    """Return how many states are kept: an even number, or one for each step."""
    return min(max_steps, max(STATES, 2 * math.ceil(math.sqrt(max_steps) / 2)))


def _longest_stride(places, max_steps):
    """Return the distance between the states that are kept of `max_steps` steps."""
    stride = 1
    while places * stride < max_steps:
        stride *= 2
    return stride
