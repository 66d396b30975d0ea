"""Flows, and the pure functions people import.

t=0 is the base and t=T the data (T = `flow.t1` of a continuous flow). Along the direction taken,
`logdet` is log|det d end / d start|, so that from data to base
`log_prob(x) = base.log_prob(z) + logdet`, and from base to data
`log_prob(x) = base.log_prob(z) - logdet`.
"""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from jcnf import require
from jcnf.distributions import Base
from jcnf.divergence import Divergence, Exact
from jcnf.solve import Solve, Stats, with_array_tolerances

Direction = Literal["to_base", "to_data"]


def compiled(function: Callable) -> Callable:
    """Compile `function(flow, ...)` once for each structure, shape and setting of its arguments.

    A flow that holds what JAX cannot see into is run as it is, at the price of compiling its loops
    at every call. Compiled, it would keep the values that were read when it was traced, whatever
    became of them since.
    """
    jitted = eqx.filter_jit(function)

    @functools.wraps(function)
    def call(flow, *arguments, **settings):
        return (function if _is_opaque(flow) else jitted)(flow, *arguments, **settings)

    return call


def _is_opaque(tree):
    """Whether a field in it is no pytree (a function, an object), or a static attribute mutable."""
    if isinstance(tree, eqx.Module):
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name, None)
            if _is_mutable(value) if field.metadata.get("static") else _is_opaque(value):
                return True
        return False
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, eqx.Module))
    if len(leaves) == 1 and leaves[0] is tree:
        return callable(tree) and hasattr(tree, "dim")  # as a field has, and no activation
    return any(map(_is_opaque, leaves))


def _is_mutable(value):
    try:
        hash(value)
    except TypeError:
        return True
    return False


class Transformed(NamedTuple):
    """What `transform` returns."""

    x: Float[Array, "batch dim"]  # at the end of the direction solved
    logdet: Float[Array, " batch"]  # log|det d end / d start|, nats
    penalties: dict[str, Float[Array, " batch"]]  # integrals over |dt|, positive
    stats: Stats


class Bijection(eqx.Module):
    """A bijection of vectors, from the base's side to the data's: a flow, or a part of one.

    A subclass says how a batch is carried, with and without its log-det. Both methods get batches
    that were checked, and neither raises for a solve that fails: it is `stats.failed`.
    """

    @property
    @abstractmethod
    def context_dim(self) -> int | None:
        """Size of the context taken, 0 for none; None where it is not known."""

    @abstractmethod
    def carry(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
    ) -> tuple[Float[Array, "batch dim"], Stats]:
        """The batch at the other end, and what it cost."""

    @abstractmethod
    def carry_with_logdet(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        key: Key[Array, ""] | None,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
        divergence: Divergence,
        regularizers: tuple[Callable, ...],
    ) -> Transformed:
        """The batch at the other end, its log-det and its penalties, and what it cost."""

    def draw_noise(
        self, divergence: Divergence, key: Key[Array, ""] | None, batch: int, dim: int, dtype
    ) -> Any:
        """What `carry_with_logdet` would draw from `key`: arrays with leading axis `batch`.

        `jcnf.divergence.Drawn` takes it in place of a key. None where nothing is drawn.
        """
        return None


class Flow(Bijection):
    """A bijection between base samples and data. A pytree, nothing more.

    The functions below, and whatever stands on them, serve any subclass as they serve `jcnf.CNF`.
    """

    base: eqx.AbstractVar[Base]


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
    """Carry a batch through the flow, with its log-det, penalties and solver statistics.

    It never raises for rows that cannot be solved: all that belongs to them is NaN, and
    `stats.failed` is true. They do not change what the other rows become.

    **Arguments:**

    - `x`: (batch, dim), data for `direction="to_base"`, base samples for "to_data".
    - `key`: consumed once, by a stochastic `divergence` only.
    - `context`: (batch, context), for a conditional field.
    - `regularizers`: pure functions, as in `jcnf.regularizers`. What they read besides their
      arguments is read once, when the program is compiled.

    **Returns:** `Transformed(x, logdet, penalties, stats)`, the penalties by function name.

    **Raises:** `ValueError` for a wrong shape or dtype, an unknown direction, a missing key.
    """
    check_batch(flow, x, context)
    check_direction(direction)
    check_strategy(solve, divergence)
    if not isinstance(regularizers, Iterable) or not all(
        callable(r) and hasattr(r, "__name__") for r in regularizers
    ):
        raise ValueError(
            f"expected a tuple of functions as in jcnf.regularizers; got {regularizers}"
        )
    if len({r.__name__ for r in regularizers}) < len(regularizers):
        names = [r.__name__ for r in regularizers]
        raise ValueError(f"regularizers must have names of their own; got {names}")
    x = jnp.asarray(x)
    solve = with_array_tolerances(solve, x.dtype)
    return _transform(flow, x, direction, key, context, solve, divergence, tuple(regularizers))


