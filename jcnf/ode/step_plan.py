"""Step plans: where to put the steps of a solve, learned from an earlier, similar solve.

A step plan divides the interval into `NUM_BINS` equal parts and gives, for each part, the number of
steps of the size that the controller finds right there. It is a fraction where steps are longer
than a part, and all zeros if nothing is known. In other words, it is a density of steps over time.
Its sum, rounded up, is the number of steps that a solve needs. Steps that each contain an equal
amount of the density have about equal errors (de Boor 1973, "Good approximation by splines with
variable knots").

A step-size controller knows only the past, so it finds out by rejected steps where steps must be
short. In training, consecutive solves are nearly alike, and it would find out the same thing in
each of them. With the plan of the last solve, nearly all of those rejections are saved.
"""

# diffrax declares these members as class variables, and its own wrappers override them likewise.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NUM_BINS = 64
MIN_STEP_FRACTION = 0.1  # a shorter remainder of a planned step is joined to the next step
StepPlan = Float[Array, " parts"]


def unknown(dtype) -> StepPlan:
    """Return the plan that stands for no knowledge: zeros."""
    return jnp.zeros(NUM_BINS, dtype)


def is_known(step_plan: StepPlan) -> Bool[Array, ""]:
    """Return whether the plan is usable: positive and finite in every part.

    The plan of a solve that gave up is zero in the parts that it did not reach.
    """
    return jnp.all(step_plan > 0) & jnp.all(jnp.isfinite(step_plan))


def with_step(
    step_plan: StepPlan, start: Float[Array, ""], end: Float[Array, ""], steps: Float[Array, ""]
) -> StepPlan:
    """Add one accepted step to the plan.

    The step goes from `start` to `end`, both fractions of the interval. At the size that the
    controller proposes next, the whole interval would take `steps` steps.
    """
    edges = jnp.arange(len(step_plan) + 1, dtype=step_plan.dtype) / len(step_plan)
    within = jnp.clip(edges, start.astype(step_plan.dtype), end.astype(step_plan.dtype))
    return step_plan + jnp.diff(within) * steps.astype(step_plan.dtype)


def next_point(step_plan: StepPlan, start: Float[Array, ""]) -> Float[Array, ""]:
    """Return where a step from `start` should end; both are fractions of the interval."""
    edges = jnp.arange(len(step_plan) + 1, dtype=step_plan.dtype) / len(step_plan)
    steps = jnp.append(jnp.zeros_like(step_plan[:1]), jnp.cumsum(step_plan))
    number = jnp.ceil(steps[-1])
    done = jnp.interp(start.astype(step_plan.dtype), edges, steps) / steps[-1] * number
    # After rejected steps a solve is between two points of the plan. If it has almost reached the
    # next point, go on to the one after it rather than take a tiny step.
    following = jnp.floor(done + MIN_STEP_FRACTION) + 1
    point = jnp.interp(following / number * steps[-1], steps, edges)
    # The last point is 1 exactly. Interpolation could fall short of it where the last parts hold
    # less than one rounding error of the sum.
    return jnp.where(following < number, point, 1).astype(start.dtype)


class PlannedSteps(diffrax.AbstractStepSizeController):
    """A step-size controller that takes steps where the plan of an earlier solve puts them.

    The wrapped controller still accepts or rejects each step, so a bad plan costs evaluations but
    no accuracy. Its proposal is used after a rejected step, and throughout if there is no plan, if
    the plan has more than `max_steps` steps, or once the rejected steps show that the plan is not
    right for this solve.

    The solve also makes a new plan. Read it from the controller's state, `PlanState.step_plan`, by
    `diffrax.SaveAt(controller_state=True)`.

    **Arguments:**

    - `controller`: accepts or rejects steps, and proposes the next one.
    - `first`: the length of the first step, used if `diffeqsolve` is given `dt0=None`.
    - `step_plan`: the plan of a similar solve, or `unknown(dtype)`.
    - `max_steps`: the `max_steps` of the solve.
    """

    controller: diffrax.AbstractStepSizeController
    first: Float[Array, ""]
    step_plan: StepPlan
    max_steps: int = eqx.field(static=True)

    def wrap(self, direction):
        return dataclasses.replace(self, controller=self.controller.wrap(direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        dt0 = self.first if dt0 is None else dt0
        end, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        zero = jnp.zeros((), jnp.int32)
        ends = jnp.asarray(t0), jnp.asarray(t1)
        state = PlanState(inner, jnp.zeros_like(self.step_plan), *ends, zero, zero)
        return self._planned(t0, end, state), state

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        keep, start, end, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, state.inner
        )
        # The controller's proposal for the next step is the step size that would have met the
        # tolerance here. That, rather than the step that was taken, goes into the new plan: the
        # taken steps would only reproduce the old plan.
        steps = (state.end - state.start) / (end - start)
        taken = with_step(state.step_plan, state.share(t0), state.share(t1), steps)
        after = PlanState(
            inner,
            jnp.where(keep, taken, state.step_plan),
            state.start,
            state.end,
            state.accepted + jnp.where(keep, 1, 0),
            state.rejected + jnp.where(keep, 0, 1),
        )
        return (
            keep,
            start,
            jnp.where(keep, self._planned(start, end, after), end),
            jump,
            after,
            result,
        )

    def _planned(self, start, otherwise, state):
        """Return where a step from `start` ends by the plan, or `otherwise` if it is not used."""
        heeded = is_known(self.step_plan) & (jnp.sum(self.step_plan) <= self.max_steps)
        # The plan is dropped once rejections outnumber a quarter of the accepted steps, plus two.
        heeded &= 4 * state.rejected <= state.accepted + 8
        share = next_point(self.step_plan, state.share(start))
        point = state.start + share * (state.end - state.start)
        return jnp.where(heeded, jnp.where(share < 1, point, state.end), otherwise)


class PlanState(eqx.Module):
    """State of `PlannedSteps` between steps."""

    inner: Any  # the wrapped controller's state
    step_plan: StepPlan  # the new plan, from the steps accepted so far
    start: Float[Array, ""]  # of the solve
    end: Float[Array, ""]  # of the solve
    accepted: Int[Array, ""]  # number of steps
    rejected: Int[Array, ""]  # number of steps

    def share(self, t):
        """Return the fraction of the interval that lies before `t`."""
        return (t - self.start) / (self.end - self.start)
