"""Objectives of an ODE inside a flow, and of fields in less precision."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jcnf.chain import Chain, Composition
from jcnf.cnf import CNF, ODE, with_fields
from jcnf.fields import Cast
from jcnf.solve import Solve


def of_inner(objective: Callable) -> Callable:
    """An objective of a `jcnf.CNF`, such as flow matching, as one of a chain that starts with it.

    The chain's first part is a `jcnf.cnf.ODE`; its other ones, such as a preprocessing, carry the
    data to that, without a gradient of their own: they have to be fixed. Arguments are those of
    `objective`.

    **Raises:** `ValueError` for a flow of another make.
    """

    @functools.wraps(objective)  # what it can be given is to be seen
    def of_chain(flow, x, key, *, context=None, **settings):
        if not isinstance(flow, Chain) or not isinstance(flow.parts[0], ODE):
            raise ValueError("expected a jcnf.Chain whose first part is a jcnf.cnf.ODE")
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
