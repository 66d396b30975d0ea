"""The state of a training: parameters, their average, the optimizer's state, and metric sums."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jcnf.distributions import BaseDistribution
from jcnf.flows import Bijection
from jcnf.ode import unknown


class TrainState(eqx.Module):
    """Everything needed to continue training, as arrays; the random key is not part of it."""

    params: PyTree  # the trainable part of the model
    average: PyTree  # exponential moving average of params
    opt_state: PyTree
    step: Int[Array, ""]  # steps taken, including skipped ones
    skipped: Int[Array, ""]  # steps whose update was not applied
    stuck: Int[Array, ""]  # the number of skipped steps in a row, up to the last step
    rate: Float[Array, ""]  # factor of the updates; under AdamW, a factor of the learning rate
    step_plan: Float[Array, " parts"]  # for the next step's solve, see `jcnf.Solve`


class MetricSums(eqx.Module):
    """Sums of metrics, and counts of updates, over training steps."""

    sums: dict[str, Float[Array, ""]]  # metrics, summed over the applied updates
    applied: Int[Array, ""]  # number of applied updates
    skipped: dict[str, Int[Array, ""]]  # number of skipped updates: "skipped", and by reason


def means(totals: MetricSums) -> dict[str, Any]:
    """Return the mean of each metric over the applied updates, and the counts of skipped ones.

    Means are NaN if no update was applied.
    """
    of_all = {n: total / totals.applied.astype(total.dtype) for n, total in totals.sums.items()}
    return of_all | totals.skipped


def partition(model: PyTree) -> tuple[PyTree, PyTree]:
    """Split a flow, or a field, into its trainable arrays and the rest.

    All floating-point arrays are trainable, except those of distributions and of fixed bijections.
    """

    def is_fixed(node):
        untrained = isinstance(node, Bijection) and not node.is_trained
        return untrained or isinstance(node, BaseDistribution)

    def trainable(node):
        return jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf) and not is_fixed(node), node)

    return eqx.partition(model, jax.tree.map(trainable, model, is_leaf=is_fixed))


def init(model: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step.

    **Raises:** `ValueError` if `optimizer` is not an optax optimizer, or if the model has no
    trainable arrays.
    """
    check_optimizer(optimizer)
    params: Any = partition(model)[0]
    if not jax.tree.leaves(params):
        raise ValueError(
            "nothing to train: model must have floating-point arrays outside of base "
            f"distributions, which are not trained; got {type(model).__name__} without any"
        )
    zero = jnp.zeros((), jnp.int32)
    counts = {"step": zero, "skipped": zero, "stuck": zero}
    pace = {"rate": jnp.ones(()), "step_plan": unknown(float)}
    return TrainState(params, params, optimizer.init(params), **counts, **pace)


def with_params(model: PyTree, params: PyTree) -> Any:
    """Return `model` with other parameters, for example `state.average` to evaluate.

    **Raises:** `ValueError` if the shapes differ.
    """
    own, rest = partition(model)
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (own, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"params must have the shapes of this model's parameters, {shapes[0]}; got {shapes[1]}"
        )
    return eqx.combine(params, rest)


def check_optimizer(optimizer: Any) -> None:
    """Raise `ValueError` for anything but an optax optimizer."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            "optimizer must be an optax optimizer, such as jcnf.training.make_optimizer returns; "
            f"got {optimizer!r}"
        )
