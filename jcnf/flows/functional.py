"""The public functions: log-densities, samples and transformed points of any flow.

Each is compiled once per structure, shape and setting of its arguments.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key
from jcnf.divergence import Divergence, Exact
from jcnf.flows.base import (
    Direction,
    Flow,
    Transformed,
    check_batch,
    check_context,
    check_direction,
    check_flow,
    check_strategy,
    error_if_failed,
)
from jcnf.ode import Solve, with_array_tolerances


def compiled(function: Callable) -> Callable:
    """Compile `function(flow, ...)` once per structure, shape and setting of its arguments.

    A flow with parts that JAX cannot see into (plain functions, objects, mutable static attributes)
    is not compiled, at the price of compiling its loops at every call. A compiled program would
    keep the values it read from them when it was traced, even after they have changed.
    """
    jitted = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(flow, *arguments, **settings):
        return (function if _is_opaque(flow) else jitted)(flow, *arguments, **settings)

    return call


def _is_opaque(tree):
    """Return True if `tree` has a field that is not a pytree, or a mutable static attribute."""
    if isinstance(tree, eqx.Module):
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name, None)
            if _is_mutable(value) if field.metadata.get("static") else _is_opaque(value):
                return True
        return False
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, eqx.Module))
    if len(leaves) == 1 and leaves[0] is tree:
        return callable(tree) and hasattr(tree, "dim")  # a field; activations have no dim
    return any(map(_is_opaque, leaves))


def _is_mutable(value):
    try:
        hash(value)
    except TypeError:
        return True
    return False


def transform(
    flow: Flow,
    x: Float[Array, "batch dim"],
    *,
    direction: Direction = "to_base",
    key: Key[Array, ""] | None = None,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    regularizers: tuple[Callable, ...] = (),
) -> Transformed:
    """Carry a batch through the flow, with its log-det, regularizers and solver statistics.

    It never raises for rows that cannot be solved: all their values are NaN and `stats.failed` is
    true. They do not change the results of the other rows.

    **Arguments:**

    - `x`: (batch, dim), data for `direction="to_base"`, base samples for "to_data".
    - `key`: consumed once, by a stochastic `divergence` only.
    - `context`: (batch, context), for a conditional field.
    - `regularizers`: pure functions, such as those in `jcnf.regularizers`. Anything they read
      besides their arguments is read once, when the program is compiled.

    **Returns:** `Transformed(x, logdet, regularizers, stats)`, the regularizers by function name.

    **Raises:** `ValueError` for a wrong shape or dtype, an unknown direction or a missing key.
    """
    check_batch(flow, x, context)
    check_direction(direction)
    check_strategy(solve, divergence)
    if not isinstance(regularizers, Iterable) or not all(
        callable(r) and hasattr(r, "__name__") for r in regularizers
    ):
        raise ValueError(
            "regularizers must be a tuple of functions such as jcnf.regularizers.kinetic; "
            f"got {regularizers}"
        )
    if len({r.__name__ for r in regularizers}) < len(regularizers):
        names = [r.__name__ for r in regularizers]
        raise ValueError(f"regularizers must have distinct names; got {names}")
    x = jnp.asarray(x)
    solve = with_array_tolerances(solve, x.dtype)
    return _transform(flow, x, direction, key, context, solve, divergence, tuple(regularizers))


@compiled
def _transform(flow, x, direction, key, context, solve, divergence, regularizers):
    result = flow.transform_and_log_det(x, direction, key, context, solve, divergence, regularizers)
    failed = result.stats.failed

    def known(value):
        return jnp.where(failed.reshape(-1, *[1] * (value.ndim - 1)), jnp.nan, value)

    x, logdet, regularizers = jax.tree.map(known, (result.x, result.logdet, result.regularizers))
    return Transformed(x, logdet, regularizers, result.stats)


def log_prob(
    flow: Flow,
    x: Float[Array, "batch dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
) -> Float[Array, " batch"]:
    """Return the log-density of each sample in nats, (batch,): base.log_prob(z) + logdet.

    With `divergence=Exact()` it is exact up to the solver's tolerance. With a stochastic divergence
    it is an unbiased estimate, whose noise consumes `key` once.

    **Raises:** `ValueError` for wrong shapes; `equinox.EquinoxRuntimeError` if the solve fails.
    """
    check_batch(flow, x, context)
    check_strategy(solve, divergence)
    x = jnp.asarray(x)
    solve = with_array_tolerances(solve, x.dtype)
    return error_if_failed(*_log_prob(flow, x, key, context, solve, divergence))


@compiled
def _log_prob(flow, x, key, context, solve, divergence):
    result = flow.transform_and_log_det(x, "to_base", key, context, solve, divergence, ())
    return flow.base.log_prob(result.x) + result.logdet, result.stats.failed


def sample(
    flow: Flow,
    key: Key[Array, ""],
    num_samples: int,
    *,
    context: Float[Array, "num_samples context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> Float[Array, "num_samples dim"]:
    """Return samples (num_samples, dim), solving for x without its log-det; consumes `key`.

    **Raises:** `ValueError` for wrong shapes; `equinox.EquinoxRuntimeError` if the solve fails.
    """
    check_flow(flow)
    check_strategy(solve)
    check_int(num_samples=num_samples)
    check_context(flow, num_samples, context)
    z = _sample_base(flow.base, key, int(num_samples))
    check_batch(flow, z, context)
    return transform_without_logdet(flow, z, "to_data", context, solve)


@compiled
def _sample_base(base, key, num_samples):
    return base.sample(key, num_samples)


def transform_without_logdet(
    flow: Flow,
    x: Float[Array, "batch dim"],
    direction: Direction,
    context: Float[Array, "batch context"] | None,
    solve: Solve,
) -> Float[Array, "batch dim"]:
    """Carry a batch that has been checked through the flow, and return its end, (batch, dim).

    **Raises:** `ValueError` for tolerances that the dtype of `x` cannot meet;
    `equinox.EquinoxRuntimeError` if the solve of a row fails.
    """
    solve = with_array_tolerances(solve, x.dtype)
    return error_if_failed(*_transform_without_logdet(flow, x, direction, context, solve))


@compiled
def _transform_without_logdet(flow, x, direction, context, solve):
    end, stats = flow.transform(x, direction, context, solve)
    return end, stats.failed


def sample_and_log_prob(
    flow: Flow,
    key: Key[Array, ""],
    num_samples: int,
    *,
    context: Float[Array, "num_samples context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, "num_samples dim"], Float[Array, " num_samples"]]:
    """Return samples (num_samples, dim) and their log-densities in nats, (num_samples,).

    Both come from one solve. Consumes `key`, split between the base and the divergence's noise.

    **Raises:** `ValueError` for wrong shapes; `equinox.EquinoxRuntimeError` if the solve fails.
    """
    check_flow(flow)
    check_strategy(solve, divergence)
    check_key(key)
    check_int(num_samples=num_samples)
    check_context(flow, num_samples, context)
    base_key, noise_key = jax.random.split(key)
    z = _sample_base(flow.base, base_key, int(num_samples))
    check_batch(flow, z, context)
    solve = with_array_tolerances(solve, z.dtype)
    return error_if_failed(*_sample_and_log_prob(flow, z, noise_key, context, solve, divergence))


@compiled
def _sample_and_log_prob(flow, z, key, context, solve, divergence):
    result = flow.transform_and_log_det(z, "to_data", key, context, solve, divergence, ())
    return (result.x, flow.base.log_prob(z) - result.logdet), result.stats.failed