@compiled
def _transform(flow, x, direction, key, context, solve, divergence, regularizers):
    result = flow.carry_with_logdet(x, direction, key, context, solve, divergence, regularizers)
    failed = result.stats.failed

    def known(value):
        return jnp.where(failed.reshape(-1, *[1] * (value.ndim - 1)), jnp.nan, value)

    x, logdet, penalties = jax.tree.map(known, (result.x, result.logdet, result.penalties))
    return Transformed(x, logdet, penalties, result.stats)


def log_prob(
    flow: Flow,
    x: Float[Array, "batch dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
) -> Float[Array, " batch"]:
    """Log-density in nats of each sample, (batch,): base.log_prob(z) + logdet.

    Exact up to the solver's tolerance with `divergence=Exact()`; with a stochastic divergence an
    unbiased estimate, whose noise takes `key` (consumed once).

    **Raises:** `ValueError` for bad shapes; `equinox.EquinoxRuntimeError` when the solve fails.
    """
    check_batch(flow, x, context)
    check_strategy(solve, divergence)
    x = jnp.asarray(x)
    solve = with_array_tolerances(solve, x.dtype)
    return error_if_failed(*_log_prob(flow, x, key, context, solve, divergence))


@compiled
def _log_prob(flow, x, key, context, solve, divergence):
    result = flow.carry_with_logdet(x, "to_base", key, context, solve, divergence, ())
    return flow.base.log_prob(result.x) + result.logdet, result.stats.failed


def sample(
    flow: Flow,
    key: Key[Array, ""],
    num_samples: int,
    *,
    context: Float[Array, "num_samples context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> Float[Array, "num_samples dim"]:
    """Samples (num_samples, dim), by a solve of x alone: no log-det is carried. Consumes `key`.

    **Raises:** `ValueError` for bad shapes; `equinox.EquinoxRuntimeError` when the solve fails.
    """
    check_flow(flow)
    check_strategy(solve)
    require.whole(num_samples=num_samples)
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
    """Return where the flow carries a batch that was checked, (batch, dim).

    **Raises:** `ValueError` for tolerances that the dtype of `x` cannot meet;
    `equinox.EquinoxRuntimeError` when the solve of a row fails.
    """
    solve = with_array_tolerances(solve, x.dtype)
    return error_if_failed(*_transform_without_logdet(flow, x, direction, context, solve))


@compiled
def _transform_without_logdet(flow, x, direction, context, solve):
    end, stats = flow.carry(x, direction, context, solve)
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
    """Samples (num_samples, dim) and their log-densities in nats (num_samples,), in one solve.

    Consumes `key`, which is split between the base and the divergence's noise.

    **Raises:** `ValueError` for bad shapes; `equinox.EquinoxRuntimeError` when the solve fails.
    """
    check_flow(flow)
    check_strategy(solve, divergence)
    require.one_key(key)
    require.whole(num_samples=num_samples)
    check_context(flow, num_samples, context)
    base_key, noise_key = jax.random.split(key)
    z = _sample_base(flow.base, base_key, int(num_samples))
    check_batch(flow, z, context)
    solve = with_array_tolerances(solve, z.dtype)
    return error_if_failed(*_sample_and_log_prob(flow, z, noise_key, context, solve, divergence))


@compiled
def _sample_and_log_prob(flow, z, key, context, solve, divergence):
    result = flow.carry_with_logdet(z, "to_data", key, context, solve, divergence, ())
    return (result.x, flow.base.log_prob(z) - result.logdet), result.stats.failed


def check_direction(direction: str) -> None:
    """Raise `ValueError` for what is no direction."""
    if direction not in ("to_base", "to_data"):
        raise ValueError(f"direction must be 'to_base' or 'to_data'; got {direction!r}")


def check_flow(flow: Any) -> None:
    """Raise `ValueError` for what is no flow."""
    require.instance(Flow, "a flow, as jcnf.CNF(field, base) is", flow=flow)


def check_strategy(solve: Any, divergence: Any = Exact()) -> None:  # noqa: B008 (frozen)
    """Raise `ValueError` for what is no solve, or no divergence."""
    require.instance(Solve, "a jcnf.Solve(...)", solve=solve)
    require.instance(Divergence, "an instance, as jcnf.Exact() is", divergence=divergence)


def check_batch(flow: Flow, x, context) -> None:
    """Raise `ValueError` where `x` is no batch for `flow`, or `context` none for it."""
    check_flow(flow)
    dim = flow.base.dim
    try:
        array = x if hasattr(x, "dtype") else np.asarray(x)
        shape, dtype = array.shape, jnp.result_type(array)
    except (TypeError, ValueError):
        raise ValueError(
            f"expected x of shape (batch, {dim}); got {x!r}, which is no array of numbers"
        ) from None
    if len(shape) != 2 or shape[1] != dim:
        hint = ": add a batch axis with x[None]" if shape == (dim,) else ""
        raise ValueError(f"expected x of shape (batch, {dim}); got {shape}{hint}")
    if shape[0] == 0:
        raise ValueError("expected at least one sample; got an empty batch")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected x of a floating dtype; got {dtype}")
    if dtype.itemsize < 4:
        raise ValueError(
            f"a state of {dtype} has too few digits for a solve: take x.astype(jnp.float32), and "
            f"of the field jcnf.fields.Cast(field, jnp.{dtype})"
        )
    widest = max(
        (leaf.dtype for leaf in jax.tree.leaves(flow) if eqx.is_inexact_array(leaf)),
        key=lambda dtype: dtype.itemsize,
        default=dtype,
    )
    if widest.itemsize > dtype.itemsize:
        raise ValueError(f"the flow is of {widest} and x of {dtype}: cast it, x.astype({widest})")
    check_context(flow, shape[0], context)


def check_context(flow: Flow, batch: int, context) -> None:
    """Raise `ValueError` where `context` is none for so many samples of `flow`."""
    if context is not None and not hasattr(context, "dtype"):
        raise ValueError(f"context must be an array, as jnp.asarray makes one; got {context!r}")
    shape = (batch, 0) if context is None else jnp.shape(context)
    if shape[:-1] != (batch,):
        raise ValueError(f"expected context of shape ({batch}, context); got {shape}")
    if context is not None and not jnp.issubdtype(jnp.result_type(context), jnp.floating):
        raise ValueError(
            f"expected context of a floating dtype; got {jnp.result_type(context)}: classes are "
            "one-hot vectors, as jax.nn.one_hot makes them"
        )
    size, got = flow.context_dim, shape[-1]
    if size is not None and got != size:
        raise ValueError(
            f"the flow takes a context of size {size}; got {got or 'none'}: "
            "pass context of shape (batch, context)"
        )


def error_if_failed(value: Any, failed: Bool[Array, " batch"]) -> Any:
    """Return `value`, or raise `equinox.EquinoxRuntimeError` where the solve of a row failed.

    The error names the rows, unless it is raised by a compiled program (`equinox.error_if`): inside
    jit, vmap or grad, and for arrays that are spread over several processes.
    """
    if isinstance(failed, Tracer) or not failed.is_fully_addressable:
        return eqx.error_if(value, failed, f"the solve failed for some rows: {_ADVICE}")
    flags = np.asarray(failed)
    if np.any(flags):
        rows = require.counted(np.flatnonzero(flags), flags.size)
        raise eqx.EquinoxRuntimeError(f"the solve failed for {rows}: {_ADVICE}")
    return value


_ADVICE = (
    "max_steps was reached, a state was not finite, or only hopelessly short steps were within "
    "tolerance. Loosen rtol/atol or raise max_steps in jcnf.Solve; jcnf.transform returns NaN and "
    "stats.failed for such rows instead of raising."
)
