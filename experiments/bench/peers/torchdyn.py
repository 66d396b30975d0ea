# pyright: reportMissingImports=false
"""torchdyn's CNF inside its NeuralODE."""

import contextlib
import io

import torch
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models import CNF

from experiments.bench.cases import Case
from experiments.bench.peers import fields
from experiments.bench.timing import Program


class FromData(nn.Module):
    """The velocity in reversed time, because torchdyn has the data at 0; it sets the time `t`."""

    def __init__(self, field: nn.Module, t1: float):
        super().__init__()
        self.field, self.t1, self.t = field, t1, torch.zeros(())

    def forward(self, x):
        return -self.field(self.t1 - self.t, x)


def training_steps(case: Case) -> dict[str, Program]:
    """Return steps by the adjoint and by backpropagation."""
    x, programs = fields.tensor(case.x), {}
    span = x.new_tensor([0.0, case.flow.bijection.t1])
    tolerances = dict.fromkeys(["atol", "rtol", "atol_adjoint", "rtol_adjoint"], case.solve.rtol)
    for sensitivity in ("adjoint", "autograd"):
        field = fields.Counted(case.flow.bijection.field)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it wraps the field
            model = NeuralODE(
                CNF(FromData(field, case.flow.bijection.t1)),
                solver="dopri5",
                sensitivity=sensitivity,
                return_t_eval=False,
                **tolerances,
            )

        def nll(model=model):
            start = torch.cat([x.new_zeros(len(x), 1), x], 1)
            end = model(start, span)[-1]
            return -(fields.base_log_prob(case.flow, end[:, 1:]) - end[:, 0]).mean()

        programs[f"torchdyn {sensitivity}"] = fields.training_step(nll, field)
    return programs
