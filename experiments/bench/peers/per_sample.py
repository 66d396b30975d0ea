"""diffrax as continuous normalizing flows in it are commonly written: `jax.vmap` of a solve."""

import diffrax
import jax
import jax.numpy as jnp

from experiments.bench import ours
from experiments.bench.cases import Case
from experiments.bench.timing import Program


def training_steps(case: Case) -> dict[str, Program]:
    """The loss by a solve per sample, with diffrax's defaults, and with what ours is given."""
    tuned = {
        "dt0": -case.solve.first_step * case.flow.t1,
        "max_steps": case.solve.max_steps,
        "throw": False,
    }
    return {
        "per-sample diffrax": ours.training_step(case, _objective(case, dt0=None)),
        "per-sample diffrax, tuned": ours.training_step(case, _objective(case, **tuned)),
    }


def _objective(case, **options):
    def rates(t, state, field):
        return field.velocity_and_divergence(t, state[0])

    def objective(flow, x, key):
        def log_prob(x):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(rates),
                diffrax.Dopri5(),
                flow.t1,
                0.0,
                y0=(x, jnp.zeros((), x.dtype)),
                args=flow.field,
                stepsize_controller=diffrax.PIDController(
                    rtol=case.solve.rtol, atol=case.solve.atol
                ),
                **options,
            )
            z, logdet = jax.tree.map(lambda y: y[-1], solution.ys)
            return flow.base.log_prob(z[None])[0] + logdet, solution.stats["num_steps"]

        log_probs, steps = jax.vmap(log_prob)(x)
        return -jnp.mean(log_probs), {"nfe": jnp.mean(6 * steps + 1)}

    return objective
