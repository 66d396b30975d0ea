"""Objectives built from others: with a context, in another precision, summed."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from jcnf._checks import check_callable, check_key, check_number
from jcnf.fields import Cast
from jcnf.flows import Flow, with_fields
from jcnf.objectives.base import Loss, Objective


def with_context(objective: Objective) -> Objective:
    """Return `objective` in the form `objective(flow, batch, key)`, with any context in the batch.

    `batch` is x or a pair (x, context). Use it with `jcnf.training.make_train_loop`; `jcnf.fit`
    does so itself for pairs.
    """

    @functools.wraps(objective)
    def of_batch(flow, batch, key, **settings):
        x, context = batch if isinstance(batch, tuple) else (batch, None)
        return objective(flow, x, key, context=context, **settings)

    return of_batch


def without_solve(objective: Objective) -> Objective:
    """Return an objective that takes no solve, such as flow matching, as one that ignores it."""

    def of_solve(flow, x, key, *, solve=None, **settings):
        return objective(flow, x, key, **settings)

    return of_solve


def cast_fields(objective: Objective, dtype: Any) -> Objective:
    """Return `objective` with the fields of all ODEs computed in `dtype`, such as `jnp.bfloat16`.

    Parameters, gradients, states and losses keep their precision (`jcnf.fields.Cast`).
    """

    @functools.wraps(objective)
    def lowered(flow, *args, **settings):
        return objective(with_fields(flow, lambda field: Cast(field, dtype)), *args, **settings)

    return lowered


# How to combine metrics that more than one objective may report.
_MERGED = {"failed": operator.or_, "failed_rows": operator.add, "step_plan": jnp.maximum}


def weighted_sum(
    flow: Flow,
    x: Any,
    key: Key[Array, ""],
    *,
    weights: Mapping[Objective, float],
    **settings: Any,
) -> Loss:
    """Weighted sum of objectives on one batch, such as flow matching plus likelihood.

    `weights` maps objectives, with their settings bound, to their weights. `settings`, such as a
    context, are passed to all of them, and replace bound ones; if a `solve` is among them, wrap
    objectives that take none in `without_solve`. `key` is split among the objectives. The metrics
    are those of all objectives: "failed" is true if any failed, "failed_rows" is their sum,
    "step_plan" is the finest.

    **Raises:** `ValueError` if there are no objectives, if a weight is negative or not finite, or
    if two objectives report another metric of the same name.
    """
    if not weights or not isinstance(weights, Mapping):
        raise ValueError(
            "expected weights to map at least one objective to its weight, as in "
            f"{{objective: 1.0}}; got {weights!r}"
        )
    for objective, weight in weights.items():
        check_callable("a function such as those in jcnf.objectives", objective=objective)
        check_number("[0, inf)", weights=weight)
    check_key(key)
    losses, metrics = [], {}
    for key_of, (objective, weight) in zip(
        jr.split(key, len(weights)), weights.items(), strict=True
    ):
        value, more = objective(flow, x, key_of, **settings)
        twice = (metrics.keys() & more.keys()) - _MERGED.keys()
        if twice:
            raise ValueError(
                f"two objectives report a metric of the same name: {', '.join(sorted(twice))}"
            )
        both = {n: _MERGED[n](metrics[n], more[n]) for n in metrics.keys() & more.keys()}
        losses.append(weight * value)
        metrics = metrics | more | both
    return functools.reduce(operator.add, losses), metrics
