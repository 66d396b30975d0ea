# pyright: reportMissingImports=false
"""zuko's CNF: its free-form Jacobian transform, by dopri5 with its checkpointed adjoint."""

import torch
from zuko.transforms import FreeFormJacobianTransform

from experiments.bench.cases import Case
from experiments.bench.peers import fields
from experiments.bench.timing import Program

SOLVERS = ("dopri5",)  # its only one


def _transform(case, field, tolerance):
    return FreeFormJacobianTransform(
        field,
        t0=torch.tensor(case.flow.bijection.t1),
        t1=torch.tensor(0.0),
        phi=field.parameters(),
        atol=tolerance,
        rtol=tolerance,
    )


def _log_prob(case, field, x, tolerance):
    z, logdet = _transform(case, field, tolerance).call_and_ladj(x)
    return fields.base_log_prob(case.flow, z) + logdet


def training_steps(case: Case) -> dict[str, Program]:
    """Return its only kind of step; its error control divides the log-det by a hundred."""
    x, field = fields.tensor(case.x), fields.Counted(case.flow.bijection.field)
    return {
        "zuko": fields.training_step(
            lambda: -_log_prob(case, field, x, case.solve.rtol).mean(), field
        )
    }


def log_probs(case: Case, solver: str, tolerance: float):
    """Return a function from x (n, dim) to log-densities (n,), by one solve of all rows."""
    field = fields.Counted(case.flow.bijection.field)
    return lambda x: fields.without_graph(lambda x: _log_prob(case, field, x, tolerance), x)


def samples(case: Case, solver: str, tolerance: float):
    """Return a function from z (n, dim) to samples (n, dim), by one solve of x alone."""
    field = fields.Counted(case.flow.bijection.field)
    return lambda z: fields.without_graph(_transform(case, field, tolerance).inv, z)
