"""Objectives made of others: with a context, a weighted sum, in another precision."""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_callable, check_key, check_number
from jcnf.fields import Cast
from jcnf.flows import CNF, ODE, Chain, Composition, Flow, with_fields
from jcnf.ode import Solve


def with_context(objective: Callable) -> Callable:
    """An objective of x and a context as one of a batch: x, or a pair (x, context).

    That is what `jcnf.training.make_run` trains by: `objective(flow, batch, key)`. Settings go on.
    """

    @functools.wraps(objective)  # what it can be given is to be seen
    def of_batch(flow, batch, key, **settings):
        x, context = batch if isinstance(batch, tuple) else (batch, None)
        return objective(flow, x, key, context=context, **settings)

    return of_batch


def of_inner(objective: Callable) -> Callable:
    """An objective of a `jcnf.CNF`, such as flow matching, as one of a chain that starts with it.

    The chain's first part is a `jcnf.flows.ODE`; its other ones, such as a preprocessing, carry the
    data to that, without a gradient of their own: they have to be fixed. Arguments are those of
    `objective`.

    **Raises:** `ValueError` for a flow of another make.
    """

    @functools.wraps(objective)  # what it can be given is to be seen
    def of_chain(flow, x, key, *, context=None, **settings):
        if not isinstance(flow, Chain) or not isinstance(flow.parts[0], ODE):
            raise ValueError("expected a jcnf.Chain whose first part is a jcnf.flows.ODE")
        ode: Any = flow.parts[0]
        outer = flow.parts[1:]
        if outer:
            x = jax.lax.stop_gradient(Composition(outer).carry(x, "to_base", context, Solve())[0])
        return objective(CNF(ode.field, flow.base, ode.t1), x, key, context=context, **settings)

    return of_chain


def in_precision(objective: Callable, dtype: Any) -> Callable:
    """`objective` with the fields of all ODEs computed in `dtype`, such as `jnp.bfloat16`.

    Parameters, gradients, states and losses keep the precision they have (`jcnf.fields.Cast`).
    """

    @functools.wraps(objective)
    def lowered(flow, *args, **settings):
        return objective(with_fields(flow, lambda field: Cast(field, dtype)), *args, **settings)

    return lowered


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
        check_callable("a function, as those of jcnf.objectives are", objective=objective)
        check_number("[0, inf)", weights=weight)
    check_key(key)
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
