"""Several objectives at once."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf import require
from jcnf.flow import Flow


def mixed(
    flow: Flow,
    x: Any,
    key: Key[Array, ""],
    *,
    weights: Mapping[Callable, float],
    **settings: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted sum of objectives on one batch: flow matching together with likelihood, say.

    `weights` maps objectives, settings bound, to their weights; `settings`, a context, go to
    all. `key` is split among them. The metrics are those of all; "failed" where any failed.

    **Raises:** `ValueError` for no objectives, a weight that is negative or not finite, and where
    two have a metric of one name.
    """
    if not weights:
        raise ValueError("mixed needs objectives: give weights={objective: weight}")
    for objective, weight in weights.items():
        require.function("a function, as those of jcnf.objectives are", objective=objective)
        require.number("[0, inf)", weights=weight)
    require.one_key(key)
    losses, metrics = [], {}
    for key_of, (objective, weight) in zip(
        jr.split(key, len(weights)), weights.items(), strict=True
    ):
        value, more = objective(flow, x, key_of, **settings)
        twice = (metrics.keys() & more.keys()) - {"failed"}
        if twice:
            raise ValueError(
                f"two objectives have a metric of one name: {', '.join(sorted(twice))}"
            )
        if "failed" in metrics and "failed" in more:
            more = more | {"failed": metrics["failed"] | more["failed"]}
        losses.append(weight * value)
        metrics = metrics | more
    return functools.reduce(operator.add, losses), metrics
