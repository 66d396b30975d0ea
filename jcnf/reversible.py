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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Euler's method, whose error is taken to be half its difference to Heun's second stage.
_EULER = diffrax.ButcherTableau(
    c=np.array([1.0]),
    a_lower=(np.array([1.0]),),
    b_sol=np.array([1.0, 0.0]),
    b_error=np.array([0.5, -0.5]),
)


def integrate_reversibly(
    vector_field: Callable[..., Any],
    y0: Any,
    args: Any,
    t0: Float[Array | np.ndarray, ""],
    t1: Float[Array | np.ndarray, ""],
    first: Float[Array | np.ndarray, ""],
    *,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    max_steps: int,
    coupling: float = 0.999,
) -> tuple[Any, Float[Array, ""], Int[Array, ""], Int[Array, ""]]:
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
    - `solver`: an explicit Runge-Kutta method of diffrax.
    - `controller`: fixed or adaptive; it sees y at both ends of a step and Psi_h's embedded error,
      NaN and infinite where y or z is not finite at its end.
    - `max_steps`: the solve gives up after so many steps tried.
    - `coupling`: lam.

    **Returns:** y, the time it is at, steps tried, and those rejected. The time is short of `t1`
    where the controller or `max_steps` ended the solve, at its last accepted state.

    **Raises:** `ValueError` for another kind of solver, and for a coupling out of range.
    """
    if not 0 < coupling <= 1:
        raise ValueError(f"coupling must be above 0 and at most 1; got {coupling}")
    scheme = _Scheme(vector_field, solver, coupling)
    y0 = jax.tree.map(jnp.asarray, y0)
    dtype = jnp.result_type(t0, t1)
    interval = (jax.lax.stop_gradient(jnp.asarray(t, dtype)) for t in (t0, t1, first))
    return _solve((y0, args), scheme, *interval, controller, max_steps)


def evaluations(solver: diffrax.AbstractSolver, *, adaptive: bool) -> int:
    """Evaluations of the field in a step tried."""
    tableau = _tableau(solver)
    solution, error = (
        int(np.max(np.flatnonzero(weights), initial=-1)) + 1
        for weights in (tableau.b_sol, tableau.b_error)
    )
    return 2 * solution + (max(error - solution, 0) if adaptive else 0)


def _tableau(solver):
    match solver:
        case diffrax.Euler():
            return _EULER
        case diffrax.AbstractERK(tableau=diffrax.ButcherTableau() as tableau):
            return tableau
    raise ValueError(f"a reversible solve needs an explicit Runge-Kutta method; got {solver}")


class _Scheme(eqx.Module):
    """One reversible step over a base method, forwards and backwards."""

    vector_field: Callable[..., Any]
    solver: diffrax.AbstractSolver
    coupling: float = eqx.field(static=True)

    @property
    def tableau(self):
        """The base method's coefficients."""
        return _tableau(self.solver)

    def sums(self, t, h, y, args, *weights):
        """h sum_i w_i k_i for each of `weights`, over the slopes k_i that any of them needs."""
        last = np.flatnonzero(np.any(weights, axis=0))[-1]
        slopes = [self.vector_field(t, y, args)]
        for row, node in zip(self.tableau.a_lower[:last], self.tableau.c, strict=False):
            stage = jax.tree.map(jnp.add, y, _sum(h, row, slopes))
            slopes.append(self.vector_field(t + float(node) * h, stage, args))
        return [_sum(h, w, slopes) for w in weights]

    def step(self, t, t_next, y, z, args):
        """y, z at `t_next`, and the embedded error of Psi_h."""
        lam, b = self.coupling, self.tableau.b_sol
        psi, error = self.sums(t, t_next - t, z, args, b, self.tableau.b_error)
        y = jax.tree.map(lambda y, z, p: lam * y + (1 - lam) * z + p, y, z, psi)
        [psi] = self.sums(t_next, t - t_next, y, args, b)
        return y, jax.tree.map(jnp.subtract, z, psi), error

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


