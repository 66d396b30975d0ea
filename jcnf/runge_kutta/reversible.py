"""An algebraically reversible Runge-Kutta solve: exact gradients in memory that no step adds to.

Over the increment Psi_h(t, y) of an explicit method, which it keeps the order of, and with a copy z
of the state beside y (McCallum & Foster 2024, "Efficient, Accurate and Stable Gradients for Neural
ODEs"):

    y_{n+1} = lam y_n + (1 - lam) z_n + Psi_h(t_n, z_n)
    z_{n+1} = z_n - Psi_{-h}(t_{n+1}, y_{n+1}),                 y_0 = z_0, 0 < lam <= 1.

Each line is solved for z_n, then y_n, so that the backward pass walks the steps from their end
instead of storing them: it finds the states up to rounding, which grows as lam^-n, and with them
the gradient of the very numbers that the forward pass computed.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf.runge_kutta.march import March, Scheme, march, outcome
from jcnf.runge_kutta.tableaus import slopes_of, stages, tableau_of, weighted


def integrate_reversibly(
    vector_field: Callable[..., Any],
    y0: Any,
    args: Any,
    t0: Float[Array | np.ndarray, ""],
    t1: Float[Array | np.ndarray, ""],
    first: Float[Array | np.ndarray, ""],
    step_plan: Float[Array, " parts"],
    *,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    max_steps: int,
    coupling: float = 0.999,
) -> March:
    """The state at `t1`, and how the solve went. Differentiable in `y0` and `args`, once.

    With s stages that reach the solution (6 of dopri5's 7), a step tried costs 2 s evaluations of
    the field, and what more the error estimate needs (1) if the controller asks for it; backwards,
    a step accepted costs 2 s evaluations with their vector-Jacobian products. What is kept for the
    backward pass is the last state and the accepted times, a scalar each. As everywhere in
    diffrax, the choice of steps is not differentiated.

    **Arguments:**

    - `vector_field`: `vector_field(t, y, args)`, of y's structure. Whatever is differentiated is
      in `args`, and nothing in `vector_field` itself.
    - `y0`: any pytree of floating arrays.
    - `args`: any pytree; its floating arrays are differentiable.
    - `t0`, `t1`, `first`: the interval, either way, and the first step, with its sign. They have
      no gradient.
    - `step_plan`: that of a solve like it, or `jcnf.runge_kutta.step_plan.unknown`.
    - `solver`: an explicit Runge-Kutta method of diffrax.
    - `controller`: fixed or adaptive; it sees y at both ends of a step and Psi_h's embedded error,
      NaN and infinite where y or z is not finite at its end.
    - `max_steps`: the solve gives up after so many steps tried.
    - `coupling`: lam.

    **Raises:** `ValueError` for another kind of solver, and for a coupling out of range.
    """
    if not 0 < coupling <= 1:
        raise ValueError(f"coupling must be above 0 and at most 1; got {coupling}")
    tableau_of(solver)
    scheme = _Scheme(vector_field, solver, coupling)
    y0 = jax.tree.map(jnp.asarray, y0)
    dtype = jnp.result_type(t0, t1)
    interval = (jax.lax.stop_gradient(jnp.asarray(t, dtype)) for t in (t0, t1, first))
    step_plan = jax.lax.stop_gradient(step_plan)
    return _solve((y0, args), scheme, *interval, step_plan, controller, max_steps)


def _with_error(solver):
    """The method's coefficients, Euler's too with an error: half the difference to Heun's slope."""
    tableau = tableau_of(solver)
    if isinstance(solver, diffrax.Euler):
        return dataclasses.replace(tableau, b_error=np.array([0.5, -0.5]))
    return tableau


def evaluations(solver: diffrax.AbstractSolver, *, adaptive: bool) -> int:
    """Evaluations of the field in a step tried."""
    tableau = _with_error(solver)
    solution, error = stages(tableau.b_sol), stages(tableau.b_error)
    return 2 * solution + (max(error - solution, 0) if adaptive else 0)


class _Scheme(Scheme):
    """One reversible step over a base method, forwards and backwards. Its state is (y, z)."""

    coupling: float = eqx.field(static=True)

    @property
    def tableau(self):
        """The base method's coefficients."""
        return _with_error(self.solver)

    def sums(self, t, h, y, args, *weights):
        """h sum_i w_i k_i for each of `weights`, over the slopes k_i that any of them needs."""
        needed = max(stages(w) for w in weights)
        slopes = slopes_of(self.vector_field, self.tableau, t, h, y, args, needed)
        return [weighted(h, w, slopes) for w in weights]

    def step(self, t, t_next, state, args):
        """(y, z) at `t_next`, and the embedded error of Psi_h."""
        (y, z), lam, b = state, self.coupling, self.tableau.b_sol
        psi, error = self.sums(t, t_next - t, z, args, b, self.tableau.b_error)
        y = jax.tree.map(lambda y, z, p: lam * y + (1 - lam) * z + p, y, z, psi)
        [psi] = self.sums(t_next, t - t_next, y, args, b)
        return (y, jax.tree.map(jnp.subtract, z, psi)), error

    def seen(self, state):
        """y, NaN where it or z is not finite."""
        return jax.tree.map(lambda y, z: jnp.where(jnp.isfinite(y + z), y, jnp.nan), *state)

    def pull_back(self, t, t_next, y, z, y_bar, z_bar, moving, still):
        """y, z at `t` from those at `t_next`, their cotangents, and the step's to `moving`.

        One vjp of each increment serves both: its value takes the state back.
        """
        lam = self.coupling

        def increment(t, h, y, moving):
            return self.sums(t, h, y, eqx.combine(moving, still), self.tableau.b_sol)[0]

        psi, pull = jax.vjp(partial(increment, t_next, t - t_next), y, moving)
        z = jax.tree.map(jnp.add, z, psi)
        y_more, moving_bar = pull(jax.tree.map(jnp.negative, z_bar))
        y_bar = jax.tree.map(jnp.add, y_bar, y_more)

        psi, pull = jax.vjp(partial(increment, t, t_next - t), z, moving)
        y = jax.tree.map(lambda y, z, p: (y - (1 - lam) * z - p) / lam, y, z, psi)
        z_more, moving_more = pull(y_bar)
        z_bar = jax.tree.map(lambda z, y, more: z + (1 - lam) * y + more, z_bar, y_bar, z_more)
        y_bar = jax.tree.map(lambda y: lam * y, y_bar)
        return y, z, y_bar, z_bar, jax.tree.map(jnp.add, moving_bar, moving_more)


def _march(y0_and_args, scheme, *settings):
    y0, args = y0_and_args
    return march(scheme, (y0, y0), None, args, *settings)


@eqx.filter_custom_vjp
def _solve(y0_and_args, *settings):
    loop = _march(y0_and_args, *settings)
    return outcome(loop.state[0], loop)


@_solve.def_fwd
def _solve_forwards(perturbed, y0_and_args, *settings):
    loop = _march(y0_and_args, *settings)
    return outcome(loop.state[0], loop), (*loop.state, loop.times, loop.accepted)


@_solve.def_bwd
def _solve_backwards(residuals, cotangents, perturbed, y0_and_args, scheme, *settings):
    y, z, times, accepted = residuals
    moving, still = eqx.partition(y0_and_args[1], perturbed[1])
    y_bar = jax.tree.map(lambda y, g: jnp.zeros_like(y) if g is None else g, y, cotangents.y)
    _, _, y_bar, moving_bar = _walk_back(scheme, times, accepted, y, z, y_bar, moving, still)
    return y_bar, moving_bar


def _walk_back(scheme, times, accepted, y, z, y_bar, moving, still):
    """y and z at the start, and the cotangents of y0 and of `moving`, from those of the end."""

    def body(i, carry):
        *states, moving_bar = carry
        n = accepted - 1 - i
        *states, more = scheme.pull_back(times[n], times[n + 1], *states, moving, still)
        return *states, jax.tree.map(jnp.add, moving_bar, more)

    z_bar, moving_bar = jax.tree.map(jnp.zeros_like, (y_bar, moving))
    start = (y, z, y_bar, z_bar, moving_bar)
    y, z, y_bar, z_bar, moving_bar = jax.lax.fori_loop(0, accepted, body, start)
    return y, z, jax.tree.map(jnp.add, y_bar, z_bar), moving_bar
