# pyright: reportMissingImports=false, reportCallIssue=false
"""torchdiffeq, used as in FFJORD and in its example of continuous normalizing flows."""

from collections.abc import Sequence

import jax
import jax.random as jr
import numpy as np
import torch
from torch import nn
from torchdiffeq import odeint, odeint_adjoint

from experiments.bench.cases import Case
from experiments.bench.peers import fields
from experiments.bench.quality import Learner
from experiments.bench.timing import Program

WAYS = {"adjoint": odeint_adjoint, "direct": odeint}
SOLVERS = ("bosh3", "dopri5", "dopri8")  # some of its adaptive ones


class Augmented(nn.Module):
    """dx/dt = v(t, x) and d logdet/dt = tr(dv/dx), by autograd."""

    def __init__(self, field: nn.Module, noise: torch.Tensor | None = None):
        super().__init__()
        self.field, self.noise = field, noise

    def forward(self, t, states):
        """Return both rates; the graph of the trace is kept only if it is differentiated."""
        x, differentiated = states[0], torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.requires_grad_(True)
            v = self.field(t, x)
            if self.noise is None:
                trace = brute_force(v, x, differentiated)
            else:
                (product,) = torch.autograd.grad(v, x, self.noise, create_graph=differentiated)
                trace = (product * self.noise).sum(1)
        return v, trace


def brute_force(v: torch.Tensor, x: torch.Tensor, differentiated: bool) -> torch.Tensor:
    """Return the trace by a backward pass for each dimension."""
    trace = 0.0
    for i in range(x.shape[1]):
        (row,) = torch.autograd.grad(
            v[:, i].sum(), x, create_graph=differentiated, retain_graph=True
        )
        trace = trace + row[:, i]
    return trace


def log_prob(case: Case, rates: Augmented, x: torch.Tensor, solve, tolerance, solver="dopri5"):
    """Return log-densities (batch,) by `solve`, one of torchdiffeq's two gradient methods."""
    z, logdet = solve(
        rates,
        (x, x.new_zeros(len(x))),
        x.new_tensor([case.flow.bijection.t1, 0.0]),
        rtol=tolerance,
        atol=tolerance,
        method=solver,
    )
    return fields.base_log_prob(case.flow, z[-1]) + logdet[-1]


def training_steps(
    case: Case, noise: np.ndarray | None = None, ways: Sequence[str] = tuple(WAYS)
) -> dict[str, Program]:
    """Return steps by the adjoint and by backpropagation.

    With noise (batch, dim), the trace is Hutchinson's estimate.
    """
    x, programs = fields.tensor(case.x), {}
    for way in ways:
        field = fields.Counted(case.flow.bijection.field)
        rates = Augmented(field, None if noise is None else fields.tensor(noise))

        def nll(rates=rates, way=way):
            return -log_prob(case, rates, x, WAYS[way], case.solve.rtol).mean()

        estimate = "" if noise is None else ", Hutchinson"
        programs[f"torchdiffeq {way}{estimate}"] = fields.training_step(nll, field)
    return programs


def log_probs(case: Case, solver: str, tolerance: float):
    """Return a function from x (n, dim) to log-densities (n,), by one solve of all rows."""
    rates = Augmented(fields.Counted(case.flow.bijection.field))
    return lambda x: fields.without_graph(
        lambda x: log_prob(case, rates, x, odeint, tolerance, solver), x
    )


def samples(case: Case, solver: str, tolerance: float):
    """Return a function from z (n, dim) to samples (n, dim), by one solve of x alone."""
    field = fields.Counted(case.flow.bijection.field)
    settings = {"rtol": tolerance, "atol": tolerance, "method": solver}

    def carry(rows):
        return odeint(field, rows, rows.new_tensor([0.0, case.flow.bijection.t1]), **settings)[-1]

    return lambda z: fields.without_graph(carry, z)


def learner(case: Case, weight_decay: float, seed: int) -> Learner:
    """Return FFJORD's training by the adjoint: a fresh batch each step, Adam at 1e-3."""
    field = fields.Counted(case.flow.bijection.field)
    rates, steps = Augmented(field), 0
    draw = jax.jit(lambda step: case.draw(jr.fold_in(jr.key(seed), step), case.batch))
    draw(0)  # compiles before the clock starts
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-3, weight_decay=weight_decay)

    def train(number):
        nonlocal steps
        for _ in range(number):
            x, steps = fields.tensor(draw(steps)), steps + 1
            optimizer.zero_grad()
            loss = -log_prob(case, rates, x, odeint_adjoint, case.solve.rtol).mean()
            loss.backward()
            optimizer.step()

    def evaluate(x):
        return fields.without_graph(lambda x: log_prob(case, rates, x, odeint, 1e-4), x)

    return Learner(train, evaluate)
