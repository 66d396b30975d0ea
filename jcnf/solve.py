"""How an ODE over a whole batch is solved: one frozen object over `runge_kutta` and diffrax.

The batch is one ODE, never a `vmap` of solves: under `vmap` every sample waits for the slowest, the
loop carries selects, and the backward pass holds one parameter cotangent per sample. Per-sample
accuracy is bought by the error norm instead: `norm="worst"`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jcnf import parallel, require
from jcnf.runge_kutta import (
    PARTS,
    March,
    evaluations,
    integrate_reversibly,
    integrate_stepwise,
    is_explicit,
    unknown,
)

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
    mesh: Float[Array, " parts"]  # what the next solve like it may take for `Solve.mesh`

    @classmethod
    def unsolved(cls, end: Float[Array, "batch dim"]) -> "Stats":
        """Of a map that solves nothing and ends there: samples that are not finite have failed."""
        zero = jnp.int32(0)
        failed = ~jnp.all(jnp.isfinite(end), axis=1)
        return cls(zero, zero, zero, failed, mesh=unknown(end.dtype))

    def __add__(self, other: "Stats") -> "Stats":
        """Of two solves, one after the other."""
        return Stats(
            nfe=self.nfe + other.nfe,
            steps=self.steps + other.steps,
            rejected=self.rejected + other.rejected,
            failed=self.failed | other.failed,
            mesh=jnp.maximum(self.mesh, other.mesh),
        )


class Solve(eqx.Module):
    """Solver, accuracy and adjoint of one batched ODE solve. Frozen, and hashable without a mesh.

    One whose mesh changes is an argument of the compiled function: what a function closes over is a
    constant, for which it is compiled anew.

    **Arguments:**

    - `solver`: a name in `SOLVERS` or a diffrax solver.
    - `rtol`, `atol`: a step is accepted when norm(error / (atol + rtol |y|)) < 1, over x, log-det
      and penalties alike.
    - `step`: a fixed step in t instead, positive; the tolerances are then unused.
    - `adjoint`: how reverse mode goes through the solve. "checkpoint": discretise, then optimise,
      exact, from the states that were kept on the way (`jcnf.runge_kutta.stepwise`; for a
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
    - `mesh`: `Stats.mesh` of a solve like it, as the last one in training is: where steps are best
      put, so that none is rejected to find it out. The error of each is controlled as ever. The
      adjoints "checkpoint" and "reversible" heed it.

    **Raises:** `ValueError` for unknown names and for numbers out of range.
    """

    solver: str | diffrax.AbstractSolver = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    step: float | None = None
    adjoint: str | diffrax.AbstractAdjoint = "checkpoint"
    norm: str = "batch"
    max_steps: int = 1024
    first_step: float = 0.1
    mesh: Float[Array | np.ndarray, " parts"] | None = None

    def __check_init__(self):
        adjoints = (*_ADJOINTS, "reversible")
        _known("solver", self.solver, SOLVERS, diffrax.AbstractSolver)
        _known("adjoint", self.adjoint, adjoints, diffrax.AbstractAdjoint)
        _known("norm", self.norm, _NORMS, ())
        require.number("(0, inf)", rtol=self.rtol, atol=self.atol)
        require.number("(0, 1]", first_step=self.first_step)
        if self.step is not None:
            require.number("(0, inf)", step=self.step)
        require.whole(1, MOST_STEPS, max_steps=self.max_steps)
        if self.mesh is not None:
            require.floats(PARTS, mesh=self.mesh)
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

    def diffrax_adjoint(self, batch: int) -> diffrax.AbstractAdjoint:
        """The adjoint as diffrax's object, for the gradient of a mean over `batch` samples."""
        if not isinstance(self.adjoint, str):
            return self.adjoint
        return _ADJOINTS[self.adjoint](self, batch)

    @property
    def heeds_meshes(self) -> bool:
        """Whether its solves take a mesh, and find one out."""
        if self.step is not None:
            return False
        explicit = self.adjoint == "checkpoint" and is_explicit(self.diffrax_solver())
        return explicit or self.adjoint == "reversible"

    def controller(self, norm) -> diffrax.AbstractStepSizeController:
        """Step size control under an error norm over the state's pytree."""
        if self.step is not None:
            return _FixedSteps()
        # A step below dtmin ends a solve that met NaN, which would else go on to max_steps.
        # diffrax leaves no last step so short: 100 ulps of float64 are more.
        return diffrax.PIDController(
            rtol=self.rtol, atol=self.atol, norm=norm, dtmin=1e-14, force_dtmin=False
        )

    def evaluations(self, steps):
        """Right-hand sides evaluated in so many steps of an explicit Runge-Kutta solver."""
        if self.adjoint == "reversible":
            return steps * evaluations(self.diffrax_solver(), adaptive=self.step is None)
        tableau = getattr(self.diffrax_solver(), "tableau", None)
        if tableau is None:
            return steps
        # First same as last: a step's last evaluation is the next one's first.
        return steps * (tableau.num_stages - tableau.fsal) + int(tableau.fsal)


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
    ys, (last, t, steps, rejected, mesh) = by_its_way(
        vector_field, y0, args, t0, t1, first, solve, times
    )
    return ys, Stats(
        nfe=solve.evaluations(steps),
        steps=steps,
        rejected=rejected,
        failed=_failed(vector_field, last, args, t, t1, first, solve),
        mesh=mesh,
    )


def _way(solve, times):
    """What gives the states at `times`, or the last one, and a `March`."""
    if solve.adjoint == "reversible":
        return functools.partial(_by_runge_kutta, integrate_reversibly)
    if solve.adjoint == "checkpoint" and times is None and is_explicit(solve.diffrax_solver()):
        return functools.partial(_by_runge_kutta, integrate_stepwise)
    return _by_diffrax


def check_tolerance(solve: Solve, dtype: Any) -> None:
    """Raise `ValueError` for tolerances below half a rounding of `dtype`.

    In float32 errors of log-densities stop falling at tolerances of 1e-7; at 1e-9 a solve takes ten
    times the steps, most of which it rejects, and is no more accurate.
    """
    if isinstance(solve.rtol, Tracer) or isinstance(solve.atol, Tracer):
        return
    loosest, eps = max(solve.rtol, solve.atol), float(jnp.finfo(dtype).eps)
    if solve.step is None and loosest < eps / 2:
        raise ValueError(
            f"tolerance {loosest:g} is below what {dtype} can give (about {eps:.0e}): "
            "use x64 (JAX_ENABLE_X64=1, --x64) or a larger tolerance"
        )


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
        stepsize_controller=solve.controller(_NORMS[solve.norm]),
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
    known = solve.mesh is not None and solve.step is None
    march = integrate_to_the_end(
        vector_field,
        y0,
        args,
        t0,
        t1,
        jnp.asarray(first),
        jnp.asarray(solve.mesh, dtype) if known else unknown(dtype),
        solver=solve.diffrax_solver(),
        controller=solve.controller(_NORMS[solve.norm]),
        max_steps=solve.max_steps,
    )
    return march.y, march


def _failed(vector_field, y, args, t, t1, first, solve):
    """The samples that failed, (batch,), of a solve that ended at `t` in the state `y`."""
    y, args, t = jax.tree.map(
        lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a, (y, args, t)
    )
    finite = jnp.isfinite(_mean_square(y))
    stopped = jnp.broadcast_to(t != t1, finite.shape)
    if solve.norm == "worst":
        step = first / solve.first_step / solve.max_steps if solve.step is None else first

        def at_fault():
            error = _mean_square(_scaled_error(vector_field, y, args, t, step, solve))
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


class _FixedSteps(diffrax.ConstantStepSize):
    """Steps of one size, up to the last finite state."""

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        _, t, t_next, jump, state, result = super().adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
        )
        leaves = jax.tree.leaves(y1_candidate)
        keep: Any = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        stop = diffrax.RESULTS.dt_min_reached
        result = diffrax.RESULTS.where(keep, result, stop)
        return keep, jnp.where(keep, t, t0), t_next, jump, state, result


