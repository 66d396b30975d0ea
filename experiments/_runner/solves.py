"""Settings of the ODE solves in training."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp

from experiments._runner.settings import Positive, Range, Settings
from jcnf import Solve
from jcnf._checks import InputError
from jcnf.ode import MAX_STEPS_LIMIT, check_tolerance

DEFAULT_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSolve(Settings):
    """The ODE solves in training."""

    # ODE solver
    solver: Literal["euler", "heun", "midpoint", "rk4", "bosh3", "tsit5", "dopri5", "dopri8"] = (
        "dopri5"
    )
    # relative tolerance
    rtol: Positive = DEFAULT_TOLERANCE
    # absolute tolerance
    atol: Positive = DEFAULT_TOLERANCE
    # fixed step size in t, instead of steps adapted to the tolerances
    fixed_step: Positive | None = None
    # how gradients are computed; forward is for few parameters only
    adjoint: Literal[
        "checkpoint", "direct", "backsolve", "backsolve_seminorm", "reversible", "forward"
    ] = "checkpoint"
    # error norm: of the whole batch, or of its worst row
    norm: Literal["batch", "worst"] = "batch"
    # maximum number of steps; if a solve needs more, its update is skipped
    max_steps: Annotated[int, Range(1, MAX_STEPS_LIMIT)] = 256

    def check(self) -> None:
        check_tolerance(self.make(), jnp.result_type(float))

    def check_interval(self, length: float) -> None:
        """Raise `InputError` if fixed steps cannot cover an interval of this length."""
        if self.fixed_step is None:
            return
        if self.fixed_step > length:
            raise InputError(
                f"--fixed-step must be at most the length of the interval, {length:g}; "
                f"got {self.fixed_step:g}"
            )
        if length > self.fixed_step * self.max_steps:
            raise InputError(
                f"--fixed-step {self.fixed_step} needs {length / self.fixed_step:.0f} steps, but "
                f"--max-steps is {self.max_steps}: raise one of them"
            )

    def make(self) -> Solve:
        """Return the solve."""
        return Solve(
            solver=self.solver,
            rtol=self.rtol,
            atol=self.atol,
            step=self.fixed_step,
            adjoint=self.adjoint,
            norm=self.norm,
            max_steps=self.max_steps,
        )
