"""The settings of a flow and of its training, and the objects they describe."""

import dataclasses
import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr

from experiments._runner import likelihood_config
from experiments._runner.config import WIDEST, LoopSettings
from experiments._runner.fields import FIELDS
from experiments._runner.likelihood_config import LikelihoodSettings, named
from experiments._runner.stages import Stage
from jcnf import CNF, distributions, fields, objectives
from jcnf._checks import InputError
from jcnf.objectives import couplings, paths, times

# Settings, and what puts them to use: objectives, fields, divergences, penalties, bases, or a flag.
USERS: dict[tuple[str, ...], tuple[str, ...]] = likelihood_config.USERS | {
    ("flow_matching", "mixed"): ("path", "coupling", "times", "drop_context"),
    ("mixed",): ("matching_weight",),
    ("--finetune-steps",): ("finetune_learning_rate",),
    ("resnet",): ("frequencies", "waves"),
    ("mlp", "bounded", "residual", "mixture"): ("time",),
    ("resnet", "mlp", "bounded", "residual", "mixture"): ("activation",),
    ("normal",): ("base_scale",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSettings(LikelihoodSettings):
    """A flow, trained by one objective, and then perhaps by maximum likelihood."""

    # what is trained by: flow_matching (nothing is solved), likelihood, mixed (likelihood plus
    # --matching-weight times flow matching)
    objective: str = "flow_matching"
    # steps of maximum likelihood afterwards
    finetune_steps: int = 0
    # resnet, mlp, bounded (an mlp with an activation after its last layer too), residual (mlp - x),
    # mixture (of two mlps), planar (by a hypernet), potential (OT-Flow)
    field: str = "resnet"
    # hidden widths of the field; resnet: that of each block; planar: units, hypernet's width;
    # potential: width, rank
    widths: tuple[int, ...] = (96, 96)
    # mlp, bounded, residual, mixture: how time enters, ignore, concat, squash, concatsquash,
    # hyper, blend
    time: str = "concat"
    # resnet: pairs of a sine and a cosine of time beside the time itself
    frequencies: int = 4
    # resnet: pairs of a sine and a cosine of x beside x itself, for sharp edges
    waves: int = 0
    # but for planar, potential: tanh, softplus, silu, elu, sine, identity, logcosh
    activation: str = "silu"
    # base distribution: normal, logistic
    base: str = "normal"
    # standard deviation of a normal base
    base_scale: float = 1.0
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
    # peak learning rate of the steps of --finetune-steps
    finetune_learning_rate: float = 1e-3

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        self.sizes("widths")
        self.at_least(0, "finetune_steps", "matching_weight")
        self.at_least(0, "frequencies", "waves", most=WIDEST)
        self.positive("finetune_learning_rate", "base_scale")
        # Of a longer way take more of the field: time is to be told apart in float32.
        self.at_least(1e-3, "t1", most=1e3)
        if not 0 <= self.drop_context < 1:
            raise InputError(f"--drop-context must be in [0, 1); got {self.drop_context}")
        try:
            self.make_stages()
            eqx.filter_eval_shape(self.make_flow, 1)
        except ValueError as error:
            raise InputError(str(error)) from None
        self.check_steps(self.t1)
        self.check_use(USERS)

    def uses(self) -> set[str]:
        """The parts of the settings that these ones put to use, by the names of `USERS`."""
        parts = super().uses() | {self.objective, self.field, self.base}
        if self.finetune_steps:
            parts |= {"--finetune-steps", "likelihood"}
        return parts

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
        make = named("field", self.field, FIELDS)
        field = make(self, dim, context_dim, jr.fold_in(jr.key(self.seed), 0))
        base = self.make_base(dim)
        if self.learn_t1:
            return CNF(fields.TimeChange(field, rate=self.t1), base)
        return CNF(field, base, t1=self.t1)

    def make_base(self, dim: int) -> distributions.Base:
        """The base distribution."""
        if self.base == "normal" and self.base_scale != 1:
            return distributions.ScaledNormal(dim, self.base_scale)
        return named("base", self.base, distributions.BASES)(dim)

    def make_objectives(self) -> dict[str, Callable]:
        """What --objective can name."""
        likelihood, matching = self.make_likelihood(), self.make_matching()
        weights = {likelihood: 1.0, matching: self.matching_weight}
        return {
            "flow_matching": matching,
            "likelihood": likelihood,
            "mixed": functools.partial(objectives.mixed, weights=weights),
        }

    def make_stages(self) -> list[Stage]:
        """Training by `objective`, by likelihood, and by L-BFGS, where there are steps for them."""
        table = self.make_objectives()
        named("objective", self.objective, table)
        plan = [(self.objective, self.steps, self.learning_rate)]
        if self.finetune_steps:
            plan.append(("likelihood", self.finetune_steps, self.finetune_learning_rate))
        solve = self.make_solve()
        return self.then_lbfgs(
            [
                Stage(
                    objectives.with_context(table[name]),
                    steps,
                    self.make_optimizer(steps, rate),
                    None if name == "flow_matching" else solve,
                    self.average,
                    self.batch,
                )
                for name, steps, rate in plan
            ]
        )

    def make_matching(self) -> Callable:
        """Flow matching."""
        return functools.partial(
            objectives.flow_matching,
            path=named("path", self.path, paths.PATHS),
            coupling=named("coupling", self.coupling, couplings.COUPLINGS),
            time=named("times", self.times, times.TIMES),
            drop_context=self.drop_context,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings(FlowSettings, LoopSettings):
    """A flow, trained by the loop."""
