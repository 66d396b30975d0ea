"""The public functions: log-densities, samples and transformed points of any flow.

Each is compiled once per structure, shape and setting of its arguments.
"""

from collections.abc import Callable, Iterable
from typing import Any

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
from jcnf.ode import Solve, Stats, with_array_tolerances


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

    **Returns:** `Transformed(value, logdet, regularizers, stats)`, the regularizers by name.

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


@eqx.filter_jit
def _transform(flow, x, direction, key, context, solve, divergence, regularizers):
    divergence, noise = flow.with_noise(divergence, key, x)
    settings = context, solve, divergence, noise, regularizers
    if direction == "to_base":
        end = flow.bijection.inverse_and_log_det(x, *settings)
    else:
        end = flow.bijection.forward_and_log_det(x, *settings)

    def known(value):
        return jnp.where(end.stats.failed.reshape(-1, *[1] * (value.ndim - 1)), jnp.nan, value)

    value, logdet, costs = jax.tree.map(known, (end.value, end.logdet, end.regularizers))
    return Transformed(value, logdet, costs, end.stats)


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


@eqx.filter_jit
def _log_prob(flow, x, key, context, solve, divergence):
    divergence, noise = flow.with_noise(divergence, key, x)
    value, stats = solve_log_prob(flow, divergence, solve, x, context, noise)
    return value, stats.failed


def solve_log_prob(
    flow: Flow,
    divergence: Divergence,
    solve: Solve,
    x: Float[Array, "batch dim"],
    context: Float[Array, "batch context"] | None,
    noise: Any,
) -> tuple[Float[Array, " batch"], Stats]:
    """Compute `log_prob` with noise that has been drawn, and the statistics of its solve.

    It does not check its arguments or raise if a solve fails, and it is not compiled.
    """
    end = flow.bijection.inverse_and_log_det(x, context, solve, divergence, noise, ())
    return flow.base.log_prob(end.value) + end.logdet, end.stats


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


@eqx.filter_jit
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


@eqx.filter_jit
def _transform_without_logdet(flow, x, direction, context, solve):
    end, stats = solve_transform(flow, direction, solve, x, context)
    return end, stats.failed


def solve_transform(
    flow: Flow,
    direction: Direction,
    solve: Solve,
    x: Float[Array, "batch dim"],
    context: Float[Array, "batch context"] | None,
) -> tuple[Float[Array, "batch dim"], Stats]:
    """Carry a batch through the flow without its log-det, with the statistics of its solve.

    Like `solve_log_prob`, it does not check, raise or compile.
    """
    if direction == "to_base":
        return flow.bijection.inverse(x, context, solve)
    return flow.bijection.forward(x, context, solve)


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


@eqx.filter_jit
def _sample_and_log_prob(flow, z, key, context, solve, divergence):
    divergence, noise = flow.with_noise(divergence, key, z)
    end = flow.bijection.forward_and_log_det(z, context, solve, divergence, noise, ())
    return (end.value, flow.base.log_prob(z) - end.logdet), end.stats.failed
