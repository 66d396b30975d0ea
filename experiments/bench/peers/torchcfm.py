# pyright: reportMissingImports=false
"""Conditional flow matching in torchcfm, with the training loop of its tutorials."""

import torch
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

from experiments.bench.cases import Case
from experiments.bench.peers import fields
from experiments.bench.timing import Program


def matching_steps(case: Case, table, number: int, pairs) -> Program:
    """Return a program of `number` steps: rows of the table, noise, loss, gradient, AdamW.

    The loss among its figures is computed on the given `pairs`: noise x0, data x1 and times.
    """
    data = fields.tensor(table)
    field = fields.Counted(case.flow.bijection.field)
    matcher = ConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.AdamW(field.parameters(), lr=1e-3, weight_decay=0.0)

    def loss_of(x0, x1, t=None):
        t, xt, ut = matcher.sample_location_and_conditional_flow(x0, x1, t)
        return torch.mean((field(t, xt) - ut) ** 2)

    def run():
        for _ in range(number):
            optimizer.zero_grad()
            x1 = data[torch.randint(len(data), (case.batch,))]
            loss = loss_of(torch.randn_like(x1), x1)
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        loss = float(loss_of(*map(fields.tensor, pairs)))
    return Program(run, {"loss": loss}, number)
