"""Settings that experiments share: of the run, of training, of its loop and of ODE solves.

Each frozen dataclass defines flags of the command line (through tyro) and entries of `config.json`;
the comments above its fields are the help texts. An experiment inherits the classes that it uses.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments._runner.stages import Stage
from jcnf import Solve, evaluate, sharding, training
from jcnf._checks import InputError
from jcnf.ode import MAX_STEPS_LIMIT, check_tolerance

T = TypeVar("T")
VALIDATION_TOLERANCE = 1e-4
SMALLEST_FLOAT = 1e-37  # smaller numbers underflow in float32
MAX_WIDTH, MAX_LAYERS = 65_536, 1000  # of networks
MAX_COUNT = 10_000_000  # of rows, points or the like held in memory at once


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def preset(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that changes defaults of the settings that it inherits.

    Its body assigns the defaults without annotations; types and help texts stay those of the base.

    **Raises:** `TypeError` for a name that is not an inherited setting.
    """
    bases = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    known = {field.name: field.type for base in bases for field in dataclasses.fields(base)}
    for name, value in list(vars(cls).items()):
        own = name in cls.__annotations__ or name.startswith("_") or hasattr(value, "__get__")
        if name in known and not own:
            cls.__annotations__[name] = known[name]
        elif not own and not any(hasattr(base, name) for base in bases):
            raise TypeError(f"{cls.__name__} has no setting {name!r}")
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of every run: its directory, seed and precision."""

    # run directory (by default runs/NAME/TIME-SEED)
    out: Path | None = None
    # seed of the weights, the data order, the noise and the test data
    seed: int = 0
    # compute in float64 (like JAX_ENABLE_X64=1), which tolerances below 1e-7 need
    x64: bool = False

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        self.at_least(0, "seed")

    def make_mesh(self) -> Mesh | None:
        """Return a mesh of the devices that share batches, or None for a single device.

        **Raises:** `InputError` if there is no such mesh.
        """
        if jax.process_count() > 1:
            raise InputError("this runs in one process only: unset JAX_COORDINATOR_ADDRESS")
        return None

    @property
    def dtype(self) -> Any:
        """The dtype of all computations."""
        return jnp.dtype("float64" if self.x64 else jnp.result_type(float))

    def at_least(self, lowest: float, *names: str, most: float = 2**31 - 1) -> None:
        """Raise `InputError` if a setting is below `lowest`, above `most`, or NaN."""
        for name in names:
            value = getattr(self, name)
            if not lowest <= value <= most:
                raise InputError(
                    f"{flag(name)} must be from {lowest:.10g} to {most:.10g}; got {value}"
                )

    def positive(self, *names: str, most: float = 1e9) -> None:
        """Raise `InputError` if a setting is not positive in float32, or is above `most`."""
        for name in names:
            value = getattr(self, name)
            if not SMALLEST_FLOAT <= value <= most:
                raise InputError(
                    f"{flag(name)} must be positive, from {SMALLEST_FLOAT:g} to {most:g}; "
                    f"got {value}"
                )

    def sizes(self, *names: str, fewest: int = 0) -> None:
        """Raise `InputError` if a setting is not a list of layer sizes."""
        for name in names:
            sizes = getattr(self, name)
            in_range = all(1 <= size <= MAX_WIDTH for size in sizes)
            if not (fewest <= len(sizes) <= MAX_LAYERS and in_range):
                raise InputError(
                    f"{flag(name)} must be {fewest} to {MAX_LAYERS} whole numbers from 1 to "
                    f"{MAX_WIDTH}; got {sizes}"
                )

    def reachable(self, *names: str) -> None:
        """Raise `InputError` if a setting is not a tolerance that the dtype can reach."""
        self.positive(*names)
        for name in names:
            try:
                check_tolerance(Solve(rtol=getattr(self, name), atol=SMALLEST_FLOAT), self.dtype)
            except ValueError as error:
                raise InputError(f"{flag(name)}: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings(RunSettings):
    """Settings of the optimizers: AdamW, optionally followed by L-BFGS on one batch."""

    # number of optimizer steps
    steps: int = 10_000
    # number of samples per training batch
    batch: int = 1024
    # peak learning rate
    learning_rate: float = 1e-2
    # learning-rate schedule after a linear warm-up: cosine (decays to zero), constant
    schedule: str = "cosine"
    # number of warm-up steps, capped at a tenth of all steps
    warmup: int = 200
    # decoupled weight decay
    weight_decay: float = 0.0
    # gradient norm above which gradients are scaled down to it
    clip: float = 10.0
    # decay of the moving average of the parameters, which is used for evaluation
    average: float = 0.999
    # number of L-BFGS steps at the end, on the last objective with one batch and one noise draw
    lbfgs_steps: int = 0
    # number of samples in the L-BFGS batch (0 for all rows, if the data are a table)
    lbfgs_batch: int = 4096
    # whether the data are a table, all rows of which can make a batch
    has_table: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        self.at_least(1, "steps")
        self.at_least(1, "batch", most=MAX_COUNT)
        self.at_least(0, "warmup", "weight_decay", "lbfgs_steps")
        self.at_least(0 if self.has_table else 1, "lbfgs_batch", most=MAX_COUNT)
        self.positive("learning_rate")
        self.positive("clip", most=math.inf)
        if not 0 <= self.average < 1:
            raise InputError(f"--average must be in [0, 1); got {self.average}")
        if self.lbfgs_batch != type(self).lbfgs_batch and not self.lbfgs_steps:
            raise InputError("--lbfgs-batch has no effect without --lbfgs-steps: set that as well")

    def make_optimizer(self, steps: int, learning_rate: float) -> optax.GradientTransformation:
        """Return AdamW with warm-up, the learning-rate schedule and gradient clipping."""
        return training.make_optimizer(
            learning_rate,
            steps,
            warmup=min(self.warmup, steps // 10),
            weight_decay=self.weight_decay,
            clip=self.clip,
            schedule=self.schedule,
        )

    def then_lbfgs(self, stages: list[Stage]) -> list[Stage]:
        """Append a stage of L-BFGS on the last objective, if there are steps for it."""
        if not self.lbfgs_steps:
            return stages
        last = stages[-1]._replace(
            steps=self.lbfgs_steps,
            optimizer=optax.lbfgs(),
            batch=self.lbfgs_batch or None,
            average=0.0,
            fixed=True,
        )
        return [*stages, last]

    def make_flow(self, dim: int, context_dim: int = 0) -> Any:
        """Return the untrained flow."""
        raise NotImplementedError

    def make_stages(self) -> list[Stage]:
        """Return the stages of training."""
        raise NotImplementedError

    @property
    def loss_units(self) -> str:
        """The unit of the training loss."""
        return "no unit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveSettings(RunSettings):
    """Settings of the ODE solves in training, and of those for held-out numbers."""

    # ODE solver in training: euler, heun, midpoint, rk4, bosh3, tsit5, dopri5, dopri8
    solver: str = "dopri5"
    # relative tolerance in training
    rtol: float = 1e-3
    # absolute tolerance in training
    atol: float = 1e-3
    # fixed step size in t, instead of steps adapted to the tolerances
    fixed_step: float | None = None
    # adjoint: checkpoint, direct, backsolve, backsolve_seminorm, reversible, forward (for few
    # parameters only)
    adjoint: str = "checkpoint"
    # error norm in training: batch, worst
    norm: str = "batch"
    # maximum number of steps of a training solve; if one needs more, its update is skipped
    max_steps: int = 256
    # relative and absolute tolerance for held-out numbers and samples
    test_tolerance: float = 1e-5

    def check(self) -> None:
        super().check()
        self.at_least(1, "max_steps", most=MAX_STEPS_LIMIT)
        self.reachable("test_tolerance")
        self.positive("rtol", "atol", *(["fixed_step"] if self.fixed_step is not None else []))
        given = [n for n in ("rtol", "atol", "norm") if getattr(self, n) != getattr(type(self), n)]
        if given and self.fixed_step is not None:
            flags = ", ".join("--" + name for name in given)
            raise InputError(
                f"{flags} would have no effect with --fixed-step: set --fixed-step None, or leave "
                "them out"
            )
        try:
            self.make_test_solve()
            check_tolerance(self.make_solve(), self.dtype)
        except ValueError as error:
            raise InputError(str(error)) from None

    def check_steps(self, length: float) -> None:
        """Raise `InputError` if fixed steps cannot cover an interval of this length."""
        if self.fixed_step is not None and self.fixed_step > length:
            raise InputError(
                f"--fixed-step must be at most the length of the interval, {length:g}; "
                f"got {self.fixed_step:g}"
            )
        if self.fixed_step is not None and length > self.fixed_step * self.max_steps:
            raise InputError(
                f"--fixed-step {self.fixed_step} needs {length / self.fixed_step:.0f} steps, but "
                f"--max-steps is {self.max_steps}: raise one of them"
            )

    def make_solve(self) -> Solve:
        """Return the solve used in training."""
        return Solve(
            solver=self.solver,
            rtol=self.rtol,
            atol=self.atol,
            step=self.fixed_step,
            adjoint=self.adjoint,
            norm=self.norm,
            max_steps=self.max_steps,
        )

    def make_test_solve(self) -> Solve:
        """Return the solve used for held-out numbers and samples."""
        tolerance = self.test_tolerance
        return dataclasses.replace(evaluate.ACCURATE, rtol=tolerance, atol=tolerance)

    def make_validation_solve(self) -> Solve:
        """Return the solve used in validations, accurate enough to choose parameters."""
        tolerance = max(VALIDATION_TOLERANCE, self.test_tolerance)
        return dataclasses.replace(self.make_test_solve(), rtol=tolerance, atol=tolerance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings(TrainingSettings):
    """Settings of the training loop, which logs, validates, saves checkpoints and resumes."""

    # resume from the last checkpoint in --out
    resume: bool = False
    # number of steps between lines of metrics.jsonl
    log_every: int = 200
    # number of steps between checkpoints
    checkpoint_every: int = 2000
    # number of recent checkpoints to keep, beside the best one
    keep: int = 3
    # number of steps between validations; the parameters of the best one are kept
    validate_every: int = 2000
    # validations without a new best after which a stage of training ends early (0 for never)
    patience: int = 0
    # number of devices that share each batch, over all processes (0 for all available)
    devices: int = 1

    def check(self) -> None:
        super().check()
        if self.resume and self.out is None:
            raise InputError("--resume needs --out: give the run directory to resume")
        self.at_least(1, "log_every", "checkpoint_every", "validate_every", "keep")
        self.at_least(0, "patience", "devices")
        mesh = self.make_mesh()
        for name in self.batches():
            size = getattr(self, name)
            if mesh is not None and (size == 0 or size % mesh.size):
                raise InputError(
                    f"{flag(name)} {size} cannot be split among {mesh.size} devices: make it a "
                    f"multiple of {mesh.size}, or change --devices"
                )

    def batches(self) -> tuple[str, ...]:
        """Return the settings that are batch sizes, which the devices must divide evenly."""
        return ("batch", "lbfgs_batch") if self.lbfgs_steps else ("batch",)

    def make_mesh(self) -> Mesh | None:
        try:
            mesh = sharding.make_mesh(self.devices)
        except ValueError as error:
            raise InputError(f"--devices: {error}") from None
        return mesh if mesh.size > 1 else None
