"""Continuous normalizing flows in diffrax, as they are commonly written.

There are two forms: one solve of the whole batch, which is our strongest rival, and `jax.vmap` of a
solve per sample, which is documented most often. Each is timed with diffrax's defaults and tuned:
with our first step, our limit of steps, and no error raised from the compiled program.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp

from experiments.bench import ours
from experiments.bench.cases import Case
from experiments.bench.timing import Program
from jcnf.ode import SOLVERS as METHODS
from jcnf.ode import Solve

SOLVERS = ("bosh3", "tsit5", "dopri8")
CHECKPOINTS = 32  # of the tuned adjoint of the batched solve: as many states as ours keeps


def training_steps(case: Case) -> dict[str, Program]:
    """Return training steps by both forms, with defaults and tuned."""
    tuned = {"dt0": _first_step(case), "max_steps": case.solve.max_steps, "throw": False}
    adjoint = {"adjoint": diffrax.RecursiveCheckpointAdjoint(checkpoints=CHECKPOINTS)}
    objectives = {
        "batched diffrax": _batched_objective(case, dt0=None),
        "batched diffrax, tuned": _batched_objective(case, **tuned, **adjoint),
        "per-sample diffrax": _per_sample_objective(case, dt0=None),
        "per-sample diffrax, tuned": _per_sample_objective(case, **tuned),
    }
    return {name: ours.training_step(case, objective) for name, objective in objectives.items()}


def log_probs(case: Case, solver: str, tolerance: float):
    """Return a function from x (n, dim) to log-densities (n,), by one solve of all rows."""
    solve = Solve(solver=solver, rtol=tolerance, atol=tolerance)

    @jax.jit
    def run(x):
        return _log_prob(case.flow, x, solve, dt0=_first_step(case), throw=False)[0]

    return run


def samples(case: Case, solver: str, tolerance: float):
    """Return a function from z (n, dim) to samples (n, dim), by one solve of x alone."""
    solve, field = Solve(solver=solver, rtol=tolerance, atol=tolerance), case.flow.bijection.field

    @jax.jit
    def run(z):
        def rates(t, x, field):
            return jax.vmap(field, in_axes=(None, 0))(t, x)

        settings = {"dt0": -_first_step(case), "throw": False}
        xs: Any = _solve(rates, 0.0, case.flow.bijection.t1, z, field, solve, **settings).ys
        return xs[-1]

    return run


def _first_step(case):
    return -case.solve.first_step * case.flow.bijection.t1


def _solve(rates, t0, t1, y0, args, solve, **options):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        METHODS[solve.solver](),
        t0,
        t1,
        y0=y0,
        args=args,
        stepsize_controller=diffrax.PIDController(rtol=solve.rtol, atol=solve.atol),
        **options,
    )


def _log_prob(flow, x, solve, **options):
    def rates(t, state, field):
        return jax.vmap(field.velocity_and_divergence, in_axes=(None, 0))(t, state[0])

    start = x, jnp.zeros(len(x), x.dtype)
    solution = _solve(rates, flow.bijection.t1, 0.0, start, flow.bijection.field, solve, **options)
    z, logdet = jax.tree.map(lambda y: y[-1], solution.ys)
    return flow.base.log_prob(z) + logdet, solution.stats["num_steps"]


def _batched_objective(case, **options):
    def objective(flow, x, key):
        log_probs, steps = _log_prob(flow, x, case.solve, **options)
        return -jnp.mean(log_probs), {"nfe": 6 * steps + 1}

    return objective


def _per_sample_objective(case, **options):
    def rates(t, state, field):
        return field.velocity_and_divergence(t, state[0])

    def objective(flow, x, key):
        def log_prob(x):
            start = x, jnp.zeros((), x.dtype)
            solution = _solve(
                rates, flow.bijection.t1, 0.0, start, flow.bijection.field, case.solve, **options
            )
            z, logdet = jax.tree.map(lambda y: y[-1], solution.ys)
            return flow.base.log_prob(z[None])[0] + logdet, solution.stats["num_steps"]

        log_probs, steps = jax.vmap(log_prob)(x)
        return -jnp.mean(log_probs), {"nfe": jnp.mean(6 * steps + 1)}

    return objective
