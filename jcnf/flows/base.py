"""The interface of bijections and flows, and the checks that their public functions share.

Time t=0 is the base and t=t1 the data. `logdet` is log|det d end / d start| along the direction
taken. Hence `log_prob(x) = base.log_prob(z) + logdet` from data to base, and
`log_prob(x) = base.log_prob(z) - logdet` from base to data.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from itertools import groupby
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key

from jcnf._checks import check_instance, list_rows
from jcnf.distributions import BaseDistribution
from jcnf.divergence import Divergence, Exact, FixedNoise
from jcnf.fields import Field
from jcnf.manifolds import Manifold
from jcnf.ode import Solve, Stats

Direction = Literal["to_base", "to_data"]
Rows = Float[Array, "batch dim"]
Contexts = Float[Array, "batch context"] | None
Regularizers = tuple[Callable, ...]


class Transformed(NamedTuple):
    """The result of `transform`."""

    value: Float[Array, "batch dim"]  # at the end of the direction solved
    logdet: Float[Array, " batch"]  # log|det d end / d start|, nats
    regularizers: dict[str, Float[Array, " batch"]]  # integrals over |dt|, positive
    stats: Stats

    @classmethod
    def unsolved(cls, value: Rows, logdet: Array, regularizers: Regularizers) -> "Transformed":
        """Return the result of a map without a solve, which has no path to penalize."""
        costs = {r.__name__: jnp.zeros_like(logdet) for r in regularizers}
        return cls(value, logdet, costs, Stats.unsolved(value))

    def then(self, end: "Transformed") -> "Transformed":
        """Return the result of two maps, of which `end` is that of the second."""
        costs = jax.tree.map(jnp.add, self.regularizers, end.regularizers)
        return Transformed(end.value, self.logdet + end.logdet, costs, self.stats + end.stats)


class Bijection(eqx.Module):
    """A bijection of vectors, forward from the base side to the data side.

    A subclass defines both directions with their log-dets, for batches that have been checked, and
    `forward` and `inverse` too if these are cheaper alone. No method raises if a solve fails: they
    set `stats.failed`. A bijection whose `context_dim` is 0 ignores any context that it is given.
    """

    is_trained: ClassVar[bool] = True  # False if training leaves the arrays as they are

    @property
    @abstractmethod
    def context_dim(self) -> int | None:
        """Size of the context: 0 if the bijection takes none, None if any size will do."""

    @property
    def manifold(self) -> Manifold | None:
        """The manifold of the data, or None for R^dim."""
        return None

    @abstractmethod
    def forward_and_log_det(
        self,
        x: Rows,
        context: Contexts,
        solve: Solve,
        divergence: Divergence,
        noise: Any,
        regularizers: Regularizers,
    ) -> Transformed:
        """Carry base samples to data; `noise` is what `draw_noise` returned."""

    @abstractmethod
    def inverse_and_log_det(
        self,
        x: Rows,
        context: Contexts,
        solve: Solve,
        divergence: Divergence,
        noise: Any,
        regularizers: Regularizers,
    ) -> Transformed:
        """Carry data to base samples; `noise` is what `draw_noise` returned."""

    def forward(self, x: Rows, context: Contexts, solve: Solve) -> tuple[Rows, Stats]:
        """Carry base samples to data, without the log-det."""
        end = self.forward_and_log_det(x, context, solve, Exact(), None, ())
        return end.value, end.stats

    def inverse(self, x: Rows, context: Contexts, solve: Solve) -> tuple[Rows, Stats]:
        """Carry data to base samples, without the log-det."""
        end = self.inverse_and_log_det(x, context, solve, Exact(), None, ())
        return end.value, end.stats

    def draw_noise(
        self, divergence: Divergence, key: Key[Array, ""] | None, batch: int, dim: int, dtype: Any
    ) -> Any:
        """Return the noise of the solves inside, arrays with leading axis `batch`; None if none.

        It consumes `key`. `jcnf.divergence.FixedNoise` takes the result in place of a key.
        """
        return None


B_co = TypeVar("B_co", bound=Bijection, covariant=True)


class Flow(eqx.Module, Generic[B_co]):
    """A bijection between samples of a base distribution and data. It is a plain pytree.

    This class is final: to add a kind of flow, subclass `Bijection`. `jcnf.CNF`, `jcnf.NICE` and
    `jcnf.flows.Chain` build flows. The repr is short; `equinox.tree_pformat(flow)` shows every
    array.

    **Raises:** `ValueError` unless the arguments are a bijection and a base distribution.
    """

    bijection: B_co
    base: BaseDistribution

    def __check_init__(self):
        check_instance(
            Bijection, "a bijection, such as jcnf.flows.ODE(field)", bijection=self.bijection
        )
        check_instance(
            BaseDistribution,
            "one of jcnf.distributions, such as StandardNormal(dim)",
            base=self.base,
        )

    def __repr__(self) -> str:
        size, context = _num_parameters(self.bijection), self.context_dim
        parts = [
            _outline(self.bijection),
            f"dim={self.dim}",
            *([f"context_dim={context}"] if context else []),
            f"{size:,} parameter{'' if size == 1 else 's'}",
            f"base={type(self.base).__name__}(dim={self.dim})",
        ]
        return f"Flow({', '.join(parts)})"

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return self.base.dim

    @property
    def context_dim(self) -> int | None:
        """Size of the context: 0 if the flow takes none, None if any size will do."""
        return self.bijection.context_dim

    def with_noise(
        self, divergence: Divergence, key: Key[Array, ""] | None, x: Rows
    ) -> tuple[Divergence, Any]:
        """Return `divergence` and its noise for `x`: the fixed noise, or new noise from `key`."""
        batch, dim = x.shape
        if isinstance(divergence, FixedNoise):
            return divergence.strategy, divergence.draw_noise(key, batch, dim, x.dtype)
        return divergence, self.bijection.draw_noise(divergence, key, batch, dim, x.dtype)


def _num_parameters(bijection: Bijection) -> int:
    """Return the number of floating-point entries that training changes."""

    def is_bijection_left_alone(node):
        return isinstance(node, Bijection) and not node.is_trained

    leaves = jax.tree.leaves(bijection, is_leaf=is_bijection_left_alone)
    arrays = [leaf for leaf in leaves if hasattr(leaf, "dtype")]  # or their shapes and dtypes
    return sum(a.size for a in arrays if jnp.issubdtype(a.dtype, jnp.inexact))


def _outline(part: Bijection | Field) -> str:
    """Return the types of a bijection and of the bijections and fields in it.

    Neighbors of the same outline are counted, as in `Composition(4 x ODE(Conv), Logit)`.
    """
    inner = []
    for each in dataclasses.fields(part):
        value = getattr(part, each.name, None)
        values = value if isinstance(value, tuple | list) else [value]
        inner += [_outline(v) for v in values if isinstance(v, Bijection | Field)]
    counted = [(text, len(list(same))) for text, same in groupby(inner)]
    texts = [text if count == 1 else f"{count} x {text}" for text, count in counted]
    return type(part).__name__ + (f"({', '.join(texts)})" if texts else "")


def check_direction(direction: str) -> None:
    """Raise `ValueError` unless `direction` is 'to_base' or 'to_data'."""
    if direction not in ("to_base", "to_data"):
        raise ValueError(f"direction must be 'to_base' or 'to_data'; got {direction!r}")


def check_flow(flow: Any) -> None:
    """Raise `ValueError` unless `flow` is a `Flow`."""
    check_instance(Flow, "a flow, such as jcnf.CNF(field, base)", flow=flow)


def check_strategy(solve: Any, divergence: Any = Exact()) -> None:  # noqa: B008 (frozen)
    """Raise `ValueError` unless `solve` is a `Solve` and `divergence` a `Divergence`."""
    check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
    check_instance(Divergence, "an instance, such as jcnf.Exact()", divergence=divergence)


def check_batch(flow: Flow, x, context) -> None:
    """Raise `ValueError` unless `x` is a valid batch for `flow` and `context` fits it."""
    check_flow(flow)
    dim = flow.dim
    try:
        array = x if hasattr(x, "dtype") else np.asarray(x)
        shape, dtype = array.shape, jnp.result_type(array)
    except (TypeError, ValueError):
        raise ValueError(
            f"expected x of shape (batch, {dim}); got {x!r}, which is not an array of numbers"
        ) from None
    if len(shape) != 2 or shape[1] != dim:
        hint = ": add a batch axis with x[None]" if shape == (dim,) else ""
        hint = ": use x[:, None]" if len(shape) == 1 and dim == 1 else hint
        raise ValueError(f"expected x of shape (batch, {dim}); got {shape}{hint}")
    if shape[0] == 0:
        raise ValueError("expected at least one sample; got an empty batch")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"expected x of a floating dtype; got {dtype}")
    if dtype.itemsize < 4:
        raise ValueError(
            f"expected x of float32 or wider; got {dtype}, which is too coarse for a solve: use "
            f"x.astype(jnp.float32), with jcnf.fields.Cast(field, jnp.{dtype}) if the field should "
            f"compute in {dtype}"
        )
    widest = max(
        (leaf.dtype for leaf in jax.tree.leaves(flow) if eqx.is_inexact_array(leaf)),
        key=lambda dtype: dtype.itemsize,
        default=dtype,
    )
    if widest.itemsize > dtype.itemsize:
        raise ValueError(
            f"expected x of the flow's dtype {widest}; got {dtype}: use x.astype(jnp.{widest})"
        )
    check_context(flow, shape[0], context)


def check_context(flow: Flow, batch: int, context) -> None:
    """Raise `ValueError` unless `context` fits `batch` samples of `flow`."""
    if context is not None and not hasattr(context, "dtype"):
        raise ValueError(f"context must be an array; got {context!r}: use jnp.asarray(context)")
    shape = (batch, 0) if context is None else jnp.shape(context)
    if shape[:-1] != (batch,):
        hint = ": repeat the row with jnp.tile" if len(shape) == 2 and shape[0] == 1 else ""
        raise ValueError(f"expected context of shape ({batch}, context); got {shape}{hint}")
    if context is not None and not jnp.issubdtype(jnp.result_type(context), jnp.floating):
        raise ValueError(
            f"expected context of a floating dtype; got {jnp.result_type(context)}: encode "
            "classes as one-hot vectors with jax.nn.one_hot"
        )
    size, got = flow.context_dim, shape[-1]
    if size is not None and got != size:
        advice = f"pass one of shape ({batch}, {size})" if size else "leave it out"
        advice += " (in jcnf.fit, data=(x, context))" if size and not got else ""
        raise ValueError(f"the flow takes a context of size {size}; got {got or 'none'}: {advice}")


def error_if_failed(value: Any, failed: Bool[Array, " batch"]) -> Any:
    """Return `value`, or raise `equinox.EquinoxRuntimeError` if any row failed.

    The error names the rows unless a compiled program raises it (`equinox.error_if`): inside jit,
    vmap or grad, and for arrays that are spread over several processes.
    """
    if isinstance(failed, Tracer) or not failed.is_fully_addressable:
        return eqx.error_if(value, failed, f"the flow failed for some rows: {_ADVICE}")
    flags = np.asarray(failed)
    if np.any(flags):
        rows = list_rows(np.flatnonzero(flags), flags.size)
        raise eqx.EquinoxRuntimeError(f"the flow failed for {rows}: {_ADVICE}")
    return value


_ADVICE = (
    "a value became NaN or inf, or an ODE solve reached max_steps or required steps too short to "
    "make progress. Check the input for NaN and inf. For an ODE, loosen rtol/atol or raise "
    "max_steps in jcnf.Solve; jcnf.transform flags these rows in stats.failed instead of raising."
)
