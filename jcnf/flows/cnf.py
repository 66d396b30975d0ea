"""Continuous normalizing flows: one ODE solve for the whole batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import check_number
from jcnf.distributions import BaseDistribution
from jcnf.divergence import Divergence
from jcnf.fields import Field, check_field
from jcnf.flows.base import Bijection, Flow, Regularizers, Transformed
from jcnf.manifolds import TOLERANCE, Manifold
from jcnf.ode import integrate

Model = TypeVar("Model", bound=eqx.Module)


class ODE(Bijection):
    """The map from x(0) to x(t1) along dx/dt = v(t, x).

    With its log-det and regularizers, it solves for all of them as one ODE: dx/dt = v(t, x),
    d logdet/dt = div v (Chen et al. 2018, eq. 8) and dR/|dt| = rate for each regularizer R.

    **Arguments:**

    - `field`: the velocity v, a `jcnf.fields.Field`.
    - `t1`: the end time, positive.

    **Raises:** `ValueError` if `field` is not a `Field` or `t1` is not positive.
    """

    field: Field
    t1: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        check_field(self.field)
        check_number("(0, inf)", t1=self.t1)

    @property
    def context_dim(self) -> int:
        """Size of the field's context, 0 for none."""
        return self.field.context_dim

    @property
    def manifold(self) -> Manifold | None:
        """The manifold of the field, or None for R^dim."""
        return self.field.manifold

    def forward(self, x, context, solve):
        return self._solve(x, context, 0.0, self.t1, solve)

    def inverse(self, x, context, solve):
        return self._solve(x, context, self.t1, 0.0, solve)

    def _solve(self, x, context, t0, t1, solve):
        x = start_on_manifold(self.field, x)
        end, stats = integrate(Velocity(), x, self._args(context), t0, t1, solve)
        return put_on_manifold(self.field, end), stats

    def forward_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        rates, start = self._augmented(x, divergence, regularizers, sign=1)
        args = *self._args(context), noise
        end, stats = integrate(rates, start, args, 0.0, self.t1, solve)
        return self._transformed(end, stats)

    def inverse_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        rates, start = self._augmented(x, divergence, regularizers, sign=-1)
        args = *self._args(context), noise
        end, stats = integrate(rates, start, args, self.t1, 0.0, solve)
        return self._transformed(end, stats)

    def _transformed(self, end, stats):
        value = put_on_manifold(self.field, end.x)
        return Transformed(value, end.logdet, end.regularizers, stats)

    def _args(self, context):
        return self.field, context if self.field.context_dim else None

    def _augmented(self, x, divergence, regularizers, sign):
        """Return the right-hand side of the augmented ODE, and its state at the start."""
        zeros = jnp.zeros(len(x), x.dtype)
        start = State(
            start_on_manifold(self.field, x), zeros, {r.__name__: zeros for r in regularizers}
        )
        return Rates(divergence, regularizers, sign), start

    def draw_noise(self, divergence, key, batch, dim, dtype):
        """Draw the divergence's noise, once for the whole solve."""
        return divergence.draw_noise(key, batch, dim, dtype)


def CNF(field: Field, base: BaseDistribution, t1: float = 1.0) -> Flow[ODE]:
    """Return the flow of a field that carries a base distribution at t=0 to data at t=t1.

    The field is `flow.bijection.field`, and the end time `flow.bijection.t1`.

    **Arguments:**

    - `field`: the velocity, a `jcnf.fields.Field`.
    - `base`: a `jcnf.distributions.BaseDistribution` of the same `dim`.
    - `t1`: the end time, positive.

    **Raises:** `ValueError` if the dimensions or the manifolds differ, or `t1` is not positive.
    """
    flow = Flow(ODE(field, t1), base)
    if field.dim != base.dim:
        raise ValueError(f"field and base must have the same dim; got {field.dim} and {base.dim}")
    manifold = getattr(base, "manifold", None)
    if manifold != field.manifold:
        raise ValueError(
            f"field and base must be on the same manifold; got {field.manifold} and {manifold} "
            "(None is R^dim): use jcnf.manifolds.Uniform(manifold), for example"
        )
    return flow


