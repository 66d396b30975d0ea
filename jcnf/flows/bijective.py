"""Flows made of distrax bijectors: exact maps, behind the functions that serve a CNF.

The bijector is built from the flow's arrays whenever it is asked for, and never stored: inside an
Equinox module a distrax object would break `eqx.filter`. distrax is imported by subclasses alone,
inside their functions.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf.divergence import Divergence
from jcnf.flows.base import Direction, Flow, Transformed
from jcnf.ode import Solve, Stats


class BijectiveFlow(Flow):
    """A base distribution carried to data by a distrax bijector. Subclass it and give `bijector`.

    Both directions and their log-dets are the bijector's own, up to rounding: `solve` and
    `divergence` are taken and not used. A pass is one evaluation (`nfe` 1, no steps). Samples that
    do not arrive finite are `stats.failed`; what they became comes back.

    **Raises:** `ValueError`, when used: for regularizers, for there is no path to penalise, and for
    a bijector of other events than vectors.
    """

    @abstractmethod
    def bijector(self) -> Any:
        """The distrax bijector, forward from base samples to data, of events of shape (dim,).

        It is asked of a copy of the flow whose arrays have the dtype of the input.
        """

    @property
    def context_dim(self) -> int:
        """0: a bijector takes no context."""
        return 0

    def carry(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
    ) -> tuple[Float[Array, "batch dim"], Stats]:
        """The bijector's forward or inverse, without its log-det."""
        end = self._run(_METHODS[direction], x)
        end = _checked("samples", end, x.shape, x.dtype)
        return end, _stats(end)

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
        """The bijector's forward or inverse, with its log-det. No key is consumed."""
        if regularizers:
            names = ", ".join(r.__name__ for r in regularizers)
            raise ValueError(f"a bijector has no path to penalise: leave out {names}")
        end, logdet = self._run(_METHODS[direction] + "_and_log_det", x)
        end = _checked("samples", end, x.shape, x.dtype)
        logdet = _checked("log-dets", logdet, x.shape[:1], x.dtype)
        return Transformed(end, logdet, {}, _stats(end, logdet[:, None]))

    def _run(self, method, x):
        cast = jax.tree.map(lambda a: a.astype(x.dtype) if eqx.is_inexact_array(a) else a, self)
        # distrax adds (batch, dim) and (dim,), and floats and integers, even where people have made
        # that an error.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            bijector = cast.bijector()
            ndims = bijector.event_ndims_in, bijector.event_ndims_out
            if ndims != (1, 1):
                raise ValueError(
                    f"expected a bijector of events of 1 dimension, in and out; got {ndims}: "
                    "of an elementwise one make distrax.Block(bijector, 1)"
                )
            return getattr(bijector, method)(x)


_METHODS = {"to_data": "forward", "to_base": "inverse"}


def _stats(*values):
    stats = Stats.unsolved(jnp.concatenate(values, axis=1))
    return dataclasses.replace(stats, nfe=jnp.int32(1))


def _checked(what, value, shape, dtype):
    # A wrong shape might broadcast, and a complex number lose its half: a density of nothing.
    if jnp.shape(value) != shape or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"the bijector must give floating {what} of shape {shape}; got "
            f"{jnp.result_type(value)} of shape {jnp.shape(value)}"
        )
    # distrax has log-dets that are Python floats, which become float64 where there is float64.
    return value.astype(dtype)
