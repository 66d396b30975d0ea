"""How right the gradient of an adjoint is, for anyone to see."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import equinox as eqx
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from jcnf.divergence import Divergence, Drawn, Exact
from jcnf.evaluate.doubled import in_float64
from jcnf.flow import CNF
from jcnf.objectives import likelihood
from jcnf.solve import Solve
from jcnf.train import differentiator, partition

REFERENCE = Solve(solver="dopri8", rtol=1e-9, atol=1e-9, max_steps=4096)
DIFFERENCE = 1e-3


class GradientAudit(NamedTuple):
    """Relative errors |g - g'| / |g'| of a gradient of the loss in all parameters."""

    to_discretised: float  # g' backpropagates through the steps of the same solver
    to_true: float  # g' is that of the exact flow: in float64, at a tolerance of 1e-9
    of_reference: float  # that g' itself, along itself, against central differences of the loss
    failed: bool  # whether a solve failed, so that the rest means nothing


def audit_gradients(
    flow: CNF,
    x: Float[Array, "batch dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    penalties: Mapping[Callable, float] = MappingProxyType({}),
) -> GradientAudit:
    """Compare the gradient of `jcnf.objectives.likelihood` under `solve.adjoint` with three others.

    Discretise-then-optimise through the same solver, the same at high accuracy, and finite
    differences of the loss (of order 4, along the gradient). All share one draw of the noise of a
    stochastic `divergence`, which consumes `key`.
    """
    noise = divergence.draw(key, len(x), x.shape[1], x.dtype)
    arguments = (flow, x, context, Drawn(divergence, noise))
    weights = tuple(penalties.items())  # hashable: what was compiled serves the next audit
    checkpointed = dataclasses.replace(solve, adjoint="checkpoint")

    own, failed = _gradient(weights, solve, *arguments)
    discretised, also_failed = _gradient(weights, checkpointed, *arguments)
    true, never_failed = in_float64(functools.partial(_gradient, weights, REFERENCE), *arguments)
    norm = np.linalg.norm(true)
    steps = in_float64(functools.partial(_losses_along, weights, true / norm), *arguments)
    slope = (8 * (steps[1] - steps[-1]) - steps[2] + steps[-2]) / (12 * DIFFERENCE)
    return GradientAudit(
        to_discretised=_relative(own, discretised),
        to_true=_relative(own, true),
        of_reference=float(abs(slope - norm) / norm),
        failed=bool(failed | also_failed | never_failed),
    )


def _relative(own, other):
    return float(np.linalg.norm(own - other) / np.linalg.norm(other))


@eqx.filter_jit
def _loss_and_gradient(weights, solve, flow, x, context, divergence):
    params, static = partition(flow)
    loss = functools.partial(
        likelihood,
        x=x,
        key=None,
        context=context,
        solve=solve,
        divergence=divergence,
        penalties=dict(weights),
    )
    differentiated = differentiator(solve)(lambda params: loss(eqx.combine(params, static)))
    (value, metrics), gradient = differentiated(params)
    return value, ravel_pytree(gradient)[0], metrics["failed"]


def _gradient(weights, solve, *arguments):
    _, gradient, failed = _loss_and_gradient(weights, solve, *arguments)
    return np.asarray(gradient, np.float64), np.asarray(failed)


def _losses_along(weights, direction, flow, *rest):
    """The loss at multiples -2 to 2 of `DIFFERENCE` along a direction, by multiple."""
    params, static = partition(flow)
    flat, unravel = ravel_pytree(params)

    def at(multiple):
        moved = eqx.combine(unravel(flat + multiple * DIFFERENCE * direction), static)
        return float(_loss_and_gradient(weights, REFERENCE, moved, *rest)[0])

    return {multiple: at(multiple) for multiple in (-2, -1, 1, 2)}
