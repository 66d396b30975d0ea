"""Trajectories: a batch at many times, for flows and for neural ODEs, which need no base."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jcnf._checks import check_finite
from jcnf.distributions import StandardNormal
from jcnf.fields import Field, check_field
from jcnf.flows.base import Flow, check_batch, check_strategy, error_if_failed
from jcnf.flows.cnf import CNF, ODE, Velocity, ode_of, put_on_manifold, start_on_manifold
from jcnf.ode import Solve, Stats, integrate, with_array_tolerances


def trajectory(
    flow: Flow[ODE] | Field,
    x: Float[Array, "batch dim"],
    times: Float[Array, " times"] | Float[Array, "times batch"],
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> Float[Array, "times batch dim"]:
    """Return the batch at each of `times`, (times, batch, dim), from its state `x` at the first.

    `linspace(0, flow.bijection.t1, n)` carries base samples to data. The states have gradients in
    `x`, in the parameters and in all of `times`, under every adjoint. With `x` unchanged, a start
    t_0 that is later by dt_0 acts like the start x - v(t_0, x) dt_0, and a t_i that is later by
    dt_i adds v(t_i, x_i) dt_i (Chen et al. 2018, appendix B.2: dL/dt_i = a . v, dL/dt_0 = -a . v).

    **Arguments:**

    - `flow`: a `jcnf.CNF(field, base)`, or a field alone.
    - `x`: (batch, dim), the state at `times[0]`.
    - `times`: increasing or decreasing, of one of two shapes.
        - (times,), shared by the batch: one solve, with the solver's interpolant between its steps.
          The gradient in the times is that of the exact solution.
        - (times, batch), one column per sample, which may repeat times (a series of observations
          can be padded with its last time: the state stays). The batch is solved from each row to
          the next, in rescaled time: `first_step` is a fraction of each such interval, and
          `max_steps` applies to each. A fixed `step` is shortened so that the sample with the
          longest interval takes equal steps; the steps of other samples are not longer. The
          gradient in the times comes from the adjoint, like the gradient in the parameters.
          Whatever a field computes from time alone is computed for each sample. The "reversible"
          adjoint keeps only the end of a solve, so it solves both shapes this way.
    - `context`: (batch, context), for a conditional field.

    **Raises:** `ValueError` for wrong shapes and for times that are not monotone (checked if they
    are concrete); `equinox.EquinoxRuntimeError` if the solve fails.
    """
    xs, stats = solve_trajectory(flow, x, times, context=context, solve=solve)
    return error_if_failed(xs, stats.failed)


def solve_trajectory(
    flow: Flow[ODE] | Field,
    x: Float[Array, "batch dim"],
    times: Float[Array, " times"] | Float[Array, "times batch"],
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> tuple[Float[Array, "times batch dim"], Stats]:
    """Return the states of `trajectory` and the solver's statistics, summed over its solves.

    It does not raise if a solve fails: `stats.failed` flags the rows, and they are NaN at all times
    that they did not reach.
    """
    check_strategy(solve)
    if not isinstance(flow, Flow):
        check_field(flow)
        flow = CNF(flow, StandardNormal(flow.dim))  # the base is not used
    field = ode_of(flow, "a trajectory").field
    check_batch(flow, x, context)
    x = jnp.asarray(x)
    check_times(times, len(x), x.dtype)
    times, solve = jnp.asarray(times, x.dtype), with_array_tolerances(solve, x.dtype)
    return _solve_trajectory(field, x, times, context, solve)


@eqx.filter_jit
def _solve_trajectory(field, x, times, context, solve):
    x = start_on_manifold(field, x)
    if times.ndim == 1 and solve.adjoint != "reversible":
        return _in_one_solve(field, x, times, context, solve)
    own = jnp.broadcast_to(times.reshape(len(times), -1), (len(times), len(x)))
    return _by_intervals(field, x, own, context, solve)


def check_times(times: Any, batch: int, dtype: Any) -> None:
    """Raise `ValueError` unless `times` are valid for a batch of this size, in `dtype`."""
    shape = np.shape(times)
    if shape and not isinstance(times, Tracer):
        if np.asarray(times).dtype.kind not in "fiu" and not hasattr(times, "dtype"):
            raise ValueError(f"times must be numbers; got {times!r}")
        check_finite(times=times)
    if not shape or shape[0] < 2 or shape[1:] not in ((), (batch,)):
        raise ValueError(
            "times must be a vector of at least 2, or of shape (times, batch) with "
            f"a column for each of the {batch} samples; got shape {shape}"
        )
    if not isinstance(times, Tracer):
        given = np.asarray(times).astype(np.float64)
        steps: Any = np.diff(given.astype(dtype), axis=0)
        if np.any((steps == 0) & (np.diff(given, axis=0) != 0)):
            raise ValueError(
                f"different times are equal in {dtype}: measure them from a later origin"
            )
        if len(shape) == 1 and not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError("times must strictly increase or strictly decrease")
        if not np.all(np.all(steps >= 0, axis=0) | np.all(steps <= 0, axis=0)):
            raise ValueError("times must be monotone for each sample, without NaN")


def _in_one_solve(field, x, times, context, solve):
    """Solve for `times` (times,) in one solve.

    The gradients in the times are added outside the solve: some adjoints give none, and the others
    give only the slope of the interpolant.
    """
    start = _moving(x[None], times[:1], field, context, sign=-1)[0]
    fixed = jax.lax.stop_gradient(times)
    args = (field, context)
    xs, stats = integrate(Velocity(), start, args, fixed[0], fixed[-1], solve, fixed)
    # The interpolant may give finite states even if a time is NaN.
    failed = stats.failed | ~jnp.all(jnp.isfinite(fixed))
    stats = eqx.tree_at(lambda stats: stats.failed, stats, failed)
    return put_on_manifold(field, _moving(xs, times, field, context, sign=1)), stats


@eqx.filter_custom_jvp
def _moving(xs, times, field, context, *, sign):
    """Return `xs` (times, batch, dim), with the derivative `sign` v(t, x) in `times` (times,).

    The velocity is evaluated only if that derivative is needed.
    """
    return xs


@_moving.def_jvp
def _moving_jvp(primals, tangents, *, sign):
    xs = _moving(*primals, sign=sign)
    _, times, field, context = primals
    by_xs, by_times, *_ = tangents
    if by_times is None:
        return xs, by_xs
    v = jax.vmap(lambda t, x: Velocity()(t, x, (field, context)))(times, xs)
    by_times = sign * by_times[:, None, None] * v
    return xs, by_times if by_xs is None else by_xs + by_times


def _by_intervals(field, x, times, context, solve):
    """Solve for `times` (times, batch), one interval after another.

    All samples go through an interval together, in s from 0 to `span`: t = start + s length / span.
    """

    def through(x, start, length):
        if solve.step is None:
            span = np.ones((), x.dtype)
        else:
            # The span is the longest interval rounded up to whole steps, so every step is equal.
            # The factor keeps rounding errors in the times from adding a step.
            longest = jax.lax.stop_gradient(jnp.max(jnp.abs(length)))
            steps = jnp.ceil(longest / solve.step * (1 - 1e-4))
            span = jnp.maximum(steps, 1) * solve.step
        args = (field, context, start, length / span)
        return integrate(_OwnTimes(), x, args, np.zeros((), x.dtype), span, solve)

    def step(carry, interval):
        def go_on():
            x, stats = carry
            x, more = through(x, *interval)
            x = put_on_manifold(field, x)
            return x, jax.tree.map(lambda a, b: b.astype(a.dtype), stats, stats + more)

        carry = jax.lax.cond(jnp.all(carry[1].failed), lambda: carry, go_on)
        x, stats = carry
        # A failed row goes on as a copy of another sample, so its states are masked.
        return carry, jnp.where(stats.failed[:, None], jnp.nan, x)

    intervals = (times[:-1], jnp.diff(times, axis=0))
    (_, stats), xs = jax.lax.scan(step, (x, Stats.unsolved(x)), intervals)
    return jnp.concatenate([x[None], xs]), stats


class _OwnTimes(eqx.Module):
    """dx/ds = r v(start + r s, x), where each sample has its own `start` and rate r.

    Both are in `args`, where every adjoint computes gradients.
    """

    def __call__(self, s, x, args):
        field, context, start, rate = args

        def one(t, x, context):
            return Velocity()(t, x, (field, context))

        t = start + rate * s.astype(x.dtype)
        x, context = jax.tree.map(lambda a: a[:, None], (x, context))
        return rate[:, None] * jax.vmap(one)(t, x, context)[:, 0]
