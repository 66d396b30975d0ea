"""The settings experiments share, and the objects they describe.

A frozen dataclass is the command line (by tyro) and `config.json` at once. Its comments are the
help texts.
"""

import dataclasses
import functools
import math
from pathlib import Path

import equinox as eqx
import jax.random as jr

from jcnf import (
    CNF,
    Exact,
    Hutchinson,
    Solve,
    distributions,
    evaluate,
    fields,
    objectives,
    regularizers,
    train,
)
from jcnf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run goes."""

    # run directory; by default runs/NAME/TIME-SEED
    out: Path | None = None
    # seed of weights, data order, noise and test data
    seed: int = 0

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        self.at_least(0, "seed")

    def at_least(self, lowest: float, *names: str) -> None:
        """Raise `InputError` where a setting is below `lowest`, above int32, or NaN."""
        for name in names:
            if not lowest <= getattr(self, name) < 2**31:
                raise InputError(f"--{name.replace('_', '-')} must be from {lowest} to {2**31 - 1}")

    def positive(self, *names: str) -> None:
        """Raise `InputError` where a setting is not above 0, or is NaN."""
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} must be positive and finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSettings(RunSettings):
    """A flow with an MLP field, trained by maximum likelihood with AdamW."""

    # optimiser steps
    steps: int = 2000
    # go on from the checkpoint in --out
    resume: bool = False
    # steps between lines of metrics.jsonl
    log_every: int = 20
    # steps between checkpoints
    checkpoint_every: int = 200
    # steps between validations; the parameters with the best one are kept
    validate_every: int = 200
    # hidden widths of the field
    widths: tuple[int, ...] = (64, 64, 64)
    # how time enters a layer: ignore, concat, squash, concatsquash
    time: str = "concat"
    # tanh, softplus, silu, elu, sine, identity
    activation: str = "tanh"
    # base distribution: normal, logistic
    base: str = "normal"
    # end time T of the flow
    t1: float = 1.0
    # divergence while training: exact, hutchinson (held-out numbers are always exact)
    divergence: str = "exact"
    # Hutchinson's probes
    probes: int = 1
    # Hutchinson's noise: rademacher, gaussian
    noise: str = "rademacher"
    # ODE solver while training: euler, heun, midpoint, bosh3, tsit5, dopri5, dopri8
    solver: str = "dopri5"
    # relative tolerance while training
    rtol: float = 1e-3
    # absolute tolerance while training
    atol: float = 1e-3
    # fixed step in t instead of the tolerances
    fixed_step: float | None = None
    # checkpoint, direct, backsolve, backsolve_seminorm
    adjoint: str = "checkpoint"
    # error norm while training: batch, worst
    norm: str = "batch"
    # a training solve fails after so many steps; its update is skipped and counted
    max_steps: int = 256
    # both tolerances of held-out numbers and samples
    test_tolerance: float = 1e-5
    # weight of the kinetic energy penalty
    kinetic: float = 0.0
    # samples in a training batch
    batch: int = 256
    # peak learning rate: linear warm-up, then a cosine to zero
    learning_rate: float = 5e-3
    # steps of warm-up; at most a tenth of all
    warmup: int = 100
    # decoupled weight decay
    weight_decay: float = 0.0
    # gradient norm above which gradients are scaled down
    clip: float = 2.0
    # decay of the parameters' moving average, which is what is evaluated
    average: float = 0.999

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(
            1, "steps", "log_every", "checkpoint_every", "validate_every", "batch", "max_steps"
        )
        self.at_least(0, "warmup", "kinetic", "weight_decay")
        self.positive("learning_rate", "clip", "test_tolerance")
        if not 0 <= self.average < 1:
            raise InputError("--average must be in [0, 1)")
        if self.divergence not in ("exact", "hutchinson"):
            raise InputError(f"unknown divergence '{self.divergence}': use exact or hutchinson")
        if self.base not in distributions.BASES:
            raise InputError(
                f"unknown base '{self.base}': use one of {', '.join(distributions.BASES)}"
            )
        try:
            self.make_objective()
            self.make_test_solve()
            eqx.filter_eval_shape(self.make_flow, 1)
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.fixed_step is not None and self.t1 > self.fixed_step * self.max_steps:
            raise InputError(
                f"--fixed-step {self.fixed_step} needs {self.t1 / self.fixed_step:.0f} steps: "
                "raise --max-steps, or the step"
            )

    def make_flow(self, dim: int) -> CNF:
        """The untrained flow."""
        field = fields.MLP(
            dim,
            self.widths,
            time=self.time,
            activation=self.activation,
            key=jr.fold_in(jr.key(self.seed), 0),
        )
        return CNF(field, distributions.BASES[self.base](dim), t1=self.t1)

    def make_objective(self) -> train.Objective:
        """Likelihood by the training solve."""
        solve = Solve(
            solver=self.solver,
            rtol=self.rtol,
            atol=self.atol,
            step=self.fixed_step,
            adjoint=self.adjoint,
            norm=self.norm,
            max_steps=self.max_steps,
        )
        exact = self.divergence == "exact"
        divergence = Exact() if exact else Hutchinson(self.probes, self.noise)
        return functools.partial(
            objectives.likelihood,
            solve=solve,
            divergence=divergence,
            penalties={regularizers.kinetic: self.kinetic} if self.kinetic else {},
        )

    def make_test_solve(self) -> Solve:
        """The solve of held-out numbers and samples."""
        tolerance = self.test_tolerance
        return dataclasses.replace(evaluate.ACCURATE, rtol=tolerance, atol=tolerance)

    def make_optimizer(self):
        """AdamW, warm-up and cosine, clipping."""
        return train.make_optimizer(
            self.learning_rate,
            self.steps,
            warmup=min(self.warmup, self.steps // 10),
            weight_decay=self.weight_decay,
            clip=self.clip,
        )
