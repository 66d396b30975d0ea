"""The solve of an ODE over a whole batch, by `runge_kutta` or by diffrax, and which samples failed.

The batch is one ODE, never a `vmap` of solves: under `vmap` every sample waits for the slowest, the
loop carries selects, and the backward pass holds one parameter cotangent per sample. Per-sample
accuracy is bought by the error norm instead: `norm="worst"`.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jcnf import parallel
from jcnf.norms import NORMS, mean_square
from jcnf.runge_kutta import (
    March,
    integrate_reversibly,
    integrate_stepwise,
    is_explicit,
    unknown,
)
from jcnf.solve import Solve, Stats, check_tolerance


def integrate(
    vector_field: Callable[..., Any],
    y0: Any,
    args: Any,
    t0: Float[Array | np.ndarray, ""],
    t1: Float[Array | np.ndarray, ""],
    solve: Solve,
    times: Float[Array, " times"] | None = None,
) -> tuple[Any, Stats]:
    """The state at `t1`, or at each of `times` along a new first axis, and what it cost.

    `vector_field(t, y, args)` is a Module and everything differentiable is in `args`, as backsolve
    needs. Every leaf of `y0` has the batch as its first axis.

    Failure is a value. A solve that hits `max_steps`, or meets a state that is not finite, stops:
    its last finite state comes back, for all times it did not reach, with `Stats.failed`. Under
    `norm="worst"` these are the samples at fault, those that a step of the average length that
    `max_steps` allows would put out of tolerance or make non-finite, where there are such; all of
    the batch otherwise.

    **Raises:** `ValueError` for `times` under the "reversible" adjoint, which keeps the end only,
    and for tolerances that the state's dtype cannot meet.
    """
    check_tolerance(solve, jax.tree.leaves(y0)[0].dtype)
    y0 = parallel.split_where_even(y0)
    if solve.step is None:
        first = (t1 - t0) * solve.first_step
    else:
        first = solve.step * (jnp if isinstance(t1 - t0, Tracer) else np).sign(t1 - t0)
    by_its_way = _way(solve, times)
    ys, (last, t, steps, rejected, step_plan) = by_its_way(
        vector_field, y0, args, t0, t1, first, solve, times
    )
    return ys, Stats(
        nfe=solve.evaluations(steps),
        steps=steps,
        rejected=rejected,
        failed=_failed(vector_field, last, args, t, t1, first, solve),
        step_plan=step_plan,
    )


def _way(solve, times):
    """What gives the states at `times`, or the last one, and a `March`."""
    if solve.adjoint == "reversible":
        return functools.partial(_by_runge_kutta, integrate_reversibly)
    if solve.adjoint == "checkpoint" and times is None and is_explicit(solve.diffrax_solver()):
        return functools.partial(_by_runge_kutta, integrate_stepwise)
    return _by_diffrax


def _by_diffrax(vector_field, y0, args, t0, t1, first, solve, times):
    """diffrax's solve: the states saved, and the `March`."""
    # Flat, for the adjoint state of a continuous adjoint may hold no empty tuple, as a field may.
    leaves, structure = jax.tree.flatten(args)
    dtype = jax.tree.leaves(y0)[0].dtype
    if dtype == jnp.result_type(float) and not any(isinstance(t, Tracer) for t in (t0, t1, first)):
        # diffrax looks at the sign of a first step that is an array by a callback to the host, at
        # every solve, and XLA keeps no program with one in its cache.
        t0, t1, first = (float(t) for t in (t0, t1, first))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_OfLeaves(vector_field, structure)),
        solve.diffrax_solver(),
        t0,
        t1,
        first,
        y0,
        leaves,
        saveat=diffrax.SaveAt(ts=times, t1=True),
        stepsize_controller=solve.controller(NORMS[solve.norm]),
        adjoint=solve.diffrax_adjoint(batch=jax.tree.leaves(y0)[0].shape[0]),
        max_steps=solve.max_steps,
        # Raising from inside a compiled program costs a host callback a step.
        throw=False,
    )
    # The last state follows those at `times`, or what of them was reached; the rest is infinite.
    ts: Any = solution.ts
    count = jnp.sum(jnp.isfinite(ts)) - 1
    last, t = jax.tree.map(lambda rows: rows[count], (solution.ys, ts))
    tried, rejected = (solution.stats[f"num_{of}steps"] for of in ("", "rejected_"))
    march = March(last, t, tried, rejected, unknown(dtype))
    if times is None:
        return last, march

    def at_times(rows, last):
        reached = (jnp.arange(len(times)) < count).reshape(-1, *[1] * last.ndim)
        return jnp.where(reached, rows[:-1], last[None])

    return jax.tree.map(at_times, solution.ys, last), march


class _OfLeaves(eqx.Module):
    """A vector field of the leaves of its arguments."""

    vector_field: Callable[..., Any]
    structure: Any = eqx.field(static=True)
    # diffrax compiles its solve, and would reuse the program of an earlier call where a field is a
    # plain function or object that has been changed since. Each call differs by this; inside a
    # compiled function it is traced once all the same.
    call: object = eqx.field(static=True, default_factory=object)

    def __call__(self, t, y, leaves):
        return self.vector_field(t, y, jax.tree.unflatten(self.structure, leaves))


def _by_runge_kutta(integrate_to_the_end, vector_field, y0, args, t0, t1, first, solve, times=None):
    """An explicit Runge-Kutta method's solve by `runge_kutta`, which keeps the last state only."""
    if times is not None:
        raise ValueError(
            f"the {solve.adjoint!r} adjoint keeps the end of a solve only: "
            "use adjoint='checkpoint' for a trajectory"
        )
    dtype = jax.tree.leaves(y0)[0].dtype
    known = solve.step_plan is not None and solve.step is None
    march = integrate_to_the_end(
        vector_field,
        y0,
        args,
        t0,
        t1,
        jnp.asarray(first),
        jnp.asarray(solve.step_plan, dtype) if known else unknown(dtype),
        solver=solve.diffrax_solver(),
        controller=solve.controller(NORMS[solve.norm]),
        max_steps=solve.max_steps,
    )
    return march.y, march


def _failed(vector_field, y, args, t, t1, first, solve):
    """The samples that failed, (batch,), of a solve that ended at `t` in the state `y`."""
    y, args, t = jax.tree.map(
        lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a, (y, args, t)
    )
    finite = jnp.isfinite(mean_square(y))
    stopped = jnp.broadcast_to(t != t1, finite.shape)
    if solve.norm == "worst":
        step = first / solve.first_step / solve.max_steps if solve.step is None else first

        def at_fault():
            error = mean_square(_scaled_error(vector_field, y, args, t, step, solve))
            fault = ~(error < 1)
            return fault | ~jnp.any(fault)

        stopped = jax.lax.cond(t != t1, at_fault, lambda: stopped)
    return stopped | ~finite


def _scaled_error(vector_field, y, args, t, step, solve):
    """The error of one step over its tolerance; of a fixed step 0, or NaN where not finite."""
    solver, term = solve.diffrax_solver(), diffrax.ODETerm(vector_field)
    state = solver.init(term, t, t + step, y, args)
    end, error, *_ = solver.step(term, t, t + step, y, args, state, made_jump=False)
    if solve.step is not None:
        return jax.tree.map(lambda end: end - end, end)

    def scaled(start, end, error):
        return error / (solve.atol + solve.rtol * jnp.maximum(jnp.abs(start), jnp.abs(end)))

    return jax.tree.map(scaled, y, end, error)
