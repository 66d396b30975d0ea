"""The flows that are timed, with the weights, batches and solves that all programs share."""

import dataclasses
import functools
from collections.abc import Callable

import jax.random as jr
from jaxtyping import Array, Key

from experiments._tasks.pretrained import train_by_likelihood
from jcnf import CNF, Flow, Solve, distributions, fields
from jcnf.data.toys import toy

TOLERANCE = 1e-5
SOLVE = Solve(rtol=TOLERANCE, atol=TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Case:
    """A flow, its data distribution and its batch size."""

    title: str
    flow: Flow
    draw: Callable[[Key[Array, ""], int], Array]  # (key, n) -> (n, dim)
    batch: int
    head: int = 10_000  # number of points on which errors are measured
    estimated: bool = False  # whether to time a stochastic divergence too
    solve: Solve = SOLVE

    @functools.cached_property
    def x(self) -> Array:
        """The training batch."""
        return self.draw(jr.key(2), self.batch)


def _toy(steps):
    field = fields.MLP(2, (64, 64, 64), time="concatsquash", activation="tanh", key=jr.key(0))
    flow = CNF(field, distributions.StandardNormal(2), t1=0.5)
    data, weights = toy("8gaussians"), "initial"
    if steps:
        flow, weights = train_by_likelihood(flow, data.sample, steps), f"after {steps} steps"
    return Case(f"2-D, concatsquash 64-64-64 tanh, {weights}", flow, data.sample, 100)


def _circles(steps):
    flow = CNF(
        fields.Planar(2, 64, 32, key=jr.key(1)), distributions.ScaledNormal(2, 0.1**0.5), t1=10.0
    )
    return Case("two circles, planar 64, hypernet 32, initial", flow, toy("2circles").sample, 512)


def table(dim: int = 43, width: int = 256, batch: int = 512) -> Case:
    """Return the case of a table with `dim` columns: two hidden layers at initial weights."""
    field = fields.MLP(dim, (width, width), time="concat", activation="softplus", key=jr.key(3))
    return Case(
        f"{dim}-D, {width}-{width} softplus, initial",
        CNF(field, distributions.StandardNormal(dim)),
        lambda key, n: jr.normal(key, (n, dim)),
        batch,
        head=1000,
        estimated=True,
    )


CASES: dict[str, Callable[[int], Case]] = {  # functions of the number of pretraining steps
    "toy": lambda steps: _toy(0),
    "toy_trained": _toy,
    "circles": _circles,
    "table": lambda steps: table(),
}
