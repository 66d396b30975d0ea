"""Settings of a flow and of its training, and the objects that they describe."""

import dataclasses
import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr

from experiments._runner import likelihood_config
from experiments._runner.config import MAX_WIDTH, LoopSettings
from experiments._runner.fields import FIELDS
from experiments._runner.likelihood_config import LikelihoodSettings, named
from experiments._runner.stages import Stage
from jcnf import CNF, Flow, distributions, fields, objectives
from jcnf._checks import InputError
from jcnf.objectives import couplings, paths, times

# {users: settings}: settings that have an effect only with one of these objectives, fields,
# divergences, regularizers, bases or flags.
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
    """Settings of a flow, trained by one objective and then, optionally, by likelihood."""

    # training objective: flow_matching (without ODE solves), likelihood, mixed (likelihood plus
    # --matching-weight times flow matching)
    objective: str = "flow_matching"
    # number of maximum-likelihood steps after the steps of --objective
    finetune_steps: int = 0
    # velocity field: resnet, mlp, bounded (an mlp that ends in a tanh), residual (mlp - x), mixture
    # (of two mlps), planar (with a hypernetwork), potential (OT-Flow)
    field: str = "resnet"
    # hidden widths of the field (resnet: width of each block; planar: units and width of the
    # hypernetwork; potential: width and rank)
    widths: tuple[int, ...] = (96, 96)
    # how time enters mlp, bounded, residual and mixture: ignore, concat, squash, concatsquash,
    # hyper, blend
    time: str = "concat"
    # resnet: number of sine-cosine pairs of time among the inputs, beside time itself
    frequencies: int = 4
    # resnet: number of sine-cosine pairs of x among the inputs, beside x itself, for sharp edges
    waves: int = 0
    # activation of all fields but planar and potential: tanh, softplus, silu, elu, sine, identity,
    # logcosh
    activation: str = "silu"
    # base distribution: normal, logistic
    base: str = "normal"
    # standard deviation of the normal base
    base_scale: float = 1.0
    # end time T of the flow
    t1: float = 1.0
    # train the end time too, starting from --t1 (--weight-decay pulls it toward 0)
    learn_t1: bool = False
    # path of flow matching: linear, trigonometric, sigma_min, variance_preserving, stochastic
    path: str = "linear"
    # how flow matching pairs base samples with data: independent, exact (optimal transport),
    # sinkhorn
    coupling: str = "independent"
    # how flow matching draws times on the path: uniform, lattice, late, logit_normal
    times: str = "late"
    # fraction of contexts that flow matching drops, so that samples can be guided
    drop_context: float = 0.0
    # weight of flow matching in the mixed objective, where likelihood has weight 1
    matching_weight: float = 1.0
    # peak learning rate of the --finetune-steps
    finetune_learning_rate: float = 1e-3

    def check(self) -> None:
        super().check()
        self.sizes("widths")
        self.at_least(0, "finetune_steps", "matching_weight")
        self.at_least(0, "frequencies", "waves", most=MAX_WIDTH)
        self.positive("finetune_learning_rate", "base_scale")
        # Beyond this, scale the field rather than time, which float32 must still resolve.
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
        """Return the keys of `USERS` that these settings put to use."""
        parts = super().uses() | {self.objective, self.field, self.base}
        if self.finetune_steps:
            parts |= {"--finetune-steps", "likelihood"}
        return parts

    @property
    def loss_units(self) -> str:
        return "nats" if self.objective == "likelihood" else "no unit"

    def check_objective(self, dim: int, context_dim: int = 0) -> None:
        """Trace the objectives in `dim` dimensions; raise `InputError` for settings that clash."""
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

    def make_flow(self, dim: int, context_dim: int = 0) -> Flow:
        make = named("field", self.field, FIELDS)
        field = make(self, dim, context_dim, jr.fold_in(jr.key(self.seed), 0))
        base = self.make_base(dim)
        if self.learn_t1:
            return CNF(fields.TimeRescaling(field, rate=self.t1), base)
        return CNF(field, base, t1=self.t1)

    def make_base(self, dim: int) -> distributions.BaseDistribution:
        if self.base == "normal" and self.base_scale != 1:
            return distributions.ScaledNormal(dim, self.base_scale)
        return named("base", self.base, distributions.BASES)(dim)

    def make_objectives(self) -> dict[str, Callable]:
        """Return the objectives that `--objective` can name."""
        likelihood, matching = self.make_likelihood(), self.make_matching()
        weights = {likelihood: 1.0, objectives.without_solve(matching): self.matching_weight}
        return {
            "flow_matching": matching,
            "likelihood": likelihood,
            "mixed": functools.partial(objectives.weighted_sum, weights=weights),
        }

    def make_stages(self) -> list[Stage]:
        """Return the stages with steps: the objective, likelihood, and L-BFGS, in this order."""
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
        """Return the flow-matching objective."""
        return functools.partial(
            objectives.flow_matching,
            path=named("path", self.path, paths.PATHS),
            coupling=named("coupling", self.coupling, couplings.COUPLINGS),
            time=named("times", self.times, times.TIMES),
            drop_context=self.drop_context,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings(FlowSettings, LoopSettings):
    """Settings of a flow and of the loop that trains it."""
