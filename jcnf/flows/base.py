"""Flows, and the pure functions people import.

t=0 is the base and t=T the data (T = `flow.t1` of a continuous flow). Along the direction taken,
`logdet` is log|det d end / d start|, so that from data to base
`log_prob(x) = base.log_prob(z) + logdet`, and from base to data
`log_prob(x) = base.log_prob(z) - logdet`.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from jcnf._checks import check_instance, list_rows
from jcnf.distributions import Base
from jcnf.divergence import Divergence, Exact
from jcnf.ode import Solve, Stats

Direction = Literal["to_base", "to_data"]


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


def check_direction(direction: str) -> None:
    """Raise `ValueError` for what is no direction."""
    if direction not in ("to_base", "to_data"):
        raise ValueError(f"direction must be 'to_base' or 'to_data'; got {direction!r}")


def check_flow(flow: Any) -> None:
    """Raise `ValueError` for what is no flow."""
    check_instance(Flow, "a flow, as jcnf.CNF(field, base) is", flow=flow)


def check_strategy(solve: Any, divergence: Any = Exact()) -> None:  # noqa: B008 (frozen)
    """Raise `ValueError` for what is no solve, or no divergence."""
    check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
    check_instance(Divergence, "an instance, as jcnf.Exact() is", divergence=divergence)


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
        rows = list_rows(np.flatnonzero(flags), flags.size)
        raise eqx.EquinoxRuntimeError(f"the solve failed for {rows}: {_ADVICE}")
    return value


_ADVICE = (
    "max_steps was reached, a state was not finite, or only hopelessly short steps were within "
    "tolerance. Loosen rtol/atol or raise max_steps in jcnf.Solve; jcnf.transform returns NaN and "
    "stats.failed for such rows instead of raising."
)
