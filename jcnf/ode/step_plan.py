"""Where the steps of a solve are best put, learnt from a solve like it.

A step plan is the number of steps, of the size that the controller finds right, in each of `PARTS`
equal parts of the interval; zeros where nothing is known. Their sum, rounded up, is how many steps
a solve needs, and points between which they are equally many share its error equally (de Boor 1973,
"Good approximation by splines with variable knots"). A solver that looks back only finds out by
rejections where its steps must be short, and in training finds it out at every step anew.
"""

# diffrax declares these members as class variables, and its own wrappers override them likewise.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PARTS = 64
SHORT = 0.1  # of a step: less is added to the next
StepPlan = Float[Array, " parts"]


def unknown(dtype) -> StepPlan:
    """Return the plan of a solve that nothing is known of: zeros."""
    return jnp.zeros(PARTS, dtype)


def is_known(step_plan: StepPlan) -> Bool[Array, ""]:
    """Whether the plan is that of a solve that reached its end."""
    return jnp.all(step_plan > 0) & jnp.all(jnp.isfinite(step_plan))


def with_step(
    step_plan: StepPlan, start: Float[Array, ""], end: Float[Array, ""], steps: Float[Array, ""]
) -> StepPlan:
    """Add one accepted step, from `start` to `end`, fractions of the interval, to the plan.

    At the size that the controller proposes next the whole interval would take `steps` steps.
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
    # What is left of a step that was cut short is added to the next step.
    following = jnp.floor(done + SHORT) + 1
    point = jnp.interp(following / number * steps[-1], steps, edges)
    # Not by interpolation: the last parts may have less than a rounding of all steps.
    return jnp.where(following < number, point, 1).astype(start.dtype)


class PlannedSteps(diffrax.AbstractStepSizeController):
    """A step-size controller whose accepted steps end where the plan of an earlier solve says.

    After a rejected step it goes as far as the wrapped controller says, and so it does altogether
    where there is no plan, where it has more than `max_steps` steps, or where so many steps
    are rejected that the plan is of a solve unlike this. The plan of this solve comes out with the
    controller's state, `PlanState.step_plan`, by `diffrax.SaveAt(controller_state=True)`.

    **Arguments:**

    - `controller`: accepts and rejects steps, and proposes the next.
    - `first`: the length of the first step, where `diffeqsolve` is given none (`dt0=None`).
    - `step_plan`: of a solve like this one, or `unknown`.
    - `max_steps`: that of the solve.
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
        # What the controller would take next is what it finds to be the right size of this step.
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
        """Return the end of a step from `start`."""
        heeded = is_known(self.step_plan) & (jnp.sum(self.step_plan) <= self.max_steps)
        heeded &= 4 * state.rejected <= state.accepted + 8
        share = next_point(self.step_plan, state.share(start))
        point = state.start + share * (state.end - state.start)
        return jnp.where(heeded, jnp.where(share < 1, point, state.end), otherwise)


class PlanState(eqx.Module):
    """What `PlannedSteps` knows between steps."""

    inner: Any
    step_plan: StepPlan  # of the steps accepted so far
    start: Float[Array, ""]  # of the solve
    end: Float[Array, ""]
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]

    def share(self, t):
        """Return the fraction of the interval that lies before `t`."""
        return (t - self.start) / (self.end - self.start)
