"""Settings of every run, of the optimizer, of the training loop, and of measuring."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from experiments._runner.settings import (
    Count,
    NonNegative,
    Points,
    Positive,
    Range,
    Settings,
    Steps,
    Whole,
    flag,
)
from experiments._runner.stages import Stage
from jcnf import Solve, evaluate, objectives, sharding, training
from jcnf._checks import InputError
from jcnf.ode import check_tolerance

VALIDATION_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """The run: its directory, seed and precision."""

    # run directory (by default runs/NAME/TIME-SEED)
    out: Path | None = None
    # seed of the weights, the data order, the noise and the test data
    seed: Whole = 0
    # compute in float64 (like JAX_ENABLE_X64=1), which tolerances below 1e-7 need
    x64: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Settings):
    """The optimizer: AdamW, optionally followed by L-BFGS on one batch."""

    # number of optimizer steps
    steps: Steps = 10_000
    # number of samples per training batch
    batch: Count = 1024
    # peak learning rate
    learning_rate: Positive = 1e-2
    # learning-rate schedule after a linear warm-up; cosine decays to zero
    schedule: Literal["cosine", "constant"] = "cosine"
    # number of warm-up steps, capped at a tenth of all steps
    warmup: Whole = 200
    # decoupled weight decay
    weight_decay: NonNegative = 0.0
    # gradient norm above which gradients are scaled down to it
    clip: Annotated[float, Range(1e-37)] = 10.0
    # decay of the moving average of the parameters, which is used for evaluation
    average: Annotated[float, Range(0, math.nextafter(1, 0))] = 0.999
    # number of L-BFGS steps at the end, on the last objective with one batch and one noise draw
    lbfgs_steps: Whole = 0
    # number of samples in the L-BFGS batch (0 for all rows of a table)
    lbfgs_batch: Annotated[int, Range(0, 10_000_000)] = 4096

    def make_optimizer(
        self, steps: int | None = None, learning_rate: float | None = None
    ) -> optax.GradientTransformation:
        """Return AdamW with warm-up, the learning-rate schedule and gradient clipping."""
        steps = steps or self.steps
        return training.make_optimizer(
            learning_rate or self.learning_rate,
            steps,
            warmup=min(self.warmup, steps // 10),
            weight_decay=self.weight_decay,
            clip=self.clip,
            schedule=self.schedule,
        )

    def make_stage(
        self,
        objective: objectives.Objective,
        solve: Solve | None,
        *,
        steps: int | None = None,
        learning_rate: float | None = None,
    ) -> Stage:
        """Return a stage of training by `objective`, which solves by `solve` if it is given."""
        optimizer = self.make_optimizer(steps, learning_rate)
        return Stage(objective, steps or self.steps, optimizer, solve, self.average, self.batch)

    def then_lbfgs(self, stages: list[Stage]) -> list[Stage]:
        """Append a stage of L-BFGS on the last objective, if there are steps for it.

        **Raises:** `ValueError` for an adjoint without reverse-mode gradients.
        """
        if not self.lbfgs_steps:
            return stages
        solve = stages[-1].solve
        if solve is not None and solve.adjoint == "forward":
            raise ValueError("L-BFGS needs reverse-mode gradients: choose another --adjoint")
        last = stages[-1]._replace(
            steps=self.lbfgs_steps,
            optimizer=optax.lbfgs(),
            batch=self.lbfgs_batch or None,
            average=0.0,
            fixed=True,
        )
        return [*stages, last]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Settings):
    """The training loop: logging, validation, checkpoints, resumption and devices."""

    # resume from the last checkpoint in --out
    resume: bool = False
    # number of steps between lines of metrics.jsonl
    log_every: Steps = 200
    # number of steps between validations; the parameters of the best one are kept
    validate_every: Steps = 2000
    # validations without a new best after which a stage of training ends early (0 for never)
    patience: Whole = 0
    # number of steps between checkpoints
    checkpoint_every: Steps = 2000
    # number of recent checkpoints to keep, beside the best one
    keep_checkpoints: Steps = 3
    # number of devices that share each batch, over all processes (0 for all available)
    devices: Whole = 1

    def make_mesh(self) -> Mesh | None:
        """Return a mesh of the devices, or None for a single one.

        **Raises:** `InputError` if there are not enough devices.
        """
        try:
            mesh = sharding.make_mesh(self.devices)
        except ValueError as error:
            raise InputError(f"--devices: {error}") from None
        return mesh if mesh.size > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure(Settings):
    """Held-out numbers and samples: their solves."""

    # relative and absolute tolerance for held-out numbers and samples
    test_tolerance: Positive = 1e-5

    def check(self) -> None:
        check_reachable("test_tolerance", self.test_tolerance)

    def make_solve(self) -> Solve:
        """Return the solve used for held-out numbers and samples."""
        tolerance = self.test_tolerance
        return dataclasses.replace(evaluate.ACCURATE, rtol=tolerance, atol=tolerance)

    def make_validation_solve(self) -> Solve:
        """Return the solve used in validations, accurate enough to choose parameters."""
        tolerance = max(VALIDATION_TOLERANCE, self.test_tolerance)
        return dataclasses.replace(self.make_solve(), rtol=tolerance, atol=tolerance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointMeasure(Measure):
    """Held-out numbers and samples: their solves, and the number of points."""

    # number of fresh points to measure (in each class, if there are classes)
    test_points: Points = 10_000


class Experiment(Settings):
    """The settings of an experiment, made of parts; one of them is `run`."""

    run: Run

    @property
    def resumes(self) -> bool | None:
        """Whether this resumes a run; None for an experiment whose runs cannot be resumed."""
        return None

    def check(self) -> None:
        if self.resumes and self.run.out is None:
            raise ValueError("--resume needs --out: give the run directory to resume")

    def trace(self) -> None:
        """Trace what can be traced before data are read, to find settings that clash.

        **Raises:** `ValueError` for such settings.
        """

    def make_mesh(self) -> Mesh | None:
        """Return a mesh of the devices that share batches, or None for a single device.

        **Raises:** `InputError` if there is no such mesh.
        """
        if jax.process_count() > 1:
            raise InputError("this runs in one process only: unset JAX_COORDINATOR_ADDRESS")
        return None


class LoopExperiment(Experiment):
    """The settings of an experiment that trains by the loop with checkpoints."""

    training: Training
    loop: Loop
    # Whether the data are a table, all rows of which can make a batch.
    has_table: ClassVar[bool] = False

    def make_stages(self) -> list[Stage]:
        """Return the stages of training."""
        raise NotImplementedError

    @property
    def resumes(self) -> bool:
        return self.loop.resume

    @property
    def loss_units(self) -> str:
        """The unit of the training loss."""
        return "nats"

    def check(self) -> None:
        super().check()
        if not (self.training.lbfgs_batch or self.has_table):
            raise ValueError("--lbfgs-batch must be at least 1, because the data are not a table")

    def make_mesh(self) -> Mesh | None:
        mesh = self.loop.make_mesh()
        used = ("batch", "lbfgs_batch") if self.training.lbfgs_steps else ("batch",)
        for name in used:
            size = getattr(self.training, name)
            if mesh is not None and (size == 0 or size % mesh.size):
                raise InputError(
                    f"{flag(name)} {size} cannot be split among {mesh.size} devices: make it a "
                    f"multiple of {mesh.size}, or change --devices"
                )
        return mesh


def check_reachable(name: str, tolerance: float) -> None:
    """Raise `ValueError` that names the setting if the dtype cannot reach a tolerance."""
    try:
        check_tolerance(Solve(rtol=tolerance, atol=1e-37), jnp.result_type(float))
    except ValueError as error:
        raise ValueError(f"{flag(name)}: {error}") from None
