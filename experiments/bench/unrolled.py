"""A likelihood whose solver steps are known beforehand and unrolled into one XLA program.

This is a training step without error control and loops: the stages of dopri5 over exactly the
steps that our solve takes. Their intermediate values are kept for the backward pass or, as in our
solve, recomputed there.
"""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import ours
from experiments.bench.cases import Case
from jcnf import objectives, transform
from jcnf.ode import next_point, unknown

# The Butcher tableau of dopri5 (Dormand & Prince 1980): each stage's weights of those before it.
STAGE_WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
STAGE_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)


def objective(case: Case, *, again: bool = False) -> objectives.Objective:
    """Return an objective whose "nfe" counts the forward evaluations of the accepted steps.

    With `again`, the backward pass recomputes each step.
    """
    times = accepted_times(case)
    over = jax.checkpoint if again else lambda step: step

    def likelihood(flow, x, key):
        def rate(t, y):
            return jax.vmap(flow.bijection.field.velocity_and_divergence, (None, 0))(
                jnp.asarray(t, x.dtype), y[0]
            )

        y = (x, jnp.zeros(len(x), x.dtype))
        slope = rate(times[0], y)
        for start, end in itertools.pairwise(times):

            def step(y, slope, start=start, h=end - start):
                slopes, at = [slope], y
                for row, node in zip(STAGE_WEIGHTS, STAGE_TIMES, strict=True):
                    at = _plus(y, [np.asarray(h * a, x.dtype) for a in row], slopes)
                    slopes.append(rate(start + node * h, at))
                return at, slopes[-1]

            y, slope = over(step)(y, slope)
        z, logdet = y
        loss = -jnp.mean(flow.base.log_prob(z) + logdet)
        return loss, {"nfe": jnp.asarray(6 * (len(times) - 1))}

    return likelihood


def accepted_times(case: Case) -> np.ndarray:
    """Return the times between the steps of our solve, by the step plan on which it settles."""

    @eqx.filter_jit
    def step_plan_after(flow, x, step_plan):
        return transform(
            flow, x, solve=dataclasses.replace(case.solve, step_plan=step_plan)
        ).stats.step_plan

    step_plan = unknown(float)
    for _ in range(ours.SETTLING_STEPS):
        step_plan = step_plan_after(case.flow, case.x, step_plan)
    shares = [0.0]
    while shares[-1] < 1:
        shares.append(float(next_point(step_plan, jnp.asarray(shares[-1]))))
    return case.flow.bijection.t1 * (1 - np.array(shares))


def _plus(y, weights, slopes):
    """Return y + sum_i weights_i slopes_i."""
    return jax.tree.map(
        lambda y, *k: y + sum(w * k for w, k in zip(weights, k, strict=True) if w != 0), y, *slopes
    )
