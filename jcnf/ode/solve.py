"""Settings of a flow's ODE solve (solver, tolerances, norm, adjoint) and its statistics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from diffrax._root_finder import use_stepsize_tol
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jcnf._checks import check_floats, check_int, check_number
from jcnf.ode.adjoint import StepCheckpointAdjoint
from jcnf.ode.failing_rows import FreezeFailingRows, mean_square
from jcnf.ode.reversible import Reversible, ReversibleAdjoint
from jcnf.ode.step_plan import NUM_BINS, PlannedSteps, unknown
from jcnf.ode.unrolled import Unrolled, is_explicit, needed

# Map the mean squares of the rows to the square of the norm.
OVER_ROWS: dict[str, Callable[[Array], Array]] = {"batch": jnp.mean, "worst": jnp.max}


def rms_norm(error: Any) -> Float[Array, ""]:
    """Return the root mean square over all components of a pytree of arrays."""
    leaves = jax.tree.leaves(error)
    return _root(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def max_sample_rms_norm(error: Any) -> Float[Array, ""]:
    """Return the largest root mean square of a row; rows are the first axis of each array."""
    return _root(jnp.max(mean_square(error)))


def _root(square):
    # A NaN error would make the next step size NaN; an infinite one rejects and shortens the step.
    return jnp.sqrt(jnp.where(jnp.isnan(square), jnp.inf, square))


NORMS: dict[str, Callable[[Any], Float[Array, ""]]] = {
    "batch": rms_norm,
    "worst": max_sample_rms_norm,
}


# The adjoints store the time of each step, and states in the square root of max_steps.
MAX_STEPS_LIMIT = 1_000_000


class RK4(diffrax.AbstractERK):
    """The classical Runge-Kutta method of order 4 (Kutta 1901), which has no error estimate."""

    tableau = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0, 1 / 2]), np.array([0.0, 0, 1])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
        c=np.array([1 / 2, 1 / 2, 1]),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


SOLVERS: dict[str, type[diffrax.AbstractSolver]] = {
    "euler": diffrax.Euler,
    "heun": diffrax.Heun,
    "midpoint": diffrax.Midpoint,
    "rk4": RK4,
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}


class Stats(eqx.Module):
    """The cost of a solve, and the samples that failed."""

    nfe: Int[Array, ""]  # evaluations of the right-hand side in the forward pass
    steps: Int[Array, ""]  # steps tried
    rejected: Int[Array, ""]  # steps rejected, among those tried
    failed: Bool[Array, " batch"]  # samples that did not reach the end with finite values
    step_plan: Float[Array, " parts"]  # pass it as `Solve.step_plan` to a similar solve

    @classmethod
    def unsolved(cls, end: Float[Array, "batch dim"]) -> "Stats":
        """Return the statistics of a map without a solve, which fails where `end` is not finite."""
        zero = jnp.int32(0)
        failed = ~jnp.all(jnp.isfinite(end), axis=1)
        return cls(zero, zero, zero, failed, step_plan=unknown(end.dtype))

    def __add__(self, other: "Stats") -> "Stats":
        """Return the statistics of two solves, one after the other.

        The step plan is the finer of the two in each part.
        """
        return Stats(
            nfe=self.nfe + other.nfe,
            steps=self.steps + other.steps,
            rejected=self.rejected + other.rejected,
            failed=self.failed | other.failed,
            step_plan=jnp.maximum(self.step_plan, other.step_plan),
        )

    def over_draws(self) -> "Stats":
        """Return the statistics of one of several solves of the same rows.

        Each leaf has a first axis of solves. The counts are means; a row has failed if any of its
        solves has; the step plan is the finest in each part.
        """
        nfe, steps, rejected = (jnp.sum(n) // len(n) for n in (self.nfe, self.steps, self.rejected))
        failed, step_plan = jnp.any(self.failed, axis=0), jnp.max(self.step_plan, axis=0)
        return Stats(nfe, steps, rejected, failed, step_plan)


def _plain_integer(value):
    # Compiled programs need a constant here, and a NumPy integer would be traced as an argument.
    return int(value) if isinstance(value, np.integer) else value


class Solve(eqx.Module):
    """Solver, accuracy and adjoint of one batched ODE solve.

    It is frozen, and hashable unless it holds arrays (a step plan, tolerances or a step). If its
    step plan changes from call to call, pass it to the compiled function as an argument: a function
    that closes over it would be compiled again for every new plan.

    **Arguments:**

    - `solver`: a name in `SOLVERS` or a diffrax solver.
    - `rtol`, `atol`: a step is accepted if norm(error / (atol + rtol |y|)) < 1, where y holds x,
      logdet and the regularizers.
    - `step`: a fixed, positive step in t; the tolerances are then ignored.
    - `adjoint`: how the solve is differentiated; one of the names below, or a diffrax adjoint.
        - "checkpoint": discretize, then optimize; exact. It uses states kept in the forward pass
          (`jcnf.ode.StepCheckpointAdjoint`) or, for trajectories and for solvers that are not
          explicit Runge-Kutta methods, diffrax's recursive checkpoints (Stumm & Walther 2010).
        - "direct": the same gradient by plain backpropagation through a bounded loop.
        - "backsolve": the continuous adjoint (Chen et al. 2018), with constant memory and an error
          of the order of the tolerance. It is the only one that raises if its backward solve fails.
        - "backsolve_seminorm": backsolve without error control on the adjoint of the parameters
          (Kidger et al. 2021).
        - "reversible": an algebraically reversible form of the solver (McCallum & Foster 2024);
          exact and in constant memory, with twice the evaluations per step.
        - "forward": forward mode (`jax.jvp`) only, for few parameters.
    - `norm`: "batch" is the RMS over batch and components; "worst" is the largest RMS of a single
      sample, so that every sample is within tolerance.
    - `max_steps`: the number of tried steps after which the solve gives up.
    - `first_step`: the first step as a fraction of the interval.
    - `step_plan`: the `Stats.step_plan` of a similar solve, such as the last one in training. It
      says where to put the steps, so that fewer are rejected; the error of each step is still
      controlled. Ignored with a fixed `step`.

    **Raises:** `ValueError` for unknown names, for numbers out of range, and for a solver without
    an error estimate if `step` is None.
    """

    solver: str | diffrax.AbstractSolver = "dopri5"
    rtol: float | Float[Array, ""] = 1e-5
    atol: float | Float[Array, ""] = 1e-5
    step: float | Float[Array, ""] | None = None
    adjoint: str | diffrax.AbstractAdjoint = "checkpoint"
    norm: str = "batch"
    max_steps: int = eqx.field(default=1024, converter=_plain_integer)
    first_step: float = 0.1
    step_plan: Float[Array | np.ndarray, " parts"] | None = None

    def __check_init__(self):
        _known("solver", self.solver, SOLVERS, diffrax.AbstractSolver)
        _known("adjoint", self.adjoint, _ADJOINTS, diffrax.AbstractAdjoint)
        _known("norm", self.norm, NORMS, ())
        check_number("(0, inf)", rtol=self.rtol, atol=self.atol)
        check_number("(0, 1]", first_step=self.first_step)
        if self.step is not None:
            check_number("(0, inf)", step=self.step)
        check_int(1, MAX_STEPS_LIMIT, max_steps=self.max_steps)
        if self.step_plan is not None:
            check_floats(NUM_BINS, step_plan=self.step_plan)
        if self.step is None and not self._estimates_errors():
            raise ValueError(
                f"solver {self.solver!r} has no error estimate and needs a fixed step; got "
                "step=None: give it one, as in Solve(solver='euler', step=0.05)"
            )

    def _estimates_errors(self):
        solver = self.diffrax_solver()
        tableau = getattr(solver, "tableau", None)
        return isinstance(solver, diffrax.AbstractAdaptiveSolver) and (
            tableau is None or np.any(tableau.b_error)
        )

    def diffrax_solver(self) -> diffrax.AbstractSolver:
        """Return the solver as a diffrax object."""
        return SOLVERS[self.solver]() if isinstance(self.solver, str) else self.solver

    def stepper(self, end: Float[Array, ""]) -> FreezeFailingRows:
        """Return the solver that diffrax is given, in which failing rows fail alone.

        `end` is the end of the solve on diffrax's increasing time axis, as in `FreezeFailingRows`.
        The solver in it is made reversible under the "reversible" adjoint, and otherwise unrolled
        if it is an explicit Runge-Kutta method.
        """
        solver: Any = self.diffrax_solver()
        if self.adjoint == "reversible":
            solver = Reversible(solver)
        elif isinstance(solver, diffrax.AbstractImplicitSolver):
            solver = self._with_tolerances(solver, NORMS[self.norm])
        elif is_explicit(solver):
            solver = Unrolled(solver)
        over_rows = None if self.step is not None else OVER_ROWS[self.norm]
        return FreezeFailingRows(solver, self.rtol, self.atol, over_rows, end, self.max_steps)

    def _with_tolerances(self, solver, norm):
        # diffrax passes a controller's tolerances to a solver's root finder, but not where the
        # solver or the controller is inside a wrapper.
        def of(solver):
            return [getattr(solver.root_finder, name) for name in ("rtol", "atol", "norm")]

        ours = (self.rtol, self.atol, norm)
        given = [o if g is use_stepsize_tol else g for g, o in zip(of(solver), ours, strict=True)]
        return eqx.tree_at(of, solver, given)

    def diffrax_adjoint(
        self, y0: Any, interval: Float[Array, ""], *, at_times: bool
    ) -> diffrax.AbstractAdjoint:
        """Return the adjoint as a diffrax object, for the gradient of a mean over the batch."""
        if not isinstance(self.adjoint, str):
            return self.adjoint
        match self.adjoint:
            case "checkpoint":
                if at_times or not is_explicit(self.diffrax_solver()):
                    return diffrax.RecursiveCheckpointAdjoint()
                return StepCheckpointAdjoint()
            case "reversible":
                return ReversibleAdjoint()
            case "direct":
                return diffrax.DirectAdjoint()
            case "forward":
                return diffrax.ForwardMode()
            case "backsolve":
                return self._backsolve(y0, interval, rms_norm)
            case _:
                return self._backsolve(y0, interval, diffrax.adjoint_rms_seminorm)

    def _backsolve(self, y0, interval, norm):
        # The cotangents of a mean over the batch scale as 1/batch, and atol must scale with them.
        # The adjoint state contains parameters, which have no batch axis, so it needs a norm
        # without rows, and rows cannot fail alone in it. A backward solve cannot return a flag, so
        # it raises.
        batch = jax.tree.leaves(y0)[0].shape[0]
        solve = dataclasses.replace(self, atol=self.atol / batch)
        solver = self.diffrax_solver()
        if isinstance(solver, diffrax.AbstractImplicitSolver):
            solver = solve._with_tolerances(solver, norm)
        return diffrax.BacksolveAdjoint(
            solver=solver,
            stepsize_controller=solve.controller(interval, norm),
            throw=True,
        )

    def controller(self, interval: Float[Array, ""], norm=None) -> PlannedSteps:
        """Return the step-size controller for an interval of this length.

        `norm` replaces the error norm named by `self.norm`.
        """
        dtype = interval.dtype
        if self.step is not None:
            first = jnp.asarray(self.step, dtype)
            return PlannedSteps(diffrax.ConstantStepSize(), first, unknown(dtype), self.max_steps)
        plan = unknown(dtype) if self.step_plan is None else jnp.asarray(self.step_plan, dtype)
        return PlannedSteps(
            diffrax.PIDController(rtol=self.rtol, atol=self.atol, norm=norm or NORMS[self.norm]),
            self.first_step * interval,
            jax.lax.stop_gradient(plan),
            self.max_steps,
        )

    @property
    def has_reverse_mode_only(self) -> bool:
        """True for the adjoints of jcnf through which `jax.jvp` cannot go."""
        return isinstance(self.adjoint, str) and self.adjoint not in ("direct", "forward")

    @property
    def heeds_step_plans(self) -> bool:
        """True if solves with these settings follow a step plan and return one."""
        return self.step is None

    def evaluations(self, steps):
        """Return the number of field evaluations in `steps` steps of an explicit solver."""
        tableau = getattr(self.diffrax_solver(), "tableau", None)
        if self.adjoint == "reversible":
            if tableau is None:  # Euler
                return 2 * steps
            solution, error = needed(tableau.b_sol), needed(tableau.b_error)
            return steps * (2 * solution + (max(error - solution, 0) if self.step is None else 0))
        if tableau is None:
            return steps
        # First same as last (fsal): the last evaluation of a step is the first one of the next.
        return steps * (tableau.num_stages - tableau.fsal) + int(tableau.fsal)


def check_tolerance(solve: Solve, dtype: Any) -> None:
    """Raise `ValueError` if both tolerances are below half the machine epsilon of `dtype`.

    In float32, errors of log-densities stop falling at tolerances of 1e-7. At 1e-9 a solve takes
    ten times as many steps, rejects most of them, and is no more accurate. Traced tolerances are
    not checked.
    """
    if isinstance(solve.rtol, Tracer) or isinstance(solve.atol, Tracer):
        return
    loosest = max(float(np.asarray(tolerance)) for tolerance in (solve.rtol, solve.atol))
    eps = float(jnp.finfo(dtype).eps)
    if solve.step is None and loosest < eps / 2:
        wider = ", or use float64 (JAX_ENABLE_X64=1)" if eps > 1e-15 else ""
        raise ValueError(
            f"the larger of rtol and atol must be at least {eps / 2:.0e} for {dtype}; "
            f"got {loosest:g}: raise it{wider}"
        )


def with_array_tolerances(solve: Solve, dtype: Any) -> Solve:
    """Return `solve` with its tolerances as scalar arrays of `dtype`, the dtype of the state.

    Python floats are compile-time constants, so each new value would compile the solve again;
    arrays are arguments.

    **Raises:** `ValueError` as `check_tolerance` does.
    """
    check_tolerance(solve, dtype)
    tolerances = tuple(jnp.asarray(value, dtype) for value in (solve.rtol, solve.atol))
    return eqx.tree_at(lambda solve: (solve.rtol, solve.atol), solve, tolerances)


_ADJOINTS = ("checkpoint", "direct", "backsolve", "backsolve_seminorm", "reversible", "forward")


def _known(what, given, table, kind):
    if isinstance(given, str) and given not in table:
        raise ValueError(f"unknown {what} {given!r}: use one of {', '.join(table)}")
    if not isinstance(given, str) and not isinstance(given, kind):
        own = f" or a diffrax.{kind.__name__}" if kind else ""
        raise ValueError(f"{what} must be one of {', '.join(table)}{own}; got {given!r}")
