"""How a flow's ODE is solved: solver, tolerances, norm, adjoint; and what a solve cost."""

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
from jcnf.ode.step_plan import PARTS, PlannedSteps, unknown
from jcnf.ode.unrolled import Unrolled, is_explicit, needed

# From the mean squares of the rows to the square of the norm.
OVER_ROWS: dict[str, Callable[[Array], Array]] = {"batch": jnp.mean, "worst": jnp.max}


def batch_norm(error: Any) -> Float[Array, ""]:
    """Return the root mean square over all components of a pytree of arrays."""
    leaves = jax.tree.leaves(error)
    return _root(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def worst_norm(error: Any) -> Float[Array, ""]:
    """Return the largest root mean square of a row, the first axis of each array."""
    return _root(jnp.max(mean_square(error)))


def _root(square):
    # A NaN error would make the next step NaN; an infinite one rejects and shortens the step.
    return jnp.sqrt(jnp.where(jnp.isnan(square), jnp.inf, square))


NORMS: dict[str, Callable[[Any], Float[Array, ""]]] = {"batch": batch_norm, "worst": worst_norm}


MOST_STEPS = 1_000_000  # of a solve: memory for its checkpoints grows as their root


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
        """Of the error of a solve in its step."""
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
    """What a solve cost, as scalars, and which of the batch did not arrive."""

    nfe: Int[Array, ""]  # evaluations of the right-hand side, forward
    steps: Int[Array, ""]  # steps tried
    rejected: Int[Array, ""]  # of them, rejected
    failed: Bool[Array, " batch"]  # samples that did not arrive, finite, at the end
    step_plan: Float[Array, " parts"]  # for the `Solve.step_plan` of the next solve like it

    @classmethod
    def unsolved(cls, end: Float[Array, "batch dim"]) -> "Stats":
        """Of a map that solves nothing and ends there: samples that are not finite have failed."""
        zero = jnp.int32(0)
        failed = ~jnp.all(jnp.isfinite(end), axis=1)
        return cls(zero, zero, zero, failed, step_plan=unknown(end.dtype))

    def __add__(self, other: "Stats") -> "Stats":
        """Of two solves, one after the other."""
        return Stats(
            nfe=self.nfe + other.nfe,
            steps=self.steps + other.steps,
            rejected=self.rejected + other.rejected,
            failed=self.failed | other.failed,
            step_plan=jnp.maximum(self.step_plan, other.step_plan),
        )


def _plain_integer(value):
    # A NumPy integer would be an argument of compiled programs, which need it as a constant.
    return int(value) if isinstance(value, np.integer) else value


class Solve(eqx.Module):
    """Solver, accuracy and adjoint of one batched ODE solve.

    Frozen, and hashable unless it holds arrays: a step plan, or tolerances. One whose step plan
    changes is an argument of the compiled function: what a function closes over is a constant, for
    which it is compiled anew.

    **Arguments:**

    - `solver`: a name in `SOLVERS` or a diffrax solver.
    - `rtol`, `atol`: a step is accepted when norm(error / (atol + rtol |y|)) < 1, over x, log-det
      and penalties alike.
    - `step`: a fixed step in t instead, positive; the tolerances are then unused.
    - `adjoint`: how reverse mode goes through the solve. "checkpoint": discretise, then optimise,
      exact, from the states that were kept on the way (`jcnf.ode.StepCheckpointAdjoint`; for a
      trajectory and for methods other than explicit Runge-Kutta ones, diffrax's recursive
      checkpoints, Stumm & Walther 2010); "direct": the same by plain
      backpropagation through a bounded loop; "backsolve": the continuous adjoint (Chen et al.
      2018), constant memory, accurate to the tolerance, and the one that raises where its
      backward solve fails; "backsolve_seminorm": the same without error control on the
      parameters' adjoint (Kidger et al. 2021); "reversible": an algebraically reversible form of
      the solver, exact and in constant memory, at two evaluations for one (McCallum & Foster 2024);
      "forward": no reverse mode but `jax.jvp`, for few parameters. Or a diffrax adjoint.
    - `norm`: "batch" = RMS over batch and components; "worst" = the largest over the batch of
      each sample's RMS, so that every sample is within tolerance.
    - `max_steps`: the solve gives up after so many steps tried.
    - `first_step`: the first step as a fraction of the interval.
    - `step_plan`: the `Stats.step_plan` of a solve like it, such as the last one in training. It
      says where steps are best put, so that none is rejected to find that out; the error of each
      step is still controlled. Not for fixed steps.

    **Raises:** `ValueError` for unknown names and for numbers out of range.
    """

    solver: str | diffrax.AbstractSolver = "dopri5"
    rtol: float | Float[Array, ""] = 1e-5
    atol: float | Float[Array, ""] = 1e-5
    step: float | None = None
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
        check_int(1, MOST_STEPS, max_steps=self.max_steps)
        if self.step_plan is not None:
            check_floats(PARTS, step_plan=self.step_plan)
        if self.step is None and not self._estimates_errors():
            raise ValueError(
                f"solver {self.solver!r} has no error estimate: give it a fixed step, "
                "as in Solve(solver='euler', step=0.05)"
            )

    def _estimates_errors(self):
        solver = self.diffrax_solver()
        tableau = getattr(solver, "tableau", None)
        return isinstance(solver, diffrax.AbstractAdaptiveSolver) and (
            tableau is None or np.any(tableau.b_error)
        )

    def diffrax_solver(self) -> diffrax.AbstractSolver:
        """The solver as diffrax's object."""
        return SOLVERS[self.solver]() if isinstance(self.solver, str) else self.solver

    def stepper(self, end: Float[Array, ""]) -> FreezeFailingRows:
        """Return what takes the steps of a solve up to `end`, in time that increases.

        The solver is unrolled, made reversible, or as it is, with rows that fail alone.
        """
        solver: Any = self.diffrax_solver()
        if self.adjoint == "reversible":
            solver = Reversible(solver)
        elif isinstance(solver, diffrax.AbstractImplicitSolver):
            solver = self._with_tolerances(solver)
        elif is_explicit(solver):
            solver = Unrolled(solver)
        over_rows = None if self.step is not None else OVER_ROWS[self.norm]
        return FreezeFailingRows(solver, self.rtol, self.atol, over_rows, end, self.max_steps)

    def _with_tolerances(self, solver):
        # diffrax gives the controller's tolerances to the root finder of a bare solver only.
        def of(solver):
            return [getattr(solver.root_finder, name) for name in ("rtol", "atol", "norm")]

        ours = (self.rtol, self.atol, NORMS[self.norm])
        given = [o if g is use_stepsize_tol else g for g, o in zip(of(solver), ours, strict=True)]
        return eqx.tree_at(of, solver, given)

    def diffrax_adjoint(
        self, y0: Any, interval: Float[Array, ""], *, at_times: bool
    ) -> diffrax.AbstractAdjoint:
        """Return the adjoint as diffrax's object, for the gradient of a mean over the batch."""
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
                return self._backsolve(y0, interval, batch_norm)
            case _:
                return self._backsolve(y0, interval, diffrax.adjoint_rms_seminorm)

    def _backsolve(self, y0, interval, norm):
        # The cotangents of a mean over the batch are of the order of 1/batch, and so must atol be.
        # The adjoint's state has parameters in it, which have no batch axis: it needs a norm of its
        # own and cannot have rows that fail alone. No flag leaves a backward solve, so it raises.
        batch = jax.tree.leaves(y0)[0].shape[0]
        solve = dataclasses.replace(self, atol=self.atol / batch)
        return diffrax.BacksolveAdjoint(
            solver=self.diffrax_solver(),
            stepsize_controller=solve.controller(interval, norm),
            throw=True,
        )

    def controller(self, interval: Float[Array, ""], norm=None) -> PlannedSteps:
        """Return the control of steps over an interval of this length."""
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
    def heeds_step_plans(self) -> bool:
        """Whether its solves follow a step plan, and return one."""
        return self.step is None

    def evaluations(self, steps):
        """Return how often `steps` steps of an explicit Runge-Kutta solver evaluate the field."""
        tableau = getattr(self.diffrax_solver(), "tableau", None)
        if self.adjoint == "reversible":
            if tableau is None:  # Euler
                return 2 * steps
            solution, error = needed(tableau.b_sol), needed(tableau.b_error)
            return steps * (2 * solution + (max(error - solution, 0) if self.step is None else 0))
        if tableau is None:
            return steps
        # First same as last: a step's last evaluation is the next one's first.
        return steps * (tableau.num_stages - tableau.fsal) + int(tableau.fsal)


def check_tolerance(solve: Solve, dtype: Any) -> None:
    """Raise `ValueError` for tolerances below half a rounding of `dtype`.

    In float32 errors of log-densities stop falling at tolerances of 1e-7; at 1e-9 a solve takes ten
    times the steps, most of which it rejects, and is no more accurate.
    """
    if isinstance(solve.rtol, Tracer) or isinstance(solve.atol, Tracer):
        return
    loosest = max(float(np.asarray(tolerance)) for tolerance in (solve.rtol, solve.atol))
    eps = float(jnp.finfo(dtype).eps)
    if solve.step is None and loosest < eps / 2:
        raise ValueError(
            f"tolerance {loosest:g} is below what {dtype} can give (about {eps:.0e}): "
            "use x64 (JAX_ENABLE_X64=1, --x64) or a larger tolerance"
        )


def with_array_tolerances(solve: Solve, dtype: Any) -> Solve:
    """Return `solve` with its tolerances as scalar arrays of `dtype`, the state's.

    Python floats are compile-time constants, so that each new value would recompile; arrays are
    arguments.

    **Raises:** `ValueError` as `check_tolerance` does.
    """
    check_tolerance(solve, dtype)
    tolerances = tuple(jnp.asarray(value, dtype) for value in (solve.rtol, solve.atol))
    return eqx.tree_at(lambda solve: (solve.rtol, solve.atol), solve, tolerances)


_ADJOINTS = (
    "checkpoint",
    "direct",
    "backsolve",
    "backsolve_seminorm",
    "reversible",
    "forward",
)


def _known(what, given, table, kind):
    if isinstance(given, str) and given not in table:
        raise ValueError(f"unknown {what} {given!r}: use one of {', '.join(table)}")
    if not isinstance(given, str) and not isinstance(given, kind):
        raise ValueError(f"{what} must be one of {', '.join(table)}, or diffrax's; got {given!r}")
