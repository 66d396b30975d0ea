"""The solve of an ODE over a whole batch by diffrax, and which samples failed.

The batch is one ODE, never a `vmap` of solves: under `vmap` every sample waits for the slowest, the
loop carries selects, and the backward pass holds one parameter cotangent per sample. Per-sample
accuracy is bought by the error norm instead: `norm="worst"`.
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
from jcnf.ode.failing_rows import mean_square, with_copies
from jcnf.ode.solve import Solve, Stats, check_tolerance


def integrate(
    vector_field: Callable[..., Any],
    y0: Any,
    args: Any,
    t0: Float[Array | np.ndarray, ""],
    t1: Float[Array | np.ndarray, ""],
    solve: Solve,
    times: Float[Array, " times"] | None = None,
) -> tuple[Any, Stats]:
    """Return the state at `t1`, or at each of `times` along a new first axis, and what it cost.

    `vector_field(t, y, args)` is a Module and everything differentiable is in `args`, as backsolve
    needs. Every leaf of `y0` has the batch as its first axis.

    Failure is a value, `Stats.failed`. Rows that cannot be solved fail alone
    (`jcnf.ode.FreezeFailingRows`); where a solve ends at `max_steps`, all rows have failed. At the
    end a failed row holds the finite values of another row, so that whatever is computed from it is
    finite and can be masked by `jnp.where` without NaN in gradients. At `times` it is NaN from its
    failure on.

    **Raises:** `ValueError` for `times` under the "reversible" adjoint, which keeps the end only,
    and for tolerances that the state's dtype cannot meet.
    """
    dtype = jax.tree.leaves(y0)[0].dtype
    check_tolerance(solve, dtype)
    if times is not None and solve.adjoint == "reversible":
        raise ValueError(
            "the 'reversible' adjoint keeps the end of a solve only: "
            "use adjoint='checkpoint' for a trajectory"
        )
    y0 = sharding.split_where_even(y0)
    t0, t1 = (jax.lax.stop_gradient(jnp.asarray(t, dtype)) for t in (t0, t1))
    direction = jnp.where(t0 < t1, 1, -1).astype(dtype)
    lost_at_start = jax.lax.stop_gradient(~jnp.isfinite(mean_square(y0)))
    y0 = with_copies(y0, lost_at_start)
    # Flat, for the adjoint state of a continuous adjoint may hold no empty tuple, as a field may.
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
        # Raising from inside a compiled program costs a host callback a step.
        throw=False,
    )
    # The last state follows those at `times`, or those of them that were reached; the rest of the
    # buffer is infinite.
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
    """A vector field of the leaves of its arguments."""

    vector_field: Callable[..., Any]
    structure: Any = eqx.field(static=True)
    # diffrax compiles its solve, and would reuse the program of an earlier call where a field is a
    # plain function or object that has been changed since. Each call differs by this; inside a
    # compiled function it is traced once all the same.
    call: object = eqx.field(static=True, default_factory=object)

    def __call__(self, t, y, leaves):
        return self.vector_field(t, y, jax.tree.unflatten(self.structure, leaves))
