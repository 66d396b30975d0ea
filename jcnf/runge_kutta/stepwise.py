"""A Runge-Kutta solve whose backward pass takes each step again: exact, at 4 evaluations for one.

Forwards, the loop keeps the states that accepted steps start from; backwards, each step is taken
again, once, and pulled back. `STATES` of them are kept, or as many as the root of `max_steps`, if
that is more. Where there are more steps, every other state gives up its place to a later one, again
and again, and those between two that are kept are computed anew on the way back: a solve of any
number of steps costs a forward pass more at the most, and memory as the root of `max_steps`.
How steps were chosen is not differentiated, and rejected ones leave nothing behind.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jcnf.runge_kutta.march import March, Scheme, march, outcome
from jcnf.runge_kutta.tableaus import slopes_of, stages, tableau_of, weighted

STATES = 32  # kept at least


def integrate_stepwise(
    vector_field: Callable[..., Any],
    y0: Any,
    args: Any,
    t0: Float[Array | np.ndarray, ""],
    t1: Float[Array | np.ndarray, ""],
    first: Float[Array | np.ndarray, ""],
    step_plan: Float[Array, " parts"],
    *,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    max_steps: int,
) -> March:
    """The state at `t1`, and how the solve went. Differentiable in `y0` and `args`, once.

    **Arguments:**

    - `vector_field`: `vector_field(t, y, args)`, of y's structure. Whatever is differentiated is
      in `args`, and nothing in `vector_field` itself.
    - `y0`: any pytree of floating arrays.
    - `args`: any pytree; its floating arrays are differentiable.
    - `t0`, `t1`, `first`: the interval, either way, and the first step, with its sign. They have
      no gradient.
    - `step_plan`: that of a solve like it, or `jcnf.runge_kutta.step_plan.unknown`.
    - `solver`: an explicit Runge-Kutta method of diffrax.
    - `controller`: fixed or adaptive; it sees y at both ends of a step and the embedded error.
    - `max_steps`: the solve gives up after so many steps tried.

    **Raises:** `ValueError` for another kind of solver.
    """
    tableau_of(solver)
    y0 = jax.tree.map(jnp.asarray, y0)
    dtype = jnp.result_type(t0, t1)
    interval = (jax.lax.stop_gradient(jnp.asarray(t, dtype)) for t in (t0, t1, first))
    scheme = _Scheme(vector_field, solver, keeps=False)
    step_plan = jax.lax.stop_gradient(step_plan)
    return _solve((y0, args), scheme, *interval, step_plan, controller, max_steps)


class _Kept(NamedTuple):
    """Every `stride`-th state, each in a place of its own."""

    states: Any  # of each, `STATES` and one more, for what is not kept
    numbers: Int[Array, " states"]  # of the step that starts there; -1 for a place that is free
    stride: Int[Array, ""]


class _Scheme(Scheme):
    """Steps of a method from (y, k), with k = None, or f(t, y) where it is a step's last slope."""

    keeps: bool = eqx.field(static=True)

    @property
    def reuses(self):
        """Whether a step's last slope is the next one's first."""
        return self.tableau.fsal and stages(self.tableau.b_sol) > 1

    def step(self, t, t_next, state, args):
        """The state at `t_next`, and the embedded error."""
        (y, first), h, tableau = state, t_next - t, self.tableau
        needed = stages(tableau.b_sol)
        if not self.reuses:
            needed = max(needed, stages(tableau.b_error))
        slopes = slopes_of(self.vector_field, tableau, t, h, y, args, needed, first)
        y = self.end(y, h, slopes)
        if self.reuses:
            slopes.append(self.vector_field(t_next, y, args))
        error = weighted(h, tableau.b_error, slopes)
        return (y, slopes[-1] if self.reuses else None), error

    def step_alone(self, t, t_next, y, args):
        """y at `t_next`, with all slopes that it needs and no other: for the way back."""
        needed = stages(self.tableau.b_sol)
        h = t_next - t
        return self.end(y, h, slopes_of(self.vector_field, self.tableau, t, h, y, args, needed))

    def end(self, y, h, slopes):
        """y at the end of a step."""
        return jax.tree.map(jnp.add, y, weighted(h, self.tableau.b_sol, slopes))

    def seen(self, state):
        """y."""
        return state[0]

    def room(self, y, max_steps) -> _Kept | None:
        """For states like this; None where they are not wanted."""
        if not self.keeps:
            return None
        places = _places(max_steps)
        states = jax.tree.map(lambda a: jnp.zeros((places + 1, *a.shape), a.dtype), y)
        return _Kept(states, jnp.full(places, -1, jnp.int32), jnp.ones((), jnp.int32))

    def kept(self, kept, number, state):
        """With the state that step `number` starts from, if it is due and not there."""
        if kept is None:
            return None
        due = (number > jnp.max(kept.numbers)) & (number % kept.stride == 0)
        full = jnp.min(kept.numbers) >= 0
        stride = jnp.where(due & full, 2 * kept.stride, kept.stride)
        numbers = jnp.where(kept.numbers % stride == 0, kept.numbers, -1)
        free, places = jnp.argmin(numbers), len(numbers)
        place = jnp.where(due, free, places)
        states = jax.tree.map(
            lambda rows, a: jax.lax.dynamic_update_index_in_dim(rows, a, place, 0),
            kept.states,
            state[0],
        )
        numbers = jnp.where(jnp.arange(places) == place, number, numbers)
        return _Kept(states, numbers, stride)


