"""Settings of a run, of training, of solves, and of the loop: the parts experiments are made of.

A frozen dataclass is the command line (by tyro) and `config.json` at once. Its comments are the
help texts. An experiment inherits the parts that it uses.
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
from jcnf.ode import MOST_STEPS, check_tolerance

T = TypeVar("T")
VALIDATION_TOLERANCE = 1e-4
LEAST = 1e-37  # what is less is 0 in float32
WIDEST, LAYERS = 65_536, 1000  # of networks
MANY = 10_000_000  # of what is held in memory at once


def flag(name: str) -> str:
    """A setting as the command line has it."""
    return "--" + name.replace("_", "-")


def preset(cls: type[T]) -> type[T]:
    """Settings of a base class with other defaults: a frozen dataclass of its body's assignments.

    These go without annotations; types and help stay those of the base.
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
    """Where a run goes."""

    # run directory; by default runs/NAME/TIME-SEED
    out: Path | None = None
    # seed of weights, data order, noise and test data
    seed: int = 0
    # compute in float64 (as with JAX_ENABLE_X64=1), for tolerances below 1e-7
    x64: bool = False

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        self.at_least(0, "seed")

    def make_mesh(self) -> Mesh | None:
        """Of the devices that share batches; None for one. Raises `InputError` where it cannot."""
        if jax.process_count() > 1:
            raise InputError("this runs in one process only: unset JAX_COORDINATOR_ADDRESS")
        return None

    @property
    def dtype(self) -> Any:
        """What is computed in."""
        return jnp.dtype("float64" if self.x64 else jnp.result_type(float))

    def at_least(self, lowest: float, *names: str, most: float = 2**31 - 1) -> None:
        """Raise `InputError` where a setting is below `lowest`, above `most`, or NaN."""
        for name in names:
            if not lowest <= getattr(self, name) <= most:
                raise InputError(f"{flag(name)} must be from {lowest:.10g} to {most:.10g}")

    def positive(self, *names: str, most: float = 1e9) -> None:
        """Raise `InputError` where a setting is not above 0, or nothing in float32."""
        for name in names:
            if not LEAST <= getattr(self, name) <= most:
                raise InputError(f"{flag(name)} must be positive, from {LEAST:g} to {most:g}")

    def sizes(self, *names: str, fewest: int = 0) -> None:
        """Raise `InputError` where a setting is no list of layers' sizes."""
        for name in names:
            sizes = getattr(self, name)
            if not (fewest <= len(sizes) <= LAYERS and all(1 <= size <= WIDEST for size in sizes)):
                raise InputError(
                    f"{flag(name)} must be {fewest} to {LAYERS} whole numbers from 1 to {WIDEST}; "
                    f"got {sizes}"
                )

    def reachable(self, *names: str) -> None:
        """Raise `InputError` where a setting is no tolerance that the dtype can give."""
        self.positive(*names)
        for name in names:
            try:
                check_tolerance(Solve(rtol=getattr(self, name), atol=LEAST), self.dtype)
            except ValueError as error:
                raise InputError(f"{flag(name)}: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings(RunSettings):
    """Optimisers: AdamW, and then perhaps L-BFGS on one batch."""

    # optimiser steps
    steps: int = 10_000
    # samples in a training batch
    batch: int = 1024
    # peak learning rate
    learning_rate: float = 1e-2
    # what it does after a linear warm-up: cosine (to zero), constant
    schedule: str = "cosine"
    # steps of warm-up; at most a tenth of all
    warmup: int = 200
    # decoupled weight decay
    weight_decay: float = 0.0
    # gradient norm above which gradients are scaled down
    clip: float = 10.0
    # decay of the parameters' moving average, which is what is evaluated
    average: float = 0.999
    # steps of L-BFGS at the end, by the last objective, on one batch with one draw of the noise
    lbfgs_steps: int = 0
    # samples in that batch; of a table, 0 for all its rows
    lbfgs_batch: int = 4096
    # whether there is a table
    has_table: ClassVar[bool] = False

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(1, "steps")
        self.at_least(1, "batch", most=MANY)
        self.at_least(0, "warmup", "weight_decay", "lbfgs_steps")
        self.at_least(0 if self.has_table else 1, "lbfgs_batch", most=MANY)
        self.positive("learning_rate")
        self.positive("clip", most=math.inf)
        if not 0 <= self.average < 1:
            raise InputError("--average must be in [0, 1)")
        if self.lbfgs_batch != type(self).lbfgs_batch and not self.lbfgs_steps:
            raise InputError("--lbfgs-batch would change nothing: of use with --lbfgs-steps alone")

    def make_optimizer(self, steps: int, learning_rate: float) -> optax.GradientTransformation:
        """AdamW, warm-up and cosine, clipping."""
        return training.make_optimizer(
            learning_rate,
            steps,
            warmup=min(self.warmup, steps // 10),
            weight_decay=self.weight_decay,
            clip=self.clip,
            schedule=self.schedule,
        )

    def then_lbfgs(self, stages: list[Stage]) -> list[Stage]:
        """These stages, and L-BFGS by the objective of the last where there are steps for it."""
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
        """The untrained flow."""
        raise NotImplementedError

    def make_stages(self) -> list[Stage]:
        """The parts of the training."""
        raise NotImplementedError

    @property
    def loss_units(self) -> str:
        """What the training loss is measured in."""
        return "no unit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolveSettings(RunSettings):
    """Solves in training, and those of held-out numbers."""

    # ODE solver while training: euler, heun, midpoint, rk4, bosh3, tsit5, dopri5, dopri8
    solver: str = "dopri5"
    # relative tolerance while training
    rtol: float = 1e-3
    # absolute tolerance while training
    atol: float = 1e-3
    # fixed step in t instead of the tolerances
    fixed_step: float | None = None
    # checkpoint, direct, backsolve, backsolve_seminorm, reversible, forward (few parameters only)
    adjoint: str = "checkpoint"
    # error norm while training: batch, worst
    norm: str = "batch"
    # a training solve fails after so many steps; its update is skipped and counted
    max_steps: int = 256
    # both tolerances of held-out numbers and samples
    test_tolerance: float = 1e-5

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(1, "max_steps", most=MOST_STEPS)
        self.reachable("test_tolerance")
        self.positive("rtol", "atol", *(["fixed_step"] if self.fixed_step is not None else []))
        given = [n for n in ("rtol", "atol", "norm") if getattr(self, n) != getattr(type(self), n)]
        if given and self.fixed_step is not None:
            flags = ", ".join("--" + name for name in given)
            raise InputError(f"{flags} would change nothing under a --fixed-step: set that to None")
        try:
            self.make_test_solve()
            check_tolerance(self.make_solve(), self.dtype)
        except ValueError as error:
            raise InputError(str(error)) from None

    def check_steps(self, length: float) -> None:
        """Raise `InputError` where a fixed step cannot get over an interval of that length."""
        if self.fixed_step is not None and self.fixed_step > length:
            raise InputError(f"--fixed-step {self.fixed_step:g} is beyond the end, {length:g}")
        if self.fixed_step is not None and length > self.fixed_step * self.max_steps:
            raise InputError(
                f"--fixed-step {self.fixed_step} needs {length / self.fixed_step:.0f} steps: "
                "raise --max-steps, or the step"
            )

    def make_solve(self) -> Solve:
        """The training solve."""
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
        """The solve of held-out numbers and samples."""
        tolerance = self.test_tolerance
        return dataclasses.replace(evaluate.ACCURATE, rtol=tolerance, atol=tolerance)

    def make_validation_solve(self) -> Solve:
        """The solve of validations: digits enough to choose parameters by."""
        tolerance = max(VALIDATION_TOLERANCE, self.test_tolerance)
        return dataclasses.replace(self.make_test_solve(), rtol=tolerance, atol=tolerance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings(TrainingSettings):
    """The loop that logs, validates, keeps checkpoints and resumes."""

    # go on from the checkpoint in --out
    resume: bool = False
    # steps between lines of metrics.jsonl
    log_every: int = 200
    # steps between checkpoints
    checkpoint_every: int = 2000
    # how many of the last ones are kept, beside the best
    keep: int = 3
    # steps between validations; the parameters with the best one are kept
    validate_every: int = 2000
    # validations without a new best after which a part of training ends early; 0 for never
    patience: int = 0
    # devices that share the batches, of all processes together; 0 for all there are
    devices: int = 1

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        if self.resume and self.out is None:
            raise InputError("--resume needs --out: name the run directory to go on with")
        self.at_least(1, "log_every", "checkpoint_every", "validate_every", "keep")
        self.at_least(0, "patience", "devices")
        mesh = self.make_mesh()
        for name in self.batches():
            size = getattr(self, name)
            if mesh is not None and (size == 0 or size % mesh.size):
                raise InputError(
                    f"{flag(name)} {size} cannot be split among {mesh.size} devices: "
                    "make it a multiple, or choose other --devices"
                )

    def batches(self) -> tuple[str, ...]:
        """The settings that are sizes of batches, which the devices must divide."""
        return ("batch", "lbfgs_batch") if self.lbfgs_steps else ("batch",)

    def make_mesh(self) -> Mesh | None:
        """Of the devices that share batches; None for one. Raises `InputError` where it cannot."""
        try:
            mesh = sharding.make_mesh(self.devices)
        except ValueError as error:
            raise InputError(f"--devices: {error}") from None
        return mesh if mesh.size > 1 else None