def _finite(mean_square):
    # A NaN error would make the next step NaN; an infinite one rejects and shortens the step.
    return jnp.sqrt(jnp.where(jnp.isnan(mean_square), jnp.inf, mean_square))


def _batch_norm(error):
    leaves = jax.tree.leaves(error)
    return _finite(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def _worst_norm(error):
    return _finite(jnp.max(_mean_square(error)))


def _mean_square(tree):
    """Of each sample, over all that it has in the leaves of `tree`: (batch,)."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)]
    return sum(jnp.sum(leaf**2, axis=1) for leaf in flat) / sum(leaf.shape[1] for leaf in flat)


_NORMS = {"batch": _batch_norm, "worst": _worst_norm}


def _backsolve(norm):
    def adjoint(solve, batch):
        # The cotangents of a mean over the batch are of the order of 1/batch, and so must atol be.
        solve = dataclasses.replace(solve, atol=solve.atol / batch)
        # The adjoint's state has parameters in it, which have no batch axis: it needs its own
        # norm. And no flag leaves a backward solve, so that failing silently is the alternative.
        return diffrax.BacksolveAdjoint(stepsize_controller=solve.controller(norm), throw=True)

    return adjoint


_ADJOINTS = {
    "checkpoint": lambda solve, batch: diffrax.RecursiveCheckpointAdjoint(),
    "direct": lambda solve, batch: diffrax.DirectAdjoint(),
    "forward": lambda solve, batch: diffrax.ForwardMode(),
    "backsolve": _backsolve(_batch_norm),
    "backsolve_seminorm": _backsolve(diffrax.adjoint_rms_seminorm),
}


def _known(what, given, table, kind):
    if isinstance(given, str) and given not in table:
        raise ValueError(f"unknown {what} {given!r}: use one of {', '.join(table)}")
    if not isinstance(given, str) and not isinstance(given, kind):
        raise ValueError(f"{what} must be one of {', '.join(table)}, or diffrax's; got {given!r}")
