"""Several objectives at once."""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf import require
from jcnf.flow import Flow
from jcnf.solve import Solve

_MERGED = {"failed": operator.or_, "failed_rows": operator.add, "step_plan": jnp.maximum}


def mixed(
    flow: Flow,
    x: Any,
    key: Key[Array, ""],
    *,
    weights: Mapping[Callable, float],
    solve: Solve | None = None,
    **settings: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The weighted sum of objectives on one batch: flow matching together with likelihood, say.

    `weights` maps objectives, settings bound, to their weights; `settings`, a context, go to
    all, and `solve` to those that take one, in place of one that is bound. `key` is split among
    them. The metrics are those of all; "failed" where any failed, and the finest "step_plan".

    **Raises:** `ValueError` for no objectives, a weight that is negative or not finite, and where
    two have a metric of one name.
    """
    if not weights or not isinstance(weights, Mapping):
        raise ValueError(
            f"mixed needs objectives: give weights={{objective: weight}}; got {weights!r}"
        )
    for objective, weight in weights.items():
        require.function("a function, as those of jcnf.objectives are", objective=objective)
        require.number("[0, inf)", weights=weight)
    require.one_key(key)
    losses, metrics = [], {}
    for key_of, (objective, weight) in zip(
        jr.split(key, len(weights)), weights.items(), strict=True
    ):
        solves = solve is not None and "solve" in inspect.signature(objective).parameters
        own = {"solve": solve} if solves else {}
        value, more = objective(flow, x, key_of, **settings, **own)
        twice = (metrics.keys() & more.keys()) - _MERGED.keys()
        if twice:
            raise ValueError(
                f"two objectives have a metric of one name: {', '.join(sorted(twice))}"
            )
        both = {n: _MERGED[n](metrics[n], more[n]) for n in metrics.keys() & more.keys()}
        losses.append(weight * value)
        metrics = metrics | more | both
    return functools.reduce(operator.add, losses), metrics
