"""Flows trained on the spot, for experiments that measure something else about them."""

from collections.abc import Callable

import jax.random as jr
from jaxtyping import Array, Key

from experiments._runner.stages import Stage, fresh_batches, train_stages
from jcnf import CNF, Flow, Solve, distributions, fields, objectives, training
from jcnf.data.toys import toy


def train_by_likelihood(
    flow: Flow, sample: Callable[[Key[Array, ""], int], Array], steps: int, seed: int = 0
) -> Flow:
    """Return `flow` after `steps` of likelihood on `sample(key, num)`, without averaging."""
    solve = Solve(rtol=1e-4, atol=1e-4)
    optimizer = training.make_optimizer(2e-3, max(steps, 1))
    stage = Stage(objectives.likelihood, steps, optimizer, solve, average=0.0, batch=256)
    return train_stages(flow, [stage], fresh_batches(sample), seed=seed).flow


def toy_flow(steps: int, seed: int = 0) -> Flow:
    """Return a 2-D flow with layers 64-64-64 (tanh) after `steps` steps on 8gaussians."""
    field = fields.MLP(2, (64, 64, 64), time="concat", key=jr.key(seed))
    flow = CNF(field, distributions.StandardNormal(2))
    return train_by_likelihood(flow, toy("8gaussians").sample, steps, seed)
