"""Continuous normalizing flows and the pure functions people import.

t=0 is the base and t=T the data (T = `flow.t1`). Along the direction solved, `logdet` is the
integral of +div v dt = log|det d end / d start| (Chen et al. 2018, theorem 1), so that from data
to base `log_prob(x) = base.log_prob(z) + logdet`, and from base to data
`log_prob(x) = base.log_prob(z) - logdet`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from jcnf.distributions import Base
from jcnf.divergence import Divergence, Exact
from jcnf.solve import Solve, Stats, integrate

Direction = Literal["to_base", "to_data"]


class CNF(eqx.Module):
    """A field that carries a base distribution at t=0 to data at t=t1. A pytree, nothing more.

    **Arguments:**

    - `field`: velocity `field(t, x, context)` of one sample, with an integer `dim`.
    - `base`: a `jcnf.distributions.Base` of the same `dim`.
    - `t1`: the end time, positive.

    **Raises:** `ValueError` when the dimensions differ or `t1` is not positive.
    """

    field: Any
    base: Base
    t1: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        if self.field.dim != self.base.dim:
            raise ValueError(
                f"field and base must have the same dim; got {self.field.dim} and {self.base.dim}"
            )
        if not 0 < self.t1 < np.inf:
            raise ValueError(f"t1 must be positive and finite; got {self.t1}")


class FlowState(eqx.Module):
    """The state of the augmented ODE, for the whole batch."""

    x: Float[Array, "batch dim"]
    logdet: Float[Array, " batch"]
    penalties: dict[str, Float[Array, " batch"]]


class Transformed(NamedTuple):
    """What `transform` returns."""

    x: Float[Array, "batch dim"]  # at the end of the direction solved
    logdet: Float[Array, " batch"]  # log|det d end / d start|, nats
    penalties: dict[str, Float[Array, " batch"]]  # integrals over |dt|, positive
    stats: Stats


class _Velocity(eqx.Module):
    """Right-hand side of x alone: what sampling and trajectories need, and no more."""

    def __call__(self, t, x, args):
        field, context = args
        v = _over_batch(field, t.astype(x.dtype))(x, context)
        _check_shape("the field", v, x.shape)
        return v


class _Augmented(eqx.Module):
    """Right-hand side of x, its log-det and its penalties."""

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
    # A wrong one might broadcast, and give a density of nothing.
    if jnp.shape(value) != shape:
        raise ValueError(f"{what} must give an array of shape {shape}; got {jnp.shape(value)}")


def _over_batch(function, t):
    # t is not batched, so whatever depends on it alone is computed once for the batch.
    return lambda *batched: jax.vmap(function, in_axes=(None, *[0] * len(batched)))(t, *batched)


def transform(
    flow: CNF,
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

    Solves dx/dt = v(t, x), d logdet/dt = div v (Chen et al. 2018, eq. 8) and, for each of
    `regularizers`, d penalty/|dt| = rate, as one ODE for the whole batch. It never raises for a
    solve that fails: the last finite state comes back with `stats.failed`.

    **Arguments:**

    - `x`: (batch, dim), data for `direction="to_base"`, base samples for "to_data".
    - `key`: consumed once, by a stochastic `divergence` only.
    - `context`: (batch, context), for a conditional field.

    **Returns:** `Transformed(x, logdet, penalties, stats)`, the penalties by function name.

    **Raises:** `ValueError` for a wrong shape or dtype, an unknown direction, a missing key.
    """
    check_batch(flow, x, context)
    if direction not in ("to_base", "to_data"):
        raise ValueError(f"direction must be 'to_base' or 'to_data'; got {direction!r}")
    x = jnp.asarray(x)
    batch, dim = x.shape
    noise = divergence.draw(key, batch, dim, x.dtype)
    zeros = jnp.zeros(batch, x.dtype)
    if not all(callable(r) and hasattr(r, "__name__") for r in regularizers):
        raise ValueError(f"expected functions as in jcnf.regularizers; got {regularizers}")
    penalties = {r.__name__: zeros for r in regularizers}
    if len(penalties) < len(regularizers):
        raise ValueError(f"regularizers must have names of their own; got {list(penalties)}")
    start = FlowState(x, zeros, penalties)
    t0, t1 = (flow.t1, 0.0) if direction == "to_base" else (0.0, flow.t1)
    sign = jnp.asarray(np.sign(t1 - t0), x.dtype)
    end, stats = integrate(
        _Augmented(divergence, tuple(regularizers)),
        start,
        (flow.field, noise, context, sign),
        _time(t0, x),
        _time(t1, x),
        solve,
    )
    return Transformed(end.x, end.logdet, end.penalties, stats)


