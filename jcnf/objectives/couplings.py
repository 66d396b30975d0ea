"""Couplings: rules that pair base samples with data points in a minibatch.

A coupling is a function `coupling(key, x0, x1, context) -> (batch,)` of whole numbers: if entry j
is i, then x0[i] is paired with x1[j]. On average over batches every coupling preserves both
distributions; optimal transport gives paths that hardly cross (Tong et al. 2024; Pooladian et al.
2023).

With a context, a base sample paired by x alone would depend on the context, and sampling from the
base would then be wrong. Therefore base sample i is given the context of data point i, and the cost
|x0 - x1|^2 + weight |c0 - c1|^2 favors pairs with similar contexts (Kerrigan et al. 2024, dynamic
conditional optimal transport). A larger weight leaves less dependence.
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
    """Pair x0[j] with x1[j], which are independent; consumes no key."""
    return jnp.arange(len(x0))


@dataclasses.dataclass(frozen=True)
class MinibatchOT(abc.ABC):
    """Coupling by optimal transport between the samples of a batch.

    **Arguments:**

    - `group`: pairs are sought within groups of this many samples, because the computing time grows
      faster than the group; the last group may be smaller.
    - `context_weight`: weight of |c0 - c1|^2 in the cost.

    **Raises:** `ValueError` if `group` is below 2 or `context_weight` is negative or not finite.
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
        """Return the partner in `points0` of each of `points1`, for the cost |p0 - p1|^2."""

    def __call__(self, key, x0, x1, context):
        """Return the partners, found group by group; splits `key` among the groups."""
        # Rescale x0 and x1 so that |x0 - x1|^2 has mean 1 over all pairs: `SinkhornOT.epsilon` is
        # relative to this mean, which does not depend on the contexts.
        centered = (x - jnp.mean(x, axis=0, keepdims=True) for x in (x0, x1))
        spread = sum(jnp.sum(jnp.mean(c**2, axis=0)) for c in centered)
        apart = jnp.sum((jnp.mean(x0, axis=0) - jnp.mean(x1, axis=0)) ** 2)
        scale = jax.lax.rsqrt(spread + apart)  # spread + apart is that mean
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
class ExactOT(MinibatchOT):
    """Assignment of least cost, by scipy on the host: about 2 ms for a group of 128."""

    def pair(self, key, points0, points1):
        """Return the result of `scipy.optimize.linear_sum_assignment`; consumes no key."""
        cost = jnp.sum((points1[:, None] - points0[None]) ** 2, axis=-1)
        shape = jax.ShapeDtypeStruct((len(points1),), jnp.int32)
        return jax.pure_callback(_assign, shape, cost, vmap_method="sequential")


def _assign(cost):
    from scipy.optimize import linear_sum_assignment

    cost = np.asarray(cost)
    # With NaN or inf there is no optimal assignment. Any one will do, because the loss of such a
    # batch is not finite either.
    return linear_sum_assignment(np.nan_to_num(cost, posinf=0.0))[1].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SinkhornOT(MinibatchOT):
    """Partners drawn from the entropic transport plan, computed by ott-jax on the device.

    **Arguments:** those of `MinibatchOT`, and

    - `epsilon`: strength of the entropy, relative to the mean of |x0 - x1|^2. As it falls, the
      plan tends to the assignment of least cost and takes more iterations to find.
    - `iterations`: the largest number of iterations. A plan that has not converged by then draws
      some base samples too often.

    **Raises:** `ValueError` if `epsilon` is not positive and finite, or `iterations` is below 1; on
    the first call, if ott-jax is not installed.
    """

    epsilon: float = 0.02
    iterations: int = 1000

    def __post_init__(self):
        super().__post_init__()
        check_number("(0, inf)", epsilon=self.epsilon)
        check_int(iterations=self.iterations)

    def pair(self, key, points0, points1):
        """Draw a partner for each of `points1` from its row of the plan; consumes `key`."""
        try:
            from ott.geometry.pointcloud import PointCloud
            from ott.problems.linear.linear_problem import LinearProblem
            from ott.solvers.linear.sinkhorn import Sinkhorn as Solver
        except ImportError:
            raise ValueError("SinkhornOT needs ott-jax: pip install ott-jax") from None

        geometry: Any = PointCloud(points1, points0, epsilon=self.epsilon)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            plan = Solver(max_iterations=self.iterations)(LinearProblem(geometry))
            # Use the potentials, because the plan itself may underflow.
            logits = (plan.f[:, None] + plan.g[None] - geometry.cost_matrix) / geometry.epsilon
        return jr.categorical(key, logits, axis=1).astype(jnp.int32)


COUPLINGS: dict[str, Coupling] = {
    "independent": independent,
    "exact": ExactOT(),
    "sinkhorn": SinkhornOT(),
}
