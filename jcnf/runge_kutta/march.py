"""The loop over steps that a controller accepts or rejects, for any scheme that takes a step."""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jcnf.runge_kutta.step_plan import is_known, next_point, with_step
from jcnf.runge_kutta.tableaus import tableau_of


class Scheme(eqx.Module):
    """What takes the steps of a solve. Its state is any pytree."""

    vector_field: Callable[..., Any]
    solver: diffrax.AbstractSolver

    @property
    def tableau(self) -> diffrax.ButcherTableau:
        """The method's coefficients."""
        return tableau_of(self.solver)

    @abstractmethod
    def step(self, t, t_next, state, args) -> tuple[Any, Any]:
        """The state at `t_next`, and an estimate of y's error."""

    @abstractmethod
    def seen(self, state) -> Any:
        """y, NaN where the state is not finite: what the controller sees."""

    def kept(self, kept, number, state) -> Any:
        """What is kept for the way back, with the state that step `number` starts from."""
        return kept


class Loop(NamedTuple):
    """Where a solve is."""

    state: Any
    kept: Any
    times: Float[Array, " max_steps_and_1"]  # of the accepted steps
    end: Float[Array, ""]  # of the step to be tried
    control: Any
    step_plan: Float[Array, " parts"]  # of the steps that were accepted, as of `March`
    steps: Int[Array, ""]
    accepted: Int[Array, ""]
    going: Bool[Array, ""]


def march(
    scheme: Scheme,
    state: Any,
    kept: Any,
    args: Any,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
    first: Float[Array, ""],
    step_plan: Float[Array, " parts"],
    controller: diffrax.AbstractStepSizeController,
    max_steps: int,
) -> Loop:
    """The loop after its last step. It is at `times[accepted]`, short of t1 where it was ended.

    Steps go from point to point of the `step_plan` of a solve like it, where that is known. After a
    rejected step they go as far as the controller says, and so do all where many were rejected.
    """
    # Controllers know time that increases.
    direction = jnp.where(t0 <= t1, 1, -1)
    controller = controller.wrap(direction)
    term = diffrax.ODETerm(scheme.vector_field)
    order: Any = scheme.solver.error_order(term)
    # A step that leaves next to nothing to go goes all the way.
    ulp = float(jnp.finfo(t1.dtype).eps) * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
    almost = direction * t1 - 100 * ulp

    def towards(end):
        return jnp.where(end > almost, t1, direction * end)

    def share(t):
        """Of the interval, up to `t`."""
        return (t - t0) / (t1 - t0)

    # One of more steps than there may be would make the solve fail.
    of_use = is_known(step_plan) & (jnp.sum(step_plan) <= max_steps)

    def planned(t, otherwise, accepted, rejected):
        """The end of a step from `t`, in time that increases."""
        part = next_point(step_plan, share(t))
        # Many rejections tell that the step plan is of a solve unlike this.
        heeded = of_use & (4 * rejected <= accepted + 8)
        return jnp.where(heeded, direction * (t0 + part * (t1 - t0)), otherwise)

    def condition(loop):
        short = direction * loop.times[loop.accepted] < direction * t1
        return loop.going & short & (loop.steps < max_steps)

    def body(loop):
        start, end = loop.times[loop.accepted], loop.end
        kept = scheme.kept(loop.kept, loop.accepted, loop.state)
        state, error = scheme.step(start, end, loop.state, args)
        seen = scheme.seen(state)
        error = jax.tree.map(lambda y, e: jnp.where(jnp.isfinite(y + e), e, jnp.inf), seen, error)
        keep, _, end_next, _, control, result = controller.adapt_step_size(
            direction * start,
            direction * end,
            scheme.seen(loop.state),
            seen,
            args,
            error,
            order,
            loop.control,
        )
        # What the controller would take next is what it finds to be the right size of this step.
        steps = jnp.abs((t1 - t0) / (direction * end_next - end))
        onwards = planned(end, end_next, loop.accepted + 1, loop.steps - loop.accepted)
        return Loop(
            state=jax.tree.map(partial(jnp.where, keep), state, loop.state),
            kept=kept,
            times=loop.times.at[loop.accepted + 1].set(end),  # a rejected one is overwritten
            end=towards(jnp.where(keep, onwards, end_next)),
            control=control,
            step_plan=jnp.where(
                keep, with_step(loop.step_plan, share(start), share(end), steps), loop.step_plan
            ),
            steps=loop.steps + 1,
            accepted=loop.accepted + jnp.where(keep, 1, 0),
            going=diffrax.is_successful(result),
        )

    y0 = scheme.seen(state)
    end, control = controller.init(
        term, direction * t0, direction * t1, y0, direction * first, args, scheme.solver.func, order
    )
    times = jnp.zeros(max_steps + 1, t0.dtype).at[0].set(t0)
    zero = jnp.zeros((), jnp.int32)
    start = Loop(
        state,
        kept,
        times,
        towards(planned(t0, end, zero, zero)),
        control,
        jnp.zeros_like(step_plan),
        zero,
        zero,
        going=jnp.asarray(True),
    )
    return jax.lax.while_loop(condition, body, start)


class March(NamedTuple):
    """How a solve went."""

    y: Any  # the last finite state
    t: Float[Array, ""]  # where it is: t1, or the last accepted step of a solve that was ended
    steps: Int[Array, ""]  # tried
    rejected: Int[Array, ""]
    step_plan: Float[Array, " parts"]  # for the next solve like it


def outcome(y: Any, loop: Loop) -> March:
    """Of a loop that ended, with y in its state."""
    return March(
        y, loop.times[loop.accepted], loop.steps, loop.steps - loop.accepted, loop.step_plan
    )
