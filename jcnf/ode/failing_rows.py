"""Keep rows that cannot be solved from stopping a batch that is solved as one ODE.

All rows share one step size, so a row that blows up or meets NaN would shorten everyone's steps
until the solve gives up. `FreezeFailingRows` finds such rows, takes them out of the error estimate,
and lets the others go on.

The difficulty is to tell them from rows that are merely hard. A step size too small for `max_steps`
is not enough evidence: the batch may be stiff as a whole, or a row may oscillate fast. So the main
test is that the others could take a larger step, and that the row's slope reacts to a small change
of the *state* far more than theirs do. Blow-up and the stiffness of a single row have this in
common, and oscillation in time does not have it.
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

# Step sizes in units of the mean step, interval / max_steps.
SUSPECT_STEP = 4  # a row that asks for a smaller step is examined
HOPELESS_STEP = 1e-3  # a row that fails a step this small fails, whatever the others do

FAILING_SLOPE_RATIO = 16  # the slope of a failing row changes this many times the typical change

# Shares of max_steps.
LATE_SHARE = 1 / 4  # after this many accepted steps, no row may make the solve arrive too late
ARRIVAL_SHARE = 3 / 4  # a solve that needs more accepted steps than this arrives too late


class FreezeFailingRows(diffrax.AbstractWrappedSolver):
    """A solver wrapper for batches: rows that cannot be kept within tolerance fail alone.

    Rows are examined when the error norm rejects a step that a typical row, one with the geometric
    mean of the rows' errors, would accept. A row then fails if all of these hold:

    - its own error is above the tolerance;
    - it asks for a step shorter than `4 / max_steps` of the interval;
    - over a step of that length its slope changes at least 16 times as much as a typical row's, and
      by at least its own size (the second condition is dropped once a step this short has been
      tried); or the row is not finite after a step this short.

    All other rows are followed, however slow they make the solve, with two exceptions. After a
    quarter of `max_steps` accepted steps, an examined row above the tolerance also fails if the
    step is too short to arrive within three quarters of `max_steps`. And a row fails if its error
    is above the tolerance in a step of `1e-3 / max_steps` of the interval, whatever the other rows
    do.

    A state that is not finite has an infinite error. With fixed steps, this is the only way to
    fail.

    In every step, a row that has failed gets the state and the error of the first row that has not.
    The error norm is therefore the one of the remaining rows, and gradients are finite as long as
    the caller drops the failed rows, so that their cotangents are zero. (Gradients are NaN if the
    row's own part of `args`, such as its context, makes the field NaN at good states too.) Every
    leaf of the state has the batch as its first axis.

    **Arguments:**

    - `solver`: the solver that takes the steps.
    - `rtol`, `atol`: the tolerances of the step-size controller.
    - `over_rows`: how the controller's norm, squared, follows from the mean squares of the rows:
      `jnp.mean` or `jnp.max`. None for fixed steps.
    - `end`: the time at which the solve ends, on diffrax's increasing time axis: t1, or -t1 for a
      solve backward in time.
    - `max_steps`: the `max_steps` of the solve.
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

    # diffrax looks these up in implicit solvers, which it recognizes inside of wrappers.
    @property
    def root_finder(self):
        return self.solver.root_finder

    @property
    def scan_kind(self):
        return self.solver.scan_kind or "lax"

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

    # diffrax traces its loop several times. Under filter_jit the step is traced only once, and
    # `inline` copies the result into each of them.
    @eqx.filter_jit(inline=True)  # pyright: ignore[reportCallIssue]
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        state = solver_state
        y1, error, dense, inner, result = self.solver.step(
            terms, t0, t1, y0, args, state.inner, made_jump
        )
        failing = jax.lax.stop_gradient(self._failing(terms, t0, t1, y0, args, y1, error, state))
        # The failure counts only if the step is accepted: after a rejected step, diffrax restores
        # the old solver state, and the row is judged again in the next, shorter step.
        failed_at = jnp.where(failing & ~state.failed, t0, state.failed_at)
        failed = jnp.isfinite(failed_at)
        y1, error, inner = with_copies((y1, error, inner), failed)
        # If no row is left to copy from, all stay where they are, with no error, until the end.
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
            # y1 - y1 is zero, or NaN where y1 is not finite: then the error estimate is void.
            tolerance = self.atol + self.rtol * jnp.maximum(jnp.abs(y0), jnp.abs(y1))
            return error / tolerance + (y1 - y1)

        squares = mean_square(jax.tree.map(scaled, y0, y1, error))
        squares = jnp.where(jnp.isfinite(squares), squares, jnp.inf)
        squares = with_copies(squares, state.failed)
        over = squares >= 1
        # The geometric mean is robust: the arithmetic mean is dominated by the rows that fail.
        typical_accepts = jnp.mean(jnp.log(jnp.clip(squares, 1e-20, 1e20))) <= 0
        h, average = t1 - t0, (self.end - state.start) / self.max_steps
        left = jnp.maximum(int(ARRIVAL_SHARE * self.max_steps) - state.accepted, 1).astype(h.dtype)
        late = (state.accepted > int(LATE_SHARE * self.max_steps)) & (h * left < self.end - t0)
        shortest = SUSPECT_STEP * average
        # The step at which the row's own error would be the tolerance, by the solver's order.
        asked = h * squares.astype(h.dtype) ** (-0.5 / self.solver.error_order(terms))
        # If a typical row is over the tolerance too, the whole batch is hard, and the controller's
        # shorter step is the right answer.
        rejected = typical_accepts & (self.over_rows(squares) >= 1)
        suspect = over & (asked < shortest) & rejected
        # The test costs one or two evaluations of the field, so it runs only if it is needed.
        bent = jax.lax.cond(
            jnp.any(suspect),
            lambda: self._bent(terms, t0, shortest, y0, args, state, h),
            lambda: jnp.zeros_like(suspect),
        )
        not_finite = jnp.isinf(squares) & (h <= shortest)
        hopeless = suspect & (bent | not_finite) | over & rejected & late
        return hopeless | over & (h <= HOPELESS_STEP * average)

    def _bent(self, terms, t0, shortest, y0, args, state, h):
        """Return in which rows the slope reacts much more to the state than in a typical row.

        The state moves by one step of length `shortest` while t stays the same. The change of the
        slope then measures step times Lipschitz constant: it is large for a row that blows up or is
        stiff, and zero for a row that only oscillates in time. It is compared with a typical row
        because a batch that is stiff as a whole can be solved, by many steps.
        """
        if isinstance(self.solver, Unrolled) and state.inner is not None:
            slope = state.inner
        else:
            slope = self.func(terms, t0, y0, args)

        def direction(k):
            # The slope alone would miss stiff components: after the transient they hardly change
            # along a solution. The slope with its components rotated by one is added to it, so that
            # the move has a part across the solution too.
            flat = k.reshape(len(k), -1)
            if flat.shape[1] == 1:
                return k
            across = jnp.concatenate([-flat[:, -1:], flat[:, :-1]], axis=1)
            return (flat + across).reshape(k.shape)

        way = jax.tree.map(direction, slope)
        step = terms.contr(t0, t0 + shortest)
        moved = jax.tree.map(lambda y, d: y + step.astype(y.dtype) * d, y0, way)
        change = jax.tree.map(jnp.subtract, self.func(terms, t0, moved, args), slope)
        # About (step times Lipschitz constant)^2; 0 where nothing moves.
        tiny = float(jnp.finfo(jax.tree.leaves(slope)[0].dtype).tiny)
        bend = mean_square(change) / jnp.maximum(mean_square(slope), tiny)
        bend = with_copies(jnp.where(jnp.isnan(bend), jnp.inf, bend), state.failed)
        typical = jnp.exp(jnp.mean(jnp.log(jnp.clip(bend, 1e-20, 1e20))))
        # bend < 1 says that the row could be solved with steps of this length. That is believed
        # until such a step has been tried.
        return (bend >= FAILING_SLOPE_RATIO**2 * typical) & ((bend >= 1) | (h <= shortest))


class RowsState(eqx.Module):
    """State of `FreezeFailingRows` between steps, with times on diffrax's increasing time axis."""

    inner: Any  # the wrapped solver's state
    failed_at: Float[Array, " batch"]  # start of the step in which a row failed, or inf
    start: Float[Array, ""]  # of the solve
    accepted: Int[Array, ""]  # number of accepted steps

    @property
    def failed(self) -> Bool[Array, " batch"]:
        """True for each row that has failed."""
        return jnp.isfinite(self.failed_at)


def with_copies(tree: Any, failed: Bool[Array, " batch"]) -> Any:
    """Return `tree` with each failed row replaced by the first row that has not failed.

    Leaves whose first axis is not the batch are returned unchanged.
    """
    # The row is found by a minimum and taken by a sum. To take it by its index, as in `a[first]`,
    # devices that share the batch would send each other all rows.
    places = jnp.arange(len(failed))
    first = jnp.min(places, where=~failed, initial=len(failed) - 1)

    def leaf(a):
        if jnp.shape(a)[:1] != failed.shape:
            return a
        chosen, replaced = (
            rows.reshape(-1, *[1] * (a.ndim - 1)) for rows in (places == first, failed)
        )
        return jnp.where(replaced, jnp.sum(a, axis=0, where=chosen), a)

    return jax.tree.map(leaf, tree)


def mean_square(error: Any) -> Float[Array, " batch"]:
    """Return the mean square over all components of each row."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(error)]
    total: Any = sum(jnp.sum(leaf**2, axis=1) for leaf in flat)
    return total / sum(leaf.shape[1] for leaf in flat)