def _sum(h, weights, slopes):
    # A weight of zero costs nothing; those past the last slope are zero.
    used = [(float(w), k) for w, k in zip(weights, slopes, strict=False) if w != 0]
    if not used:  # the error of a solver that estimates none
        return jax.tree.map(jnp.zeros_like, slopes[0])
    weights, slopes = zip(*used, strict=True)

    def leaf(*ks):
        return h.astype(ks[0].dtype) * sum(w * k for w, k in zip(weights, ks, strict=True))

    return jax.tree.map(leaf, *slopes)


class _Loop(NamedTuple):
    y: Any
    z: Any
    times: Float[Array, " max_steps_and_1"]  # of the accepted steps
    end: Float[Array, ""]  # of the step to be tried
    control: Any
    steps: Int[Array, ""]
    accepted: Int[Array, ""]
    going: Bool[Array, ""]


def _march(y0, args, scheme, t0, t1, first, controller, max_steps) -> _Loop:
    """The loop over steps, after its last."""
    # Controllers know time that increases.
    direction = jnp.where(t0 <= t1, 1, -1)
    controller = controller.wrap(direction)
    term = diffrax.ODETerm(scheme.vector_field)
    order = scheme.solver.error_order(term)
    # A step that leaves next to nothing to go goes all the way.
    ulp = float(jnp.finfo(t1.dtype).eps) * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
    almost = direction * t1 - 100 * ulp

    def towards(end):
        return jnp.where(end > almost, t1, direction * end)

    def condition(loop):
        short = direction * loop.times[loop.accepted] < direction * t1
        return loop.going & short & (loop.steps < max_steps)

    def body(loop):
        start, end = loop.times[loop.accepted], loop.end
        y, z, error = scheme.step(start, end, loop.y, loop.z, args)
        seen = jax.tree.map(lambda y, z: jnp.where(jnp.isfinite(y + z), y, jnp.nan), y, z)
        error = jax.tree.map(lambda y, e: jnp.where(jnp.isfinite(y + e), e, jnp.inf), seen, error)
        keep, _, end_next, _, control, result = controller.adapt_step_size(
            direction * start, direction * end, loop.y, seen, args, error, order, loop.control
        )
        y, z = jax.tree.map(partial(jnp.where, keep), (y, z), (loop.y, loop.z))
        return _Loop(
            y=y,
            z=z,
            times=loop.times.at[loop.accepted + 1].set(end),  # a rejected one is overwritten
            end=towards(end_next),
            control=control,
            steps=loop.steps + 1,
            accepted=loop.accepted + jnp.where(keep, 1, 0),
            going=diffrax.is_successful(result),
        )

    end, control = controller.init(
        term, direction * t0, direction * t1, y0, direction * first, args, scheme.solver.func, order
    )
    times = jnp.zeros(max_steps + 1, t0.dtype).at[0].set(t0)
    zero = jnp.zeros((), jnp.int32)
    start = _Loop(y0, y0, times, towards(end), control, zero, zero, jnp.asarray(True))
    return jax.lax.while_loop(condition, body, start)


def _outcome(loop):
    return loop.y, loop.times[loop.accepted], loop.steps, loop.steps - loop.accepted


@eqx.filter_custom_vjp
def _solve(y0_and_args, *settings):
    return _outcome(_march(*y0_and_args, *settings))


@_solve.def_fwd
def _solve_forwards(perturbed, y0_and_args, *settings):
    loop = _march(*y0_and_args, *settings)
    return _outcome(loop), (loop.y, loop.z, loop.times, loop.accepted)


@_solve.def_bwd
def _solve_backwards(residuals, cotangents, perturbed, y0_and_args, scheme, *settings):
    y, z, times, accepted = residuals
    moving, still = eqx.partition(y0_and_args[1], perturbed[1])
    y_bar = jax.tree.map(lambda y, g: jnp.zeros_like(y) if g is None else g, y, cotangents[0])
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