def ode_of(flow: Any, what: str) -> ODE:
    """Return the ODE of a flow; raise `ValueError`, naming `what` needs it, for other flows."""
    if not isinstance(flow, Flow) or not isinstance(flow.bijection, ODE):
        got = flow.bijection if isinstance(flow, Flow) else flow
        raise ValueError(
            f"{what} needs a flow whose bijection is an ODE, such as jcnf.CNF(field, base); got "
            f"one of type {type(got).__name__}"
        )
    return flow.bijection


def with_fields(model: Model, change: Callable[[Field], Field]) -> Model:
    """Return `model` with the field of each ODE in it replaced by `change(field)`."""

    def is_ode(node):
        return isinstance(node, ODE)

    def changed(node):
        return ODE(change(node.field), node.t1) if is_ode(node) else node

    return jax.tree.map(changed, model, is_leaf=is_ode)


def put_on_manifold(
    field: Field, x: Float[Array, "*batch dim"], tolerance: float = np.inf
) -> Float[Array, "*batch dim"]:
    """Return the nearest points of the field's manifold; x itself if it has none.

    Points of which a coordinate is farther off than `tolerance` become NaN.
    """
    if field.manifold is None:
        return x
    project = partial(field.manifold.project, tolerance=tolerance)
    for _ in x.shape[:-1]:
        project = jax.vmap(project)
    return project(x)


# NaN marks the rows that are not points of the manifold: the solve reports them as failed. At the
# end of a solve there is no tolerance, because its truncation error may be large.
start_on_manifold = partial(put_on_manifold, tolerance=TOLERANCE)


class State(NamedTuple):
    """State of the augmented ODE for the whole batch."""

    x: Float[Array, "batch dim"]
    logdet: Float[Array, " batch"]
    regularizers: dict[str, Float[Array, " batch"]]


# In the right-hand sides, t is not batched under `vmap`: whatever depends on it alone is computed
# once for the batch.


class Velocity(eqx.Module):
    """Right-hand side for x alone, which is all that sampling and trajectories need."""

    def __call__(self, t, x, args):
        """Return v(t, x) for each sample; `args` holds the field and the contexts."""
        field, context = args
        v = jax.vmap(field, in_axes=(None, 0, 0))(t.astype(x.dtype), x, context)
        _check_shape("the field", v, x.shape[1:])
        return v


class Rates(eqx.Module):
    """Right-hand side for x, its log-det and its regularizers."""

    divergence: Divergence
    regularizers: Regularizers = eqx.field(static=True)
    # -1 where a solve goes back in time: it makes the regularizers integrals over |dt|.
    sign: int = eqx.field(static=True)

    def __call__(self, t, state, args):
        """Return the rates of each sample; `args` holds the field, the contexts and the noise."""
        field, context, noise = args
        x, _, _ = state
        t, axes = t.astype(x.dtype), (None, 0, 0, 0)
        local = jax.vmap(partial(self.divergence, field), axes)(t, x, context, noise)
        _check_shape("the field", local.velocity, x.shape[1:])
        _check_shape("the divergence", local.divergence, ())
        rates = {
            r.__name__: jax.vmap(partial(r, field), axes)(t, x, context, local)
            for r in self.regularizers
        }
        for name, rate in rates.items():
            _check_shape(f"the regularizer {name}", rate, ())
        rates = {name: self.sign * rate for name, rate in rates.items()}
        return State(local.velocity, local.divergence, rates)


def _check_shape(what, values, shape):
    # A wrong shape might broadcast, and the result would pass for a density.
    if jnp.shape(values)[1:] != shape:
        raise ValueError(
            f"{what} must give an array of shape {shape} for each sample; got {values.shape[1:]}"
        )
