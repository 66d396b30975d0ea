"""Solve an ODE over a whole batch with diffrax, and report which samples failed.

The batch is solved as one ODE, never as a `vmap` of solves: under `vmap` every sample waits for the
slowest, the loop carries selects, and the backward pass holds one parameter cotangent per sample.
For accuracy in every sample, use the error norm `norm="worst"` instead.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf import sharding
from jcnf.ode._reverse_only import reverse_only
from jcnf.ode.failing_rows import mean_square, with_copies
from jcnf.ode.solve import Solve, Stats, check_tolerance


def integrate(
    vector_field: Callable[..., Any],
    y0: Any,
    args: Any,
    t0: float | Float[Array | np.ndarray, ""],
    t1: float | Float[Array | np.ndarray, ""],
    solve: Solve,
    times: Float[Array, " times"] | None = None,
) -> tuple[Any, Stats]:
    """Return the state at `t1`, or at each of `times` along a new first axis, and the `Stats`.

    `vector_field(t, y, args)` is an Equinox module, and everything to differentiate with respect to
    is in `args`, because backsolve needs it there. Every leaf of `y0` has the batch as its first
    axis.

    A failure raises no error; it is reported in `Stats.failed`. Rows that cannot be solved fail
    alone (see `jcnf.ode.FreezeFailingRows`); if the solve ends at `max_steps`, all rows have
    failed. In the state at `t1`, a failed row holds finite values of another row, so that anything
    computed from it is finite and can be masked by `jnp.where` without NaN in gradients:
    `jcnf.transform` makes it NaN. In a trajectory, a failed row is NaN from its failure on.

    **Raises:** `ValueError` for `times` under the "reversible" adjoint, which gives only the end of
    a solve, and for tolerances that the state's dtype cannot meet.
    """
    dtype = jax.tree.leaves(y0)[0].dtype
    check_tolerance(solve, dtype)
    if times is not None and solve.adjoint == "reversible":
        raise ValueError(
            "expected no times with adjoint='reversible', which gives only the state at t1: "
            "use adjoint='checkpoint' for a trajectory"
        )
    if solve.has_reverse_mode_only:
        y0, args = reverse_only((y0, args), str(solve.adjoint))
    y0 = sharding.shard_if_even(y0)
    t0, t1 = (jax.lax.stop_gradient(jnp.asarray(t, dtype)) for t in (t0, t1))
    direction = jnp.where(t0 < t1, 1, -1).astype(dtype)
    lost_at_start = jax.lax.stop_gradient(~jnp.isfinite(mean_square(y0)))
    y0 = with_copies(y0, lost_at_start)
    # args are flattened because the state of a continuous adjoint must not contain empty tuples,
    # and a field may.
    leaves, structure = jax.tree.flatten(args)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_OfLeaves(vector_field, structure)),
        solve.stepper(end=direction * t1),
        t0,
        t1,
        None,
        y0,
        leaves,
        saveat=diffrax.SaveAt(ts=times, t1=True, solver_state=True, controller_state=True),
        stepsize_controller=solve.controller(jnp.abs(t1 - t0)),
        adjoint=solve.diffrax_adjoint(y0, jnp.abs(t1 - t0), at_times=times is not None),
        max_steps=solve.max_steps,
        # Raising from inside a compiled program costs a host callback in every step.
        throw=False,
    )
    # diffrax writes the states at those `times` that were reached, then the last state, and leaves
    # inf in the rest of the buffer.
    ts: Any = solution.ts
    count = jnp.sum(jnp.isfinite(ts)) - 1
    last, t = jax.tree.map(lambda rows: rows[count], (solution.ys, ts))
    rows: Any = solution.solver_state
    controller: Any = solution.controller_state
    failed = lost_at_start | rows.failed | (t != t1) | ~jnp.isfinite(mean_square(last))
    tried, rejected = (
        jnp.asarray(solution.stats[f"num_{of}steps"], jnp.int32) for of in ("", "rejected_")
    )
    stats = Stats(
        nfe=solve.evaluations(tried),
        steps=tried,
        rejected=rejected,
        failed=jax.lax.stop_gradient(failed),
        step_plan=jax.lax.stop_gradient(controller.step_plan),
    )
    if times is None:
        return last, stats
    lost = direction * times[:, None] > rows.failed_at[None]
    lost |= lost_at_start[None] | (jnp.arange(len(times)) >= count)[:, None]

    def at_times(ys):
        return jnp.where(lost.reshape(*lost.shape, *[1] * (ys.ndim - 2)), jnp.nan, ys[:-1])

    return jax.tree.map(at_times, solution.ys), stats


class _OfLeaves(eqx.Module):
    """A vector field that takes its arguments as a list of leaves."""

    vector_field: Callable[..., Any]
    structure: Any = eqx.field(static=True)

    def __call__(self, t, y, leaves):
        return self.vector_field(t, y, jax.tree.unflatten(self.structure, leaves))