def _march(y0_and_args, scheme, t0, t1, first, step_plan, controller, max_steps):
    y0, args = y0_and_args
    state = y0, scheme.vector_field(t0, y0, args) if scheme.reuses else None
    room = scheme.room(y0, max_steps)
    return march(scheme, state, room, args, t0, t1, first, step_plan, controller, max_steps)


@eqx.filter_custom_vjp
def _solve(y0_and_args, scheme, *settings):
    loop = _march(y0_and_args, scheme, *settings)
    return outcome(loop.state[0], loop)


@_solve.def_fwd
def _solve_forwards(perturbed, y0_and_args, scheme, *settings):
    keeping = _Scheme(scheme.vector_field, scheme.solver, keeps=True)
    loop = _march(y0_and_args, keeping, *settings)
    return outcome(loop.state[0], loop), (loop.kept, loop.times, loop.accepted)


@_solve.def_bwd
def _solve_backwards(residuals, cotangents, perturbed, y0_and_args, scheme, *settings):
    kept, times, accepted = residuals
    y0, args = y0_and_args
    moving, still = eqx.partition(args, perturbed[1])

    def step(number, y, moving):
        args = eqx.combine(moving, still)
        return scheme.step_alone(times[number], times[number + 1], y, args)

    def pull(number, y, y_bar, moving_bar):
        y_bar, more = jax.vjp(lambda *at: step(number, *at), y, moving)[1](y_bar)
        return y_bar, jax.tree.map(jnp.add, moving_bar, more)

    y_bar = jax.tree.map(lambda y, g: jnp.zeros_like(y) if g is None else g, y0, cotangents.y)
    bars = y_bar, jax.tree.map(jnp.zeros_like, moving)
    return _walk_back(kept, accepted, len(times) - 1, bars, step, pull, moving)


def _walk_back(kept, accepted, max_steps, bars, step, pull, moving):
    """Cotangents of the start, from those of the end, through the segments between kept states."""
    places = len(kept.numbers)
    # Where the last step tried was rejected, the state that it started from ends no step's way.
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
    """For kept states: an even number, or one for each step."""
    return min(max_steps, max(STATES, 2 * math.ceil(math.sqrt(max_steps) / 2)))


def _longest_stride(places, max_steps):
    """Of the states that are kept of `max_steps` steps."""
    stride = 1
    while places * stride < max_steps:
        stride *= 2
    return stride
