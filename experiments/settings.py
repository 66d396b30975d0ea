"""The settings experiments share, and the objects they describe.

A frozen dataclass is the command line (by tyro) and `config.json` at once. Its comments are the
help texts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import optax

from experiments.fields import FIELDS
from experiments.stages import Stage
from jcnf import (
    CNF,
    Exact,
    ForwardMode,
    Hutchinson,
    Solve,
    couplings,
    distributions,
    evaluate,
    fields,
    objectives,
    paths,
    regularizers,
    times,
    train,
)
from jcnf.divergence import DIVERGENCES, Divergence
from jcnf.errors import InputError

VALIDATION_TOLERANCE = 1e-4
# Settings, and what puts them to use: objectives, fields, or a flag.
USERS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("flow_matching", "mixed"): ("path", "coupling", "times", "drop_context"),
    ("mixed",): ("matching_weight",),
    ("likelihood", "mixed"): (
        *("solver", "rtol", "atol", "fixed_step", "adjoint", "norm", "max_steps"),
        *("probes", "noise", "steer", "divergence", "penalties"),
    ),
    ("--finetune-steps",): ("finetune_learning_rate",),
    ("resnet",): ("frequencies",),
    ("mlp", "residual", "mixture"): ("time",),
}


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
    """A flow, trained with AdamW by one objective, and then perhaps by maximum likelihood."""

    # what is trained by: flow_matching (nothing is solved), likelihood, mixed (likelihood plus
    # --matching-weight times flow matching)
    objective: str = "flow_matching"
    # optimiser steps
    steps: int = 10_000
    # steps of maximum likelihood afterwards
    finetune_steps: int = 0
    # resnet, mlp, residual (mlp - x), mixture (of two mlps), planar (by a hypernet), potential
    # (OT-Flow)
    field: str = "resnet"
    # hidden widths of the field; resnet: that of each block; planar: units, hypernet's width;
    # potential: width, rank
    widths: tuple[int, ...] = (96, 96)
    # mlp, residual, mixture: how time enters, ignore, concat, squash, concatsquash,
    # hyper, blend
    time: str = "concat"
    # resnet: pairs of a sine and a cosine of time beside the time itself
    frequencies: int = 4
    # but for planar, potential: tanh, softplus, silu, elu, sine, identity, logcosh
    activation: str = "silu"
    # base distribution: normal, logistic
    base: str = "normal"
    # end time T of the flow
    t1: float = 1.0
    # train the end time along, from T on (--weight-decay pulls it towards 0)
    learn_t1: bool = False
    # flow matching's path: linear, trigonometric, sigma_min, variance_preserving, stochastic
    path: str = "linear"
    # which base sample goes to which data point: independent, exact (optimal transport), sinkhorn
    coupling: str = "independent"
    # where on its path a sample is looked at: uniform, lattice, late, logit_normal
    times: str = "late"
    # share of flow matching's contexts that are left out, for guidance afterwards
    drop_context: float = 0.0
    # flow matching's weight in the mixed objective, beside a likelihood of weight 1
    matching_weight: float = 1.0
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
    batch: int = 1024
    # peak learning rate: linear warm-up, then a cosine to zero
    learning_rate: float = 1e-2
    # the same of the steps of --finetune-steps
    finetune_learning_rate: float = 1e-3
    # steps of warm-up; at most a tenth of all
    warmup: int = 200
    # decoupled weight decay
    weight_decay: float = 0.0
    # gradient norm above which gradients are scaled down
    clip: float = 10.0
    # decay of the parameters' moving average, which is what is evaluated
    average: float = 0.999

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(1, "steps", "batch", "max_steps", "probes")
        self.at_least(0, "warmup", "weight_decay", "steer", "finetune_steps")
        self.at_least(0, "matching_weight", "frequencies")
        for name, weight in self.penalties.items():
            if not 0 <= weight < math.inf:
                raise InputError(f"--penalties: the weight of {name} must be at least 0 and finite")
        self.positive("learning_rate", "finetune_learning_rate", "clip", "test_tolerance")
        if not 0 <= self.average < 1:
            raise InputError("--average must be in [0, 1)")
        try:
            self.make_test_solve()
            self.make_stages()
            eqx.filter_eval_shape(self.make_flow, 1)
        except ValueError as error:
            raise InputError(str(error)) from None
        if self.fixed_step is not None and self.t1 > self.fixed_step * self.max_steps:
            raise InputError(
                f"--fixed-step {self.fixed_step} needs {self.t1 / self.fixed_step:.0f} steps: "
                "raise --max-steps, or the step"
            )
        self._check_use()

    def uses(self) -> set[str]:
        """The parts of the settings that these ones put to use, by the names of `USERS`."""
        parts = {self.objective, "likelihood" if self.finetune_steps else "", self.field}
        if self.finetune_steps:
            parts.add("--finetune-steps")
        return parts

    def _check_use(self):
        """Refuse settings that would change nothing."""
        defaults, uses = type(self)(), self.uses()
        for users, names in USERS.items():
            given = [n for n in names if getattr(self, n) != getattr(defaults, n)]
            if given and not uses & set(users):
                flags = ", ".join("--" + name.replace("_", "-") for name in given)
                raise InputError(
                    f"{flags} would change nothing: of use with {' or '.join(users)} alone"
                )
        if self.drop_context and not 0 < self.drop_context < 1:
            raise InputError(f"--drop-context must be in [0, 1); got {self.drop_context}")

    @property
    def loss_units(self) -> str:
        """What the training loss is measured in."""
        return "nats" if self.objective == "likelihood" else "no unit"

    def check_objective(self, dim: int, context_dim: int = 0) -> None:
        """Raise `InputError` for what does not go together in `dim` dimensions, by tracing it."""
        x = jax.ShapeDtypeStruct((2, dim), float)
        batch = (x, jax.ShapeDtypeStruct((2, context_dim), float)) if context_dim else x
        try:
            for stage in self.make_stages():
                eqx.filter_eval_shape(
                    lambda batch, stage=stage: stage.objective(
                        self.make_flow(dim, context_dim), batch, jr.key(0)
                    ),
                    batch,
                )
        except ValueError as error:
            raise InputError(str(error)) from None

    def make_flow(self, dim: int, context_dim: int = 0) -> CNF:
        """The untrained flow."""
        make = _named("field", self.field, FIELDS)
        field = make(self, dim, context_dim, jr.fold_in(jr.key(self.seed), 0))
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

    def make_stages(self) -> list[Stage]:
        """Training by `objective`, and then by likelihood where there are steps for it."""
        likelihood, matching = self.make_likelihood(), self.make_matching()
        weights = {likelihood: 1.0, matching: self.matching_weight}
        objective = {
            "flow_matching": matching,
            "likelihood": likelihood,
            "mixed": functools.partial(objectives.mixed, weights=weights),
        }
        plan = [(_named("objective", self.objective, objective), self.steps, self.learning_rate)]
        if self.finetune_steps:
            plan.append((likelihood, self.finetune_steps, self.finetune_learning_rate))
        return [
            Stage(
                objectives.with_context(objective),
                steps,
                self.make_optimizer(steps, rate),
                train.by_reverse_mode
                if objective is matching
                else train.differentiator(self.make_solve()),
                self.average,
            )
            for objective, steps, rate in plan
        ]

    def make_matching(self) -> Callable:
        """Flow matching."""
        return functools.partial(
            objectives.flow_matching,
            path=_named("path", self.path, paths.PATHS),
            coupling=_named("coupling", self.coupling, couplings.COUPLINGS),
            time=_named("times", self.times, times.TIMES),
            drop_context=self.drop_context,
        )

    def make_likelihood(self) -> Callable:
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

    def make_validation_solve(self) -> Solve:
        """The solve of validations: digits enough to choose parameters by."""
        tolerance = max(VALIDATION_TOLERANCE, self.test_tolerance)
        return dataclasses.replace(self.make_test_solve(), rtol=tolerance, atol=tolerance)

    def make_optimizer(self, steps: int, learning_rate: float) -> optax.GradientTransformation:
        """AdamW, warm-up and cosine, clipping."""
        return train.make_optimizer(
            learning_rate,
            steps,
            warmup=min(self.warmup, steps // 10),
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings(FlowSettings):
    """A flow, trained by the loop that logs, validates, keeps checkpoints and resumes."""

    # go on from the checkpoint in --out
    resume: bool = False
    # steps between lines of metrics.jsonl
    log_every: int = 200
    # steps between checkpoints
    checkpoint_every: int = 2000
    # steps between validations; the parameters with the best one are kept
    validate_every: int = 2000
    # validations without a new best after which a part of training ends early; 0 for never
    patience: int = 0

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.at_least(1, "log_every", "checkpoint_every", "validate_every")
        self.at_least(0, "patience")


def _named(what, name, table):
    if name not in table:
        raise ValueError(f"unknown {what} '{name}': use one of {', '.join(table)}")
    return table[name]