def log_prob(
    flow: CNF,
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
    result = transform(flow, x, key=key, context=context, solve=solve, divergence=divergence)
    return _arrived(flow.base.log_prob(result.x) + result.logdet, result.stats)


def sample(
    flow: CNF,
    key: Key[Array, ""],
    num_samples: int,
    *,
    context: Float[Array, "num_samples context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> Float[Array, "num_samples dim"]:
    """Samples (num_samples, dim), by a solve of x alone: no log-det is carried. Consumes `key`.

    **Raises:** `ValueError` for bad shapes; `equinox.EquinoxRuntimeError` when the solve fails.
    """
    z = flow.base.sample(key, num_samples)
    check_batch(flow, z, context)
    args = (flow.field, context)
    x, stats = integrate(_Velocity(), z, args, _time(0.0, z), _time(flow.t1, z), solve)
    return _arrived(x, stats)


def sample_and_log_prob(
    flow: CNF,
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
    base_key, noise_key = jax.random.split(key)
    z = flow.base.sample(base_key, num_samples)
    result = transform(
        flow,
        z,
        direction="to_data",
        key=noise_key,
        context=context,
        solve=solve,
        divergence=divergence,
    )
    log_probs = flow.base.log_prob(z) - result.logdet
    return _arrived((result.x, log_probs), result.stats)


def trajectory(
    flow: CNF,
    x: Float[Array, "batch dim"],
    times: Float[Array, " times"],
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> Float[Array, "times batch dim"]:
    """The batch at each of `times`, (times, batch, dim), from its state `x` at `times[0]`.

    `times` run one way, up or down: `linspace(0, flow.t1, n)` carries base samples to data.
    Between steps the solver's interpolant is used.

    **Raises:** `ValueError` for bad shapes and for times that are not monotone (checked where
    they are concrete); `equinox.EquinoxRuntimeError` when the solve fails.
    """
    xs, stats = solve_trajectory(flow, x, times, context=context, solve=solve)
    return _arrived(xs, stats)


def solve_trajectory(
    flow: CNF,
    x: Float[Array, "batch dim"],
    times: Float[Array, " times"],
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, "times batch dim"], Stats]:
    """`trajectory` with the solver's statistics; a failed solve is `stats.failed`, not raised."""
    check_batch(flow, x, context)
    if jnp.ndim(times) != 1 or jnp.shape(times)[0] < 2:
        raise ValueError(f"times must be a vector of at least 2; got shape {jnp.shape(times)}")
    if not isinstance(times, Tracer):
        steps = np.diff(np.asarray(times))
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError("times must strictly increase or strictly decrease")
    x = jnp.asarray(x)
    times = jnp.asarray(times, x.dtype)
    return integrate(_Velocity(), x, (flow.field, context), times[0], times[-1], solve, times)


def _time(t, x):
    # A concrete scalar: diffrax checks the sign of the first step at trace time, not at run time.
    return np.asarray(t, x.dtype)


def check_batch(flow: CNF, x, context) -> None:
    """Raise `ValueError` where `x` is no batch for `flow`, or `context` none for it."""
    dim = flow.base.dim
    shape = jnp.shape(x)
    if len(shape) != 2 or shape[1] != dim:
        hint = ": add a batch axis with x[None]" if shape == (dim,) else ""
        raise ValueError(f"expected x of shape (batch, {dim}); got {shape}{hint}")
    if shape[0] == 0:
        raise ValueError("expected at least one sample; got an empty batch")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"expected x of a floating dtype; got {jnp.result_type(x)}")
    widest = max(
        (leaf.dtype for leaf in jax.tree.leaves(flow) if eqx.is_inexact_array(leaf)),
        key=lambda dtype: dtype.itemsize,
        default=jnp.result_type(x),
    )
    if widest.itemsize > jnp.result_type(x).itemsize:
        raise ValueError(
            f"the flow is of {widest} and x of {jnp.result_type(x)}: cast it, x.astype({widest})"
        )
    shape_of_context = (shape[0], 0) if context is None else jnp.shape(context)
    if shape_of_context[:-1] != shape[:1]:
        raise ValueError(f"expected context of shape ({shape[0]}, context); got {shape_of_context}")
    size, got = getattr(flow.field, "context_dim", None), shape_of_context[-1]
    if size is not None and got != size:
        raise ValueError(
            f"the field takes a context of size {size}; got {got or 'none'}: "
            "pass context of shape (batch, context)"
        )


def _arrived(value, stats):
    return eqx.error_if(
        value,
        stats.failed,
        "the ODE solve did not reach its end: it hit max_steps or met a non-finite state. "
        "Loosen rtol/atol or raise max_steps in jcnf.Solve; "
        "jcnf.transform returns the last state and stats.failed instead of raising.",
    )
