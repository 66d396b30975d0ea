"""A likelihood whose steps are known beforehand and written out, for XLA alone to run.

It is what a training step would be without control of errors and loops: the stages of dopri5 over
the very steps that our solve takes. Their work is kept for the way back, or done again there, which
is what ours does.
"""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import ours
from experiments.bench.cases import Case
from jcnf import training, transform
from jcnf.ode import next_point, unknown

ABOVE = (  # what each stage adds up, of those before (Dormand & Prince 1980)
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)


def objective(case: Case, *, again: bool = False) -> training.Objective:
    """The loss, and as "nfe" the evaluations of the accepted steps, forward.

    With `again`, each step is taken once more on the way back.
    """
    times = accepted_times(case)
    over = jax.checkpoint if again else lambda step: step

    def likelihood(flow, x, key):
        def rate(t, y):
            return jax.vmap(flow.field.velocity_and_divergence, (None, 0))(
                jnp.asarray(t, x.dtype), y[0]
            )

        y = (x, jnp.zeros(len(x), x.dtype))
        slope = rate(times[0], y)
        for start, end in itertools.pairwise(times):

            def step(y, slope, start=start, h=end - start):
                slopes, at = [slope], y
                for row, node in zip(ABOVE, NODES, strict=True):
                    at = _plus(y, [np.asarray(h * a, x.dtype) for a in row], slopes)
                    slopes.append(rate(start + node * h, at))
                return at, slopes[-1]

            y, slope = over(step)(y, slope)
        z, logdet = y
        loss = -jnp.mean(flow.base.log_prob(z) + logdet)
        return loss, {"nfe": jnp.asarray(6 * (len(times) - 1))}

    return likelihood


def accepted_times(case: Case) -> np.ndarray:
    """Where the steps of our solve of the batch end, by the step plan that training settles on."""

    @eqx.filter_jit
    def step_plan_after(flow, x, step_plan):
        return transform(
            flow, x, solve=dataclasses.replace(case.solve, step_plan=step_plan)
        ).stats.step_plan

    step_plan = unknown(float)
    for _ in range(ours.SETTLING):
        step_plan = step_plan_after(case.flow, case.x, step_plan)
    shares = [0.0]
    while shares[-1] < 1:
        shares.append(float(next_point(step_plan, jnp.asarray(shares[-1]))))
    return case.flow.t1 * (1 - np.array(shares))


def _plus(y, weights, slopes):
    """y + sum_i weights_i slopes_i."""
    return jax.tree.map(
        lambda y, *k: y + sum(w * k for w, k in zip(weights, k, strict=True) if w != 0), y, *slopes
    )
