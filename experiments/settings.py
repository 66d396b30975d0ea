"""The settings experiments share, and the objects they describe.

A frozen dataclass is the command line (by tyro) and `config.json` at once. Its comments are the
help texts.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr

from jcnf import (
    CNF,
    Exact,
    ForwardMode,
    Hutchinson,
    Solve,
    distributions,
    evaluate,
    fields,
    objectives,
    regularizers,
    train,
)
from jcnf.divergence import DIVERGENCES, Divergence
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
    """A flow, trained by maximum likelihood with AdamW."""

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
    # mlp, residual (mlp - x), mixture (of two mlps), planar (by a hypernet), potential (OT-Flow)
    field: str = "mlp"
    # hidden widths of the field; planar: units, hypernet's width; potential: width, rank
    widths: tuple[int, ...] = (64, 64, 64)
    # of the first three: how time enters, ignore, concat, squash, concatsquash, hyper, blend
    time: str = "concat"
    # of the first three: tanh, softplus, silu, elu, sine, identity, logcosh
    activation: str = "tanh"
    # base distribution: normal, logistic
    base: str = "normal"
    # end time T of the flow
    t1: float = 1.0
    # train the end time along, from T on (--weight-decay pulls it towards 0)
    learn_t1: bool = False
    # half width of the base's random time while training, 0 for none (STEER)
    steer: float = 0.0
    # divergence while training: exact, forward, hutchinson, hutch++, xtrace (held-out numbers are
    # always exact)
    divergence: str = "exact"
    # probes of an estimated divergence, and of the jacobian and lambda2 penalties
    probes: int = 1
    # Hutchinson's noise: rademacher, gaussian, orthogonal
    noise: str = "rademacher"
    # ODE solver while training: euler, heun, midpoint, bosh3, tsit5, dopri5, dopri8
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
    # penalties and their weights, as in "kinetic 0.01 jacobian 0.01": kinetic, jacobian,
    # jacobian_exact, directional, total_derivative, taylor2 (3, ...), hjb, lambda1, lambda2
    penalties: dict[str, float] = dataclasses.field(default_factory=dict)
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
        self.at_least(1, "probes")
        self.at_least(0, "warmup", "weight_decay", "steer")
        for name, weight in self.penalties.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"--penalties: the weight of {name} must be at least 0 and finite")
        self.positive("learning_rate", "clip", "test_tolerance")
        if not 0 <= self.average < 1:
            raise InputError("--average must be in [0, 1)")
        try:
            self.make_test_solve()
            self.make_objective()
            eqx.filter_eval_shape(self.make_flow, 1)
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.fixed_step is not None and self.t1 > self.fixed_step * self.max_steps:
            raise InputError(
                f"--fixed-step {self.fixed_step} needs {self.t1 / self.fixed_step:.0f} steps: "
                "raise --max-steps, or the step"
            )

    def check_objective(self, dim: int) -> None:
        """Raise `InputError` for what does not go together in `dim` dimensions, by tracing it."""

        def loss(x):
            return self.make_objective()(self.make_flow(dim), x, jr.key(0))

        try:
            eqx.filter_eval_shape(loss, jax.ShapeDtypeStruct((2, dim), float))
        except ValueError as error:
            raise InputError(str(error)) from None

    def make_flow(self, dim: int) -> CNF:
        """The untrained flow."""
        make = _named("field", self.field, FIELDS)
        field = make(self, dim, jr.fold_in(jr.key(self.seed), 0))
        base = _named("base", self.base, distributions.BASES)(dim)
        if self.learn_t1:
            return CNF(fields.TimeChange(field, rate=self.t1), base)
        return CNF(field, base, t1=self.t1)

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

    def make_divergence(self) -> Divergence:
        """The training divergence."""
        make: Any = _named("divergence", self.divergence, DIVERGENCES)
        if make is ForwardMode:
            return make()
        if make is Exact:
            return make(self.probes if {"jacobian", "lambda2"} & self.penalties.keys() else 0)
        return make(self.probes, **{"noise": self.noise} if make is Hutchinson else {})

    def make_objective(self) -> train.Objective:
        """Likelihood by the training solve."""
        penalties = {regularizers.named(n): weight for n, weight in self.penalties.items()}
        if len(penalties) < len(self.penalties):
            raise ValueError(f"a penalty is named twice: {', '.join(self.penalties)}")
        return functools.partial(
            objectives.likelihood,
            solve=self.make_solve(),
            divergence=self.make_divergence(),
            penalties=penalties,
            steer=self.steer,
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


def _mlp(settings, dim, key):
    return fields.MLP(
        dim, settings.widths, time=settings.time, activation=settings.activation, key=key
    )


def _mixture(settings, dim, key):
    *expert_keys, key = jr.split(key, 3)
    return fields.Mixture([_mlp(settings, dim, k) for k in expert_keys], key=key)


def _two_widths(make):
    def field(settings, dim, key):
        if len(settings.widths) != 2:
            raise ValueError(f"the {settings.field} field takes two widths; got {settings.widths}")
        return make(dim, *settings.widths, key=key)

    return field


FIELDS = {
    "mlp": _mlp,
    "residual": lambda settings, dim, key: fields.Residual(_mlp(settings, dim, key)),
    "mixture": _mixture,
    "planar": _two_widths(fields.Planar),
    "potential": _two_widths(fields.Potential),
}


def _named(what, name, table):
    if name not in table:
        raise ValueError(f"unknown {what} '{name}': use one of {', '.join(table)}")
    return table[name]
