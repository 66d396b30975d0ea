"""Continuous normalizing flows: one ODE solve for the whole batch."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_field, check_instance, check_number
from jcnf.distributions import BaseDistribution
from jcnf.divergence import Divergence
from jcnf.flows.base import Bijection, Direction, Flow, Transformed
from jcnf.ode import Solve, Stats, integrate


class ODE(Bijection):
    """The map from x(0) to x(t1) along dx/dt = v(t, x).

    **Arguments:**

    - `field`: velocity `field(t, x, context)` of one sample, with an integer `dim`.
    - `t1`: the end time, positive.

    **Raises:** `ValueError` if `t1` is not positive.
    """

    field: Any
    t1: float = eqx.field(static=True)

    def __init__(self, field: Any, t1: float = 1.0):
        check_field(field)
        check_number("(0, inf)", t1=t1)
        self.field, self.t1 = field, t1

    @property
    def context_dim(self) -> int | None:
        """Size of the field's context; None if the field does not say."""
        return getattr(self.field, "context_dim", None)

    def times(self, direction: Direction) -> tuple[float, float]:
        """Return the times at which a solve in `direction` starts and ends."""
        return (self.t1, 0.0) if direction == "to_base" else (0.0, self.t1)

    def transform(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
    ) -> tuple[Float[Array, "batch dim"], Stats]:
        """Solve dx/dt = v(t, x) alone, without the log-det."""
        t0, t1 = (_time(t, x) for t in self.times(direction))
        return integrate(Velocity(), x, (self.field, context), t0, t1, solve)

    def transform_and_log_det(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        key: Key[Array, ""] | None,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
        divergence: Divergence,
        regularizers: tuple[Callable, ...],
    ) -> Transformed:
        """Solve for x, its log-det and its regularizers as one ODE.

        The equations are dx/dt = v(t, x), d logdet/dt = div v (Chen et al. 2018, eq. 8) and, for
        each of `regularizers`, d penalty/|dt| = rate.
        """
        batch, dim = x.shape
        noise = self.draw_noise(divergence, key, batch, dim, x.dtype)
        zeros = jnp.zeros(batch, x.dtype)
        start = FlowState(x, zeros, {r.__name__: zeros for r in regularizers})
        t0, t1 = self.times(direction)
        # Going back in time dt is negative; the sign makes the penalties integrals over |dt|.
        sign = jnp.asarray(np.sign(t1 - t0), x.dtype)
        args = (self.field, noise, context, sign)
        rate = _Augmented(divergence, regularizers)
        end, stats = integrate(rate, start, args, _time(t0, x), _time(t1, x), solve)
        return Transformed(end.x, end.logdet, end.regularizers, stats)

    def draw_noise(
        self, divergence: Divergence, key: Key[Array, ""] | None, batch: int, dim: int, dtype
    ) -> Any:
        """Draw the divergence's noise, once for the whole solve."""
        return divergence.draw(key, batch, dim, dtype)


class CNF(ODE, Flow):
    """A field that carries a base distribution at t=0 to data at t=t1.

    **Arguments:**

    - `field`: velocity `field(t, x, context)` of one sample, with an integer `dim`.
    - `base`: a `jcnf.distributions.BaseDistribution` of the same `dim`.
    - `t1`: the end time, positive.

    **Raises:** `ValueError` if the dimensions differ or `t1` is not positive.
    """

    base: BaseDistribution

    def __init__(self, field: Any, base: BaseDistribution, t1: float = 1.0):
        check_field(field)
        check_instance(
            BaseDistribution, "one of jcnf.distributions, such as StandardNormal(dim)", base=base
        )
        if field.dim != base.dim:
            raise ValueError(
                f"field and base must have the same dim; got {field.dim} and {base.dim}"
            )
        super().__init__(field, t1)
        self.base = base


def with_fields(flow: Bijection, change: Callable[[Any], Any]) -> Any:
    """Return `flow` with the field of each ODE in it replaced by `change(field)`."""

    def is_ode(node):
        return isinstance(node, ODE)

    def changed(node):
        if not is_ode(node):
            return node
        return eqx.tree_at(lambda ode: ode.field, node, change(node.field))

    return jax.tree.map(changed, flow, is_leaf=is_ode)


class FlowState(eqx.Module):
    """State of the augmented ODE for the whole batch."""

    x: Float[Array, "batch dim"]
    logdet: Float[Array, " batch"]
    regularizers: dict[str, Float[Array, " batch"]]


class Velocity(eqx.Module):
    """Right-hand side for x alone, which is all that sampling and trajectories need."""

    def __call__(self, t, x, args):
        """Return v(t, x) for each sample; `args` holds the field and the contexts."""
        field, context = args
        v = _over_batch(field, t.astype(x.dtype))(x, context)
        _check_shape("the field", v, x.shape)
        return v


class _Augmented(eqx.Module):
    """Right-hand side for x, its log-det and its regularizers."""

    divergence: Divergence
    regularizers: tuple[Callable, ...] = eqx.field(static=True)

    def __call__(self, t, state, args):
        field, noise, context, sign = args

        def one(t, x, context, noise):
            local = self.divergence(field, t, x, context, noise)
            _check_shape("the field", local.velocity, x.shape)
            _check_shape("the divergence", local.divergence, ())
            rates = {r.__name__: r(field, t, x, context, local) for r in self.regularizers}
            for name, rate in rates.items():
                _check_shape(f"the penalty {name}", rate, ())
            rates = {name: sign * rate for name, rate in rates.items()}
            return local.velocity, local.divergence, rates

        rate = _over_batch(one, t.astype(state.x.dtype))
        return FlowState(*rate(state.x, context, noise))


def _check_shape(what, value, shape):
    # A wrong shape might broadcast, and the result would pass for a density.
    if jnp.shape(value) != shape:
        raise ValueError(f"{what} must give an array of shape {shape}; got {jnp.shape(value)}")


def _over_batch(function, t):
    # t is not batched, so whatever depends on it alone is computed once for the batch.
    return lambda *batched: jax.vmap(function, in_axes=(None, *[0] * len(batched)))(t, *batched)


def _time(t, x):
    # A concrete scalar lets diffrax check the sign of the first step at trace time.
    return np.asarray(t, x.dtype)
