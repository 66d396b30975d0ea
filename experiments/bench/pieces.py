"""The effect of each extension of diffrax: a training step with one more of them at a time."""

import functools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp

from experiments.bench import ours
from experiments.bench.cases import Case
from experiments.bench.peers.diffrax_solves import CHECKPOINTS
from experiments.bench.report import Results
from experiments.bench.timing import measure
from jcnf import ode
from jcnf.ode import Solve

UNROLLED = ode.Unrolled(diffrax.Dopri5())
RECURSIVE = diffrax.RecursiveCheckpointAdjoint(checkpoints=CHECKPOINTS)
PIECES = {
    "batched diffrax, defaults": (diffrax.Dopri5(), None, diffrax.RecursiveCheckpointAdjoint()),
    "first step given, 32 checkpoints": (diffrax.Dopri5(), False, RECURSIVE),
    "+ stages unrolled": (UNROLLED, False, RECURSIVE),
    "+ step plan": (UNROLLED, True, RECURSIVE),
    "+ steps retaken once": (UNROLLED, True, ode.StepCheckpointAdjoint()),
}


def run(case: Case, rounds: int, seconds: float) -> Results:
    """Time a case's step, on a fresh batch each time, with every selection of pieces."""
    programs = {"+ rows that fail alone: jcnf": ours.training_step(case, fresh=True)}
    for name, pieces in PIECES.items():
        objective: Any = functools.partial(_objective, pieces=pieces, given=case.solve)
        programs[name] = ours.training_step(case, objective, fresh=True, carried=case.solve)
    return measure(programs, rounds, seconds=seconds)


def _objective(flow, x, key, *, solve: Any, pieces, given: Solve) -> Any:
    """Return the mean negative log-likelihood by one batched diffrax solve."""
    solver, planned, adjoint = pieces
    t0, t1 = (jnp.asarray(t, x.dtype) for t in (flow.bijection.t1, 0.0))
    controller = diffrax.PIDController(rtol=given.rtol, atol=given.atol)
    if planned is not None:
        plan = solve.step_plan.astype(x.dtype) if planned else ode.unknown(x.dtype)
        first = given.first_step * jnp.abs(t1 - t0)
        controller = ode.PlannedSteps(controller, first, plan, given.max_steps)

    def rates(t, state, field):
        return jax.vmap(field.velocity_and_divergence, in_axes=(None, 0))(t, state[0])

    solution: Any = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        solver,
        t0,
        t1,
        None,
        (x, jnp.zeros(len(x), x.dtype)),
        flow.bijection.field,
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=given.max_steps,
        throw=False,
    )
    z, logdet = jax.tree.map(lambda y: y[-1], solution.ys)
    metrics = {"nfe": 6 * solution.stats["num_steps"] + 1}
    if planned:
        metrics["step_plan"] = solution.controller_state.step_plan
    return -jnp.mean(flow.base.log_prob(z) + logdet), metrics
