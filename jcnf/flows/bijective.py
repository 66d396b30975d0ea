"""Bijections made of distrax bijectors: exact maps behind the same functions as an ODE.

The bijector is built from the bijection's arrays at each use and never stored, because a distrax
object inside an Equinox module would break `eqx.filter`. Only subclasses import distrax, inside
their functions.
"""

import dataclasses
from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from jcnf.flows.base import Bijection, Transformed
from jcnf.ode import Stats


class DistraxBijection(Bijection):
    """A distrax bijector as a bijection of flows. Subclasses define `bijector`.

    Both directions and their log-dets are the bijector's own, up to rounding; `solve` and
    `divergence` are ignored. A pass counts as one evaluation (`nfe` 1, no steps). Samples whose
    result is not finite are flagged in `stats.failed` and returned as they are.

    **Raises:** `ValueError`, when used, for regularizers, because there is no path to penalize, and
    for a bijector whose events are not vectors.
    """

    @abstractmethod
    def bijector(self) -> Any:
        """Return the distrax bijector, forward from base samples to data, on events (dim,).

        It is called on a copy of the module whose arrays have the dtype of the input.
        """

    @property
    def context_dim(self) -> int:
        """Always 0: a bijector takes no context."""
        return 0

    def forward_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        return self._apply("forward_and_log_det", x, regularizers)

    def inverse_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        return self._apply("inverse_and_log_det", x, regularizers)

    def _apply(self, method, x, regularizers):
        if regularizers:
            names = ", ".join(r.__name__ for r in regularizers)
            raise ValueError(
                f"a bijector has no path to penalize: remove {names} from regularizers"
            )
        cast = jax.tree.map(lambda a: a.astype(x.dtype) if eqx.is_inexact_array(a) else a, self)
        # distrax adds arrays of different ranks, and floats to integers. Allow both even if the
        # caller has made them errors.
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            bijector = cast.bijector()
            ndims = bijector.event_ndims_in, bijector.event_ndims_out
            if ndims != (1, 1):
                raise ValueError(
                    f"expected a bijector on events of 1 dimension, in and out; got {ndims}: "
                    "wrap an elementwise bijector in distrax.Block(bijector, 1)"
                )
            end, logdet = getattr(bijector, method)(x)
        end = _checked("samples", end, x.shape, x.dtype)
        logdet = _checked("log-dets", logdet, x.shape[:1], x.dtype)
        stats = Stats.unsolved(jnp.concatenate([end, logdet[:, None]], axis=1))
        return Transformed(end, logdet, {}, dataclasses.replace(stats, nfe=jnp.int32(1)))


def _checked(what, value, shape, dtype):
    # A wrong shape might broadcast and a complex value lose its imaginary part; either way the
    # result would pass for a density.
    if jnp.shape(value) != shape or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"the bijector must give floating {what} of shape {shape}; got "
            f"{jnp.result_type(value)} of shape {jnp.shape(value)}"
        )
    # Some log-dets of distrax are Python floats, which become float64 under x64.
    return value.astype(dtype)
