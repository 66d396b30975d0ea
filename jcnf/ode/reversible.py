"""Algebraically reversible Runge-Kutta solves: exact gradients in constant memory.

The method (McCallum & Foster 2024, "Efficient, Accurate and Stable Gradients for Neural ODEs")
carries a second copy z of the state beside y. With the increment Psi_h(t, y) of an explicit method,
whose order it keeps, a step is

    y_{n+1} = lam y_n + (1 - lam) z_n + Psi_h(t_n, z_n)
    z_{n+1} = z_n - Psi_{-h}(t_{n+1}, y_{n+1}),                 y_0 = z_0, 0 < lam <= 1.

The second line can be solved for z_n, and then the first for y_n. The backward pass therefore
recomputes the states from the end instead of storing them. It finds them up to rounding errors,
which grow as lam^-n, and with them the exact gradient of the numbers that the forward pass
computed. Only the times of the steps are stored.

The interfaces follow diffrax's pull request 727.
"""

# diffrax declares these members as class variables, and its own wrappers override them likewise.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

from abc import abstractmethod
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from jcnf.ode.adjoint import (
    AbstractEndAdjoint,
    end_cotangent,
    failed_rows,
    no_record,
    record_time,
    run_from,
    steps_to_pull_back,
    unwrapped,
)
from jcnf.ode.failing_rows import FreezeFailingRows
from jcnf.ode.unrolled import is_explicit, needed, slopes_of_step, weighted_sum


class AbstractReversibleSolver(diffrax.AbstractSolver):
    """A solver whose steps can be inverted."""

    @abstractmethod
    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        """Invert the step from t0 to t1, given `y1` and `solver_state` at t1.

        `ts_state` holds earlier times, for solvers that need them.

        **Returns:** `(y0, dense_info, solver_state, result)`, with y and the solver state at t0.
        """


class Reversible(AbstractReversibleSolver, diffrax.AbstractWrappedSolver):
    """An explicit Runge-Kutta method made reversible; its solver state is z.

    If the solution needs s stages (6 of dopri5's 7), a step costs 2 s evaluations of the field, and
    one more if the error estimate needs the last stage.

    **Arguments:**

    - `solver`: an explicit Runge-Kutta method of diffrax.
    - `coupling`: lam, above 0 and at most 1.

    **Raises:** `ValueError` for another kind of solver, and for a `coupling` out of range.
    """

    solver: Any  # a diffrax.AbstractERK, or Euler
    coupling: float = eqx.field(static=True, default=0.999)

    def __check_init__(self):
        if not (is_explicit(self.solver) or isinstance(self.solver, diffrax.Euler)):
            raise ValueError(
                "solver must be an explicit Runge-Kutta method, such as diffrax.Dopri5(), for a "
                f"reversible solve; got {self.solver}"
            )
        if not 0 < self.coupling <= 1:
            raise ValueError(f"coupling must be above 0 and at most 1; got {self.coupling}")

    @property
    def term_structure(self):
        return diffrax.AbstractTerm

    @property
    def interpolation_cls(self):
        return diffrax.LocalLinearInterpolation

    def order(self, terms):
        return self.solver.order(terms)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        return y0

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        z0, lam = solver_state, self.coupling
        psi, error = self._increment(terms, t0, t1, z0, args, with_error=True)
        y1 = jax.tree.map(lambda y, z, p: lam * y + (1 - lam) * z + p, y0, z0, psi)
        psi, _ = self._increment(terms, t1, t0, y1, args)
        z1 = jax.tree.map(jnp.subtract, z0, psi)
        # A step in which only z stops being finite must be rejected too.
        error = jax.tree.map(lambda e, z: jnp.where(jnp.isfinite(z), e, jnp.inf), error, z1)
        return y1, error, {"y0": y0, "y1": y1}, z1, diffrax.RESULTS.successful

    def backward_step(self, terms, t0, t1, y1, args, ts_state, solver_state, made_jump):
        lam = self.coupling
        psi, _ = self._increment(terms, t1, t0, y1, args)
        z0 = jax.tree.map(jnp.add, solver_state, psi)
        psi, _ = self._increment(terms, t0, t1, z0, args)
        y0 = jax.tree.map(lambda y, z, p: (y - (1 - lam) * z - p) / lam, y1, z0, psi)
        return y0, {"y0": y0, "y1": y1}, z0, diffrax.RESULTS.successful

    def _increment(self, terms, t0, t1, y, args, *, with_error=False):
        """Return Psi for a step from t0 to t1, in either direction, and its embedded error."""
        first, h = terms.vf(t0, y, args), terms.contr(t0, t1)
        if isinstance(self.solver, diffrax.Euler):
            psi = jax.tree.map(lambda k: h.astype(k.dtype) * k, first)
            return psi, jax.tree.map(jnp.zeros_like, psi)
        tableau = self.solver.tableau
        number = needed(tableau.b_sol)
        if with_error:
            number = max(number, needed(tableau.b_error))
        slopes, _ = slopes_of_step(tableau, terms, t0, t1, y, args, first, number)
        return weighted_sum(h, tableau.b_sol, slopes), weighted_sum(h, tableau.b_error, slopes)


