"""Couplings: which base sample goes with which data point in a minibatch.

A coupling is a function `coupling(key, x0, x1, context) -> (batch,)` of whole numbers: x0[i] with i
the value at j goes with x1[j]. Over many batches every coupling leaves both distributions as they
are; those by optimal transport make paths that hardly cross (Tong et al. 2024; Pooladian et al.
2023).

With a context, a base sample paired by x alone would depend on the context, and sampling from the
base would be wrong. Where there is one, base sample i is therefore given the context of data point
i, and the cost |x0 - x1|^2 + weight |c0 - c1|^2 keeps pairs of like contexts together (Kerrigan et
al. 2024, dynamic conditional optimal transport); the larger the weight the truer.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jcnf._checks import check_int, check_number

Context = Float[Array, "batch context"] | None
Coupling = Callable[
    [Key[Array, ""], Float[Array, "batch dim"], Float[Array, "batch dim"], Context],
    Int[Array, " batch"],
]


def independent(key, x0, x1, context):
    """Each with its own: x0[j] with x1[j]."""
    return jnp.arange(len(x0))


@dataclasses.dataclass(frozen=True)
class Transport(abc.ABC):
    """A coupling by optimal transport between the samples of a batch.

    **Arguments:**

    - `group`: pairs are sought among so many samples at a time, for the price grows faster than
      the batch; the last group may be smaller.
    - `context_weight`: of |c0 - c1|^2 in the cost.

    **Raises:** `ValueError` for a group below 2 or a weight that is negative.
    """

    group: int = 128
    context_weight: float = 100.0

    def __post_init__(self):
        check_int(2, group=self.group)
        check_number("[0, inf)", context_weight=self.context_weight)

    @abc.abstractmethod
    def pair(
        self, key: Key[Array, ""], points0: Float[Array, "n k"], points1: Float[Array, "n k"]
    ) -> Int[Array, " n"]:
        """The partner among `points0` of each of `points1`, for the cost |p0 - p1|^2."""

    def __call__(self, key, x0, x1, context):
        """Partners, group by group; consumes `key`."""
        # In units of the typical distance, which an entropy is relative to, whatever the context.
        centred = (x - jnp.mean(x, axis=0, keepdims=True) for x in (x0, x1))
        spread = sum(jnp.sum(jnp.mean(c**2, axis=0)) for c in centred)
        apart = jnp.sum((jnp.mean(x0, axis=0) - jnp.mean(x1, axis=0)) ** 2)
        scale = jax.lax.rsqrt(spread + apart)  # of the mean of |x0 - x1|^2 over all pairs
        points0, points1 = scale * x0, scale * x1
        if context is not None:
            scaled = scale * self.context_weight**0.5 * context
            points0, points1 = (jnp.concatenate([p, scaled], axis=1) for p in (points0, points1))
        starts = range(0, len(x0), self.group)
        keys = jr.split(key, len(starts))
        found = [
            start + self.pair(k, points0[start:][: self.group], points1[start:][: self.group])
            for k, start in zip(keys, starts, strict=True)
        ]
        return jnp.concatenate(found)


@dataclasses.dataclass(frozen=True)
class Exact(Transport):
    """The assignment of least cost, by scipy on the host: about 2 ms for a group of 128."""

    def pair(self, key, points0, points1):
        """By `scipy.optimize.linear_sum_assignment`; deterministic."""
        cost = jnp.sum((points1[:, None] - points0[None]) ** 2, axis=-1)
        shape = jax.ShapeDtypeStruct((len(points1),), jnp.int32)
        return jax.pure_callback(_assign, shape, cost, vmap_method="sequential")


def _assign(cost):
    from scipy.optimize import linear_sum_assignment

    cost = np.asarray(cost)
    # A batch that is not finite has no assignment, and its loss says so itself.
    return linear_sum_assignment(np.nan_to_num(cost, posinf=0.0))[1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Sinkhorn(Transport):
    """A draw from the entropic plan, by ott-jax on the device.

    - `epsilon`: strength of the entropy, relative to the mean of |x0 - x1|^2. As it falls the
      plan tends to the assignment of least cost, and takes more iterations to find.
    - `iterations`: at most so many; a plan that takes more draws some base samples too often.

    **Raises:** `ValueError` for an epsilon that is not positive, and for no iterations.
    """

    epsilon: float = 0.02
    iterations: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_number("(0, inf)", epsilon=self.epsilon)
        check_int(iterations=self.iterations)

    def pair(self, key, points0, points1):
        """A partner for each of `points1`, by its row of the plan; consumes `key`."""
        try:
            from ott.geometry.pointcloud import PointCloud
            from ott.problems.linear.linear_problem import LinearProblem
            from ott.solvers.linear.sinkhorn import Sinkhorn as Solver
        except ImportError:
            raise ValueError("a Sinkhorn coupling needs ott-jax: pip install ott-jax") from None

        geometry: Any = PointCloud(points1, points0, epsilon=self.epsilon)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            plan = Solver(max_iterations=self.iterations)(LinearProblem(geometry))
            # By the potentials: the plan itself may underflow.
            logits = (plan.f[:, None] + plan.g[None] - geometry.cost_matrix) / geometry.epsilon
        return jr.categorical(key, logits, axis=1).astype(jnp.int32)


COUPLINGS: dict[str, Coupling] = {
    "independent": independent,
    "exact": Exact(),
    "sinkhorn": Sinkhorn(),
}
