"""How an ODE over a whole batch is solved: one frozen object, and the only use of diffrax.

The batch is one ODE, never a `vmap` of solves: under `vmap` every sample waits for the slowest, the
loop carries selects, and the backward pass holds one parameter cotangent per sample. Per-sample
accuracy is bought by the error norm instead: `norm="worst"`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SOLVERS: dict[str, type[diffrax.AbstractSolver]] = {
    "euler": diffrax.Euler,
    "heun": diffrax.Heun,
    "midpoint": diffrax.Midpoint,
    "bosh3": diffrax.Bosh3,
    "tsit5": diffrax.Tsit5,
    "dopri5": diffrax.Dopri5,
    "dopri8": diffrax.Dopri8,
}


class Stats(eqx.Module):
    """What a solve cost and whether it arrived; scalars, one solve for the whole batch."""

    nfe: Int[Array, ""]  # evaluations of the right-hand side, forward
    steps: Int[Array, ""]  # steps tried
    rejected: Int[Array, ""]  # of them, rejected
    failed: Bool[Array, ""]  # stopped short of the end, or arrived non-finite


class Solve(eqx.Module):
    """Solver, accuracy and adjoint of one batched ODE solve. Frozen and hashable.

    **Arguments:**

    - `solver`: a name in `SOLVERS` or a diffrax solver.
    - `rtol`, `atol`: a step is accepted when norm(error / (atol + rtol |y|)) < 1, over x, log-det
      and penalties alike.
    - `step`: a fixed step in t instead, positive; the tolerances are then unused.
    - `adjoint`: how reverse mode goes through the solve. "checkpoint": discretise, then optimise,
      with recursive checkpoints (Stumm & Walther 2010), exact; "direct": the same by plain
      backpropagation through a bounded loop; "backsolve": the continuous adjoint (Chen et al.
      2018), constant memory, accurate to the tolerance, and the one that raises where its
      backward solve fails; "backsolve_seminorm": the same without error control on the
      parameters' adjoint (Kidger et al. 2021). Or a diffrax adjoint.
    - `norm`: "batch" = RMS over batch and components; "worst" = the largest over the batch of
      each sample's RMS, so that every sample is within tolerance.
    - `max_steps`: the solve gives up after so many steps tried.
    - `first_step`: the first step as a fraction of the interval.

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

    def __check_init__(self):
        _known("solver", self.solver, SOLVERS)
        _known("adjoint", self.adjoint, _ADJOINTS)
        _known("norm", self.norm, _NORMS)
        for name in ("rtol", "atol", "step", "first_step", "max_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {value}")
        if self.step is None and not isinstance(
            self.diffrax_solver(), diffrax.AbstractAdaptiveSolver
        ):
            raise ValueError(
                f"solver {self.solver!r} has no error estimate: give it a fixed step, "
                "as in Solve(solver='euler', step=0.05)"
            )

    def diffrax_solver(self) -> diffrax.AbstractSolver:
        """The solver as diffrax's object."""
        return SOLVERS[self.solver]() if isinstance(self.solver, str) else self.solver

    def diffrax_adjoint(self, batch: int) -> diffrax.AbstractAdjoint:
        """The adjoint as diffrax's object, for the gradient of a mean over `batch` samples."""
        if not isinstance(self.adjoint, str):
            return self.adjoint
        return _ADJOINTS[self.adjoint](self, batch)

    def controller(self, norm) -> diffrax.AbstractStepSizeController:
        """Step size control under an error norm over the state's pytree."""
        if self.step is not None:
            return diffrax.ConstantStepSize()
        # A step below dtmin ends a solve that met NaN, which would else go on to max_steps.
        # diffrax leaves no last step so short: 100 ulps of float64 are more.
        return diffrax.PIDController(
            rtol=self.rtol, atol=self.atol, norm=norm, dtmin=1e-14, force_dtmin=False
        )

    def evaluations(self, steps):
        """Right-hand sides evaluated in so many steps of an explicit Runge-Kutta solver.

        One more for each rejection of the very first step is not counted.
        """
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
    needs. Every leaf of `y0` has the batch as its first axis. A failed solve is a value, not an
    error: its last state comes back with `Stats.failed`.
    """
    span = t1 - t0
    first = span * solve.first_step if solve.step is None else jnp.sign(span) * solve.step
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        solve.diffrax_solver(),
        t0,
        t1,
        first,
        y0,
        args,
        saveat=diffrax.SaveAt(t1=True) if times is None else diffrax.SaveAt(ts=times),
        stepsize_controller=solve.controller(_NORMS[solve.norm]),
        adjoint=solve.diffrax_adjoint(batch=jax.tree.leaves(y0)[0].shape[0]),
        max_steps=solve.max_steps,
        # Raising from inside a compiled program costs a host callback a step.
        throw=False,
    )
    ys = solution.ys if times is not None else jax.tree.map(lambda y: y[0], solution.ys)
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(ys)]
    arrived = solution.result == diffrax.RESULTS.successful
    steps = solution.stats["num_steps"]
    return ys, Stats(
        nfe=solve.evaluations(steps),
        steps=steps,
        rejected=solution.stats["num_rejected_steps"],
        failed=~(arrived & jnp.all(jnp.stack(finite))),
    )


def _finite(mean_square):
    # A NaN error would make the next step NaN; an infinite one rejects and shortens the step.
    return jnp.sqrt(jnp.where(jnp.isnan(mean_square), jnp.inf, mean_square))


def _batch_norm(error):
    leaves = jax.tree.leaves(error)
    return _finite(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def _worst_norm(error):
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(error)]
    total = sum(jnp.sum(leaf**2, axis=1) for leaf in flat)
    return _finite(jnp.max(total) / sum(leaf.shape[1] for leaf in flat))


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
    "backsolve": _backsolve(_batch_norm),
    "backsolve_seminorm": _backsolve(diffrax.adjoint_rms_seminorm),
}


def _known(what, name, table):
    if isinstance(name, str) and name not in table:
        raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(table)}")
