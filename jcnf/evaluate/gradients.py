"""Accuracy of the gradients that an adjoint gives."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from jcnf.divergence import Divergence, Exact, FixedNoise
from jcnf.evaluate.log_prob import check_data
from jcnf.evaluate.precision import in_float64
from jcnf.flows import Flow
from jcnf.objectives import likelihood
from jcnf.ode import Solve
from jcnf.training import differentiator, partition

REFERENCE = Solve(solver="dopri8", rtol=1e-9, atol=1e-9, max_steps=4096)
FINITE_DIFFERENCE_STEP = 1e-3


class GradientAudit(NamedTuple):
    """Relative errors |g - g'| / |g'| of the loss's gradient in all parameters."""

    # g' backpropagates through the steps of the same solver. The adjoint "reversible" takes other
    # steps than the solver, so for it this is the difference between the two schemes.
    to_discretized: float
    to_true: float  # g' is the gradient of the exact flow: in float64, at a tolerance of 1e-9
    of_reference: float  # error of that g', along itself, against central differences
    failed: bool  # whether a solve failed; then the other fields mean nothing


def audit_gradients(
    flow: Flow,
    x: Float[Array, "batch dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    regularizers: Mapping[Callable, float] = MappingProxyType({}),
) -> GradientAudit:
    """Compare the gradient of `jcnf.objectives.likelihood` under `solve.adjoint` with three others.

    They are discretize-then-optimize through the same solver, the same at high accuracy, and finite
    differences of the loss (of order 4, along the gradient). All share one draw of the noise of a
    stochastic `divergence`, which consumes `key`.

    **Raises:** `ValueError` as `jcnf.evaluate.log_prob` does.
    """
    check_data(flow, x, context, solve, divergence)
    _, noise = flow.with_noise(divergence, key, jnp.asarray(x))
    arguments = (flow, x, context, FixedNoise(divergence, noise), tuple(regularizers.items()))
    own, failed = _gradient(solve, *arguments)
    checkpointed = dataclasses.replace(solve, adjoint="checkpoint")
    discretized, also_failed = _gradient(checkpointed, *arguments)
    true, never_failed = in_float64(_gradient, REFERENCE, *arguments)
    norm = np.linalg.norm(true)
    slope = in_float64(_slope, true / norm, *arguments)
    return GradientAudit(
        to_discretized=relative_error(own, discretized),
        to_true=relative_error(own, true),
        of_reference=float(abs(slope - norm) / norm),
        failed=bool(failed | also_failed | never_failed),
    )


def loss_gradient(
    flow: Flow, x: Float[Array, "batch dim"], *, solve: Solve = REFERENCE
) -> tuple[np.ndarray, bool]:
    """Return the gradient of the mean NLL in all parameters, flat, and whether its solve failed.

    The divergence is exact. With the default solve and inside `in_float64`, the gradient is a
    reference for others.
    """
    check_data(flow, x, solve=solve)
    gradient, failed = _gradient(solve, flow, x, None, Exact(), ())
    return gradient, bool(failed)


def relative_error(gradient: np.ndarray, reference: np.ndarray) -> float:
    """Return |g - g'| / |g'|.

    **Raises:** `ValueError` if the gradients have different shapes.
    """
    if np.shape(gradient) != np.shape(reference):
        raise ValueError(
            "expected gradients of the same shape; got "
            f"{np.shape(gradient)} and {np.shape(reference)}"
        )
    return float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))


def _loss_of(flow, solve, x, context, divergence, weights):
    # `weights` is a tuple because it must be hashable, so that the next audit can reuse what was
    # compiled.
    return likelihood(
        flow,
        x,
        None,
        context=context,
        solve=solve,
        divergence=divergence,
        regularizers=dict(weights),
    )


@eqx.filter_jit
def _loss(solve, flow, *rest):
    return _loss_of(flow, solve, *rest)[0]


@eqx.filter_jit
def _flat_gradient(solve, flow, *rest):
    params, static = partition(flow)
    differentiated = differentiator(solve)(
        lambda params: _loss_of(eqx.combine(params, static), solve, *rest)
    )
    (_, metrics), gradient = differentiated(params)
    return ravel_pytree(gradient())[0], metrics["failed_rows"] > 0


def _gradient(solve, *arguments):
    gradient, failed = _flat_gradient(solve, *arguments)
    return np.asarray(gradient, np.float64), np.asarray(failed)


def _slope(direction, flow, *rest):
    """Return the derivative of the loss along a direction, by central differences."""
    params, static = partition(flow)
    flat, unravel = ravel_pytree(params)

    def at(multiple):
        moved = eqx.combine(unravel(flat + multiple * FINITE_DIFFERENCE_STEP * direction), static)
        return float(_loss(REFERENCE, moved, *rest))

    return (8 * (at(1) - at(-1)) - at(2) + at(-2)) / (12 * FINITE_DIFFERENCE_STEP)