class ReversibleAdjoint(AbstractEndAdjoint):
    """Backpropagation that inverts a reversible solver's steps and stores only their times.

    **Raises:** `ValueError` as `AbstractEndAdjoint` does, and for a solver that is not reversible.
    """

    def solve(self, y0_args_terms, *, solver, **settings):
        if not isinstance(unwrapped(solver), AbstractReversibleSolver):
            raise ValueError(
                f"ReversibleAdjoint needs a reversible solver; got {unwrapped(solver)}: wrap an "
                "explicit Runge-Kutta method in jcnf.ode.Reversible"
            )
        return _solve(y0_args_terms, solver=solver, **settings)


@eqx.filter_custom_vjp
def _solve(y0_args_terms, **settings):
    return run_from(y0_args_terms, no_record, None, **settings)[0]


@_solve.def_fwd
def _solve_forwards(perturbed, y0_args_terms, *, max_steps, init_state, **settings):
    times = jnp.zeros(max_steps + 1, init_state.tprev.dtype)
    final, times = run_from(
        y0_args_terms, record_time, times, max_steps=max_steps, init_state=init_state, **settings
    )
    solver_state = final.solver_state
    if isinstance(settings["solver"], FreezeFailingRows):
        solver_state = solver_state.inner
    accepted = steps_to_pull_back(final, failed_rows(settings["solver"], final))
    return final, (times, accepted, final.y, solver_state)


@_solve.def_bwd
def _solve_backwards(residuals, cotangents, perturbed, y0_args_terms, *, solver, **settings):
    times, accepted, y1, state1 = residuals
    inner: Any = unwrapped(solver)
    y0, args, terms = y0_args_terms
    moving, still = eqx.partition((args, terms), perturbed[1:])

    def back(i, carry):
        y1, state1, y_bar, state_bar, moving_bar = carry
        t0, t1 = times[accepted - 1 - i], times[accepted - i]
        args, terms = eqx.combine(moving, still)
        y0, _, state0, _ = inner.backward_step(terms, t0, t1, y1, args, (), state1, False)

        def step(y, state, moving):
            args, terms = eqx.combine(moving, still)
            y, _, _, state, _ = inner.step(terms, t0, t1, y, args, state, False)
            return y, state

        y_bar, state_bar, more = jax.vjp(step, y0, state0, moving)[1]((y_bar, state_bar))
        return y0, state0, y_bar, state_bar, jax.tree.map(jnp.add, moving_bar, more)

    y_bar = end_cotangent(cotangents, y0)
    zeros = jax.tree.map(jnp.zeros_like, (state1, moving))
    y0, _, y_bar, state_bar, moving_bar = jax.lax.fori_loop(
        0, accepted, back, (y1, state1, y_bar, *zeros)
    )

    def init(y, moving):
        args, terms = eqx.combine(moving, still)
        return inner.init(terms, times[0], times[1], y, args)

    more = jax.vjp(init, y0, moving)[1](state_bar)
    y_bar, moving_bar = jax.tree.map(jnp.add, (y_bar, moving_bar), more)
    return y_bar, *moving_bar
