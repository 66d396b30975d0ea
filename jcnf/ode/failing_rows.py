"""A batch solved as one ODE, in which rows that cannot be solved hold up no others.

One step size serves all rows. A row that blows up, or meets NaN, would therefore shorten the steps
of all the others until the solve gives up. The wrapper below finds such rows, takes them out of
the error estimate and lets the others go on.
"""

# diffrax declares these members as class variables, and its own wrappers override them likewise.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jcnf.ode.unrolled import Unrolled

SHORTEST_STEPS = 4  # average steps, with max_steps of them, are the shortest that a row may need
TIMES_TYPICAL = 16  # how much faster than a typical row's the slope of a failing row changes
LATE = 1 / 4  # of max_steps: from then on no row may need steps too short for what is left
IN_TIME = 3 / 4  # of max_steps, by which a solve is to arrive
LAST_RESORT = 1e-3  # of an average step: a row that fails such a step fails


class FreezeFailingRows(diffrax.AbstractWrappedSolver):
    """A solver for batches, in which rows that it cannot keep within tolerance fail alone.

    The error norm rejects a step that would do for a typical row, one with the geometric mean of
    the errors. Then those rows fail whose own error is above the tolerance and who ask for a step
    of less than 4 / `max_steps` of the interval, if over so short a step their slope changes 16
    times as much as that of a typical row, and more than doubles or the step has been tried. A row
    that is not finite over so short a step fails too.

    Other rows are followed, however slow they make the solve. But after a quarter of `max_steps`
    those fail whose steps would be too short to arrive within three quarters of it. And whatever
    the other rows do, a row fails that a step of 1e-3 / `max_steps` of the interval cannot keep.

    States that are not finite have an infinite error. Under fixed steps they alone make a row fail.

    A row that has failed is given the state and the error of the first one that has not, at every
    step. So the error norm is that of the others, and gradients are finite as long as the caller
    drops the row, for then no cotangent comes from there. (They are NaN if what belongs to the row
    in `args`, such as its context, makes the field NaN at good states too.) Every leaf of the state
    has the batch as its first axis.

    **Arguments:**

    - `solver`: takes the steps.
    - `rtol`, `atol`: those of the step-size controller.
    - `over_rows`: how its norm, squared, comes from the mean squares of the rows: `jnp.mean` or
      `jnp.max`. None for fixed steps.
    - `end`: where the solve ends, in time that increases: t1, or -t1 for a solve back in time.
    - `max_steps`: that of the solve.
    """

    solver: Any  # a diffrax.AbstractSolver
    rtol: Any
    atol: Any
    over_rows: Callable[[Array], Array] | None = eqx.field(static=True)
    end: Float[Array, ""]
    max_steps: int = eqx.field(static=True)

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    def order(self, terms):
        return self.solver.order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        batch, t0 = jax.tree.leaves(y0)[0].shape[0], jnp.asarray(t0)
        return RowsState(
            inner=self.solver.init(terms, t0, t1, y0, args),
            failed_at=jnp.full(batch, jnp.inf, t0.dtype),
            start=t0,
            accepted=jnp.zeros((), jnp.int32),
        )

    # diffrax traces its loop several times: the step is traced once, and written out there.
    @eqx.filter_jit(inline=True)  # pyright: ignore[reportCallIssue]
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        state = solver_state
        y1, error, dense, inner, result = self.solver.step(
            terms, t0, t1, y0, args, state.inner, made_jump
        )
        failing = jax.lax.stop_gradient(self._failing(terms, t0, t1, y0, args, y1, error, state))
        failed_at = jnp.where(failing & ~state.failed, t0, state.failed_at)
        failed = jnp.isfinite(failed_at)
        y1, error, inner = with_copies((y1, error, inner), failed)
        # Where none is left to copy, all stay where they are and wait for the end.
        none_left = jnp.all(failed)
        y1 = jax.tree.map(lambda y1, y0: jnp.where(none_left, y0, y1), y1, y0)
        error = jax.tree.map(lambda e: jnp.where(none_left, 0, e), error)
        state = RowsState(inner, failed_at, state.start, state.accepted + 1)
        return y1, error, dense, state, result

    def _failing(self, terms, t0, t1, y0, args, y1, error, state):
        """Return which rows fail in this step."""
        if self.over_rows is None:
            return ~jnp.isfinite(mean_square(y1))

        def scaled(y0, y1, error):
            # The difference is zero, and NaN where y1 is not finite.
            tolerance = self.atol + self.rtol * jnp.maximum(jnp.abs(y0), jnp.abs(y1))
            return error / tolerance + (y1 - y1)

        squares = mean_square(jax.tree.map(scaled, y0, y1, error))
        squares = jnp.where(jnp.isfinite(squares), squares, jnp.inf)
        squares = with_copies(squares, state.failed)
        over = squares >= 1
        do_for_typical = jnp.mean(jnp.log(jnp.clip(squares, 1e-20, 1e20))) <= 0
        h, average = t1 - t0, (self.end - state.start) / self.max_steps
        left = jnp.maximum(int(IN_TIME * self.max_steps) - state.accepted, 1).astype(h.dtype)
        late = (state.accepted > int(LATE * self.max_steps)) & (h * left < self.end - t0)
        shortest = SHORTEST_STEPS * average
        asked = h * squares.astype(h.dtype) ** (-0.5 / self.solver.error_order(terms))
        rejected = do_for_typical & (self.over_rows(squares) >= 1)
        suspect = over & (asked < shortest) & rejected
        bent = jax.lax.cond(
            jnp.any(suspect),
            lambda: self._bent(terms, t0, shortest, y0, args, state, h),
            lambda: jnp.zeros_like(suspect),
        )
        not_finite = jnp.isinf(squares) & (h <= shortest)
        hopeless = suspect & (bent | not_finite) | over & rejected & late
        return hopeless | over & (h <= LAST_RESORT * average)

    def _bent(self, terms, t0, shortest, y0, args, state, h):
        """Return in which rows the slope changes much more than elsewhere over a step."""
        if isinstance(self.solver, Unrolled) and state.inner is not None:
            slope = state.inner
        else:
            slope = self.func(terms, t0, y0, args)

        def direction(k):
            # Not along the slope alone: stiff components hardly change on the way of a solution.
            flat = k.reshape(len(k), -1)
            if flat.shape[1] == 1:
                return k
            across = jnp.concatenate([-flat[:, -1:], flat[:, :-1]], axis=1)
            return (flat + across).reshape(k.shape)

        way = jax.tree.map(direction, slope)
        step = terms.contr(t0, t0 + shortest)
        moved = jax.tree.map(lambda y, d: y + step.astype(y.dtype) * d, y0, way)
        change = jax.tree.map(jnp.subtract, self.func(terms, t0, moved, args), slope)
        # About (step times Lipschitz constant)^2; where nothing moves, 0.
        tiny = float(jnp.finfo(jax.tree.leaves(slope)[0].dtype).tiny)
        bend = mean_square(change) / jnp.maximum(mean_square(slope), tiny)
        bend = with_copies(jnp.where(jnp.isnan(bend), jnp.inf, bend), state.failed)
        typical = jnp.exp(jnp.mean(jnp.log(jnp.clip(bend, 1e-20, 1e20))))
        return (bend >= TIMES_TYPICAL**2 * typical) & ((bend >= 1) | (h <= shortest))


class RowsState(eqx.Module):
    """What `FreezeFailingRows` knows between steps; times are in time that increases."""

    inner: Any
    failed_at: Float[Array, " batch"]  # start of the step in which a row failed, or inf
    start: Float[Array, ""]
    accepted: Int[Array, ""]  # steps

    @property
    def failed(self) -> Bool[Array, " batch"]:
        """Whether each row has failed."""
        return jnp.isfinite(self.failed_at)


def with_copies(tree: Any, failed: Bool[Array, " batch"]) -> Any:
    """Return `tree` with the rows that have failed replaced by the first that has not.

    Leaves that do not have the batch as their first axis are left as they are.
    """
    first = jnp.argmin(failed)

    def leaf(a):
        if jnp.shape(a)[:1] != failed.shape:
            return a
        return jnp.where(failed.reshape(-1, *[1] * (a.ndim - 1)), a[first], a)

    return jax.tree.map(leaf, tree)


def mean_square(error: Any) -> Float[Array, " batch"]:
    """Return the mean square over all components of each row."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(error)]
    total: Any = sum(jnp.sum(leaf**2, axis=1) for leaf in flat)
    return total / sum(leaf.shape[1] for leaf in flat)
