"""Where the steps of a solve are best put, learnt from a solve like it.

A step plan is the number of steps, of the size that the controller finds right, in each of `PARTS`
equal parts of the interval; zeros where nothing is known. Their sum, rounded up, is how many steps
a solve needs, and points between which they are equally many share its error equally (de Boor 1973,
"Good approximation by splines with variable knots"). A solver that looks back only finds out by
rejections where its steps must be short, and in training finds it out at every step anew.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
