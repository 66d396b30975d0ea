"""Settings of the training objectives, each with the flags that it uses and no others."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

from experiments._runner.config import Training
from experiments._runner.settings import NonNegative, Positive, Range, Settings, Steps, choice
from experiments._runner.solves import TrainingSolve
from experiments._runner.stages import Stage
from jcnf import (
    Exact,
    Flow,
    ForwardMode,
    Hutchinson,
    distributions,
    fields,
    objectives,
    regularizers,
)
from jcnf.divergence import HutchPlusPlus, XTrace
from jcnf.objectives import couplings, paths, times

# Regularizers that need Jacobian-vector products with probes.
NEED_PROBES = {"jacobian", "lambda2"}


Divergence = (
    Annotated[Exact, choice("divergence:exact")]
    | Annotated[ForwardMode, choice("divergence:forward")]
    | Annotated[Hutchinson, choice("divergence:hutchinson")]
    | Annotated[HutchPlusPlus, choice("divergence:hutch++")]
    | Annotated[XTrace, choice("divergence:xtrace")]
)


class ObjectiveSettings(Settings):
    """What all objectives share."""

    def prepare(self, flow: Flow, reference: distributions.FullNormal, base_std: float) -> Flow:
        """Return the untrained flow as this objective trains it.

        `reference` is a Gaussian of the data, and `base_std` the base's standard deviation.
        """
        return flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class BySolves(ObjectiveSettings):
    """What objectives share that solve the ODE with its log-determinant."""

    solve: TrainingSolve = TrainingSolve()
    # divergence in training (held-out numbers use the exact one)
    divergence: Divergence = dataclasses.field(default_factory=Exact)
    # regularizers and their weights, e.g. "kinetic 0.01 jacobian 0.01": kinetic, jacobian,
    # jacobian_exact, directional, total_derivative, taylor2 (3, ...), hjb, lambda1, lambda2
    regularizers: tuple[tuple[str, float], ...] = ()

    def check(self) -> None:
        for name, weight in self.regularizers:
            if not 0 <= weight <= 1e9:
                raise ValueError(
                    f"--regularizers: the weight of {name} must be from 0 to 1e+09; got {weight}"
                )
        self.make_regularizers()

    def make_regularizers(self) -> dict[Callable, float]:
        """Return the regularizers with their weights; `ValueError` if one is named twice."""
        weights = {regularizers.named(name): weight for name, weight in self.regularizers}
        if len(weights) < len(self.regularizers):
            names = ", ".join(name for name, _ in self.regularizers)
            raise ValueError(f"--regularizers must not name one twice; got {names}")
        return weights

    @property
    def solves(self) -> list[TrainingSolve]:
        """The settings of all ODE solves in training."""
        return [self.solve]

    @property
    def loss_units(self) -> str:
        """The unit of the loss."""
        return "nats"

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the objectives of jcnf."""
        divergence = self.divergence
        if isinstance(divergence, Exact) and NEED_PROBES & dict(self.regularizers).keys():
            divergence = Exact(max(1, divergence.probes))
        return {
            "solve": self.solve.make(),
            "divergence": divergence,
            "regularizers": self.make_regularizers(),
        }

    def make(self) -> Callable:
        """Return the objective."""
        raise NotImplementedError

    def make_stages(self, training: Training) -> list[Stage]:
        """Return one stage of training by this objective."""
        objective = objectives.with_context(self.make())
        return [training.make_stage(objective, self.solve.make())]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainLikelihood(BySolves):
    """Maximum likelihood of a flow that may have several parts, by ODE solves."""

    def make(self) -> Callable:
        return functools.partial(objectives.likelihood, **self.options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood(ChainLikelihood):
    """Maximum likelihood, by ODE solves."""

    # half width of the random time of the base in training (STEER; 0 for a fixed time)
    random_end_time: NonNegative = 0.0

    def make(self) -> Callable:
        return functools.partial(super().make(), random_end_time=self.random_end_time)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching(Settings):
    """The path and the times of flow matching."""

    # path from base to data
    path: Literal["linear", "trigonometric", "sigma_min", "variance_preserving", "stochastic"] = (
        "linear"
    )
    # how times on the path are drawn
    times: Literal["uniform", "stratified", "data_biased", "logit_normal"] = "data_biased"


Coupling = Literal["independent", "exact", "sinkhorn"]


def flow_matching(matching: Matching, coupling: Coupling, **options: Any) -> Callable:
    """Return the flow-matching objective."""
    return functools.partial(
        objectives.flow_matching,
        path=paths.PATHS[matching.path],
        time=times.TIMES[matching.times],
        coupling=couplings.COUPLINGS[coupling],
        **options,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoFinetuning(Settings):
    """No training by likelihood afterwards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuning(Settings):
    """Maximum likelihood afterwards, by ODE solves."""

    # number of these steps
    finetune_steps: Steps = 1000
    # peak learning rate of these steps
    finetune_learning_rate: Positive = 1e-3

    likelihood: Likelihood = Likelihood()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatchingThenLikelihood(ObjectiveSettings):
    """Flow matching, which needs no ODE solves, and likelihood afterwards if asked for."""

    matching: Matching = Matching()
    # how base samples are paired with data: exact is optimal transport in the batch
    coupling: Coupling = "independent"

    finetune: (
        Annotated[NoFinetuning, choice("finetune:none")]
        | Annotated[Finetuning, choice("finetune:likelihood")]
    ) = NoFinetuning()

    def make(self) -> Callable:
        """Return the objective."""
        return flow_matching(self.matching, self.coupling)

    def make_stages(self, training: Training) -> list[Stage]:
        """Return a stage of flow matching and, if asked for, one of likelihood."""
        stages = [training.make_stage(objectives.with_context(self.make()), None)]
        if isinstance(self.finetune, Finetuning):
            likelihood = self.finetune.likelihood
            stages.append(
                training.make_stage(
                    objectives.with_context(likelihood.make()),
                    likelihood.solve.make(),
                    steps=self.finetune.finetune_steps,
                    learning_rate=self.finetune.finetune_learning_rate,
                )
            )
        return stages

    @property
    def solves(self) -> list[TrainingSolve]:
        """The settings of all ODE solves in training."""
        return self.finetune.likelihood.solves if isinstance(self.finetune, Finetuning) else []

    @property
    def loss_units(self) -> str:
        """The unit of the loss."""
        return "no unit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(MatchingThenLikelihood):
    """Flow matching, which needs no ODE solves."""

    # distance from the mean, in standard deviations, beyond which the field gives way to the
    # velocity of a Gaussian with the data's moments, so that solves stay short far from the data
    # (0: the field alone)
    reach: NonNegative = 3.0

    def prepare(self, flow: Flow, reference: distributions.FullNormal, base_std: float) -> Flow:
        """Return the flow with the tails of the Gaussian `reference`."""
        if not self.reach:
            return flow
        ode: Any = flow.bijection
        path = paths.PATHS[self.matching.path]
        field = fields.GaussianTails(ode.field, reference, path, self.reach, ode.t1, base_std)
        return dataclasses.replace(flow, bijection=dataclasses.replace(ode, field=field))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedFlowMatching(MatchingThenLikelihood):
    """Flow matching, which needs no ODE solves, with some contexts dropped for guidance."""

    # fraction of contexts that are dropped, so that samples can be guided
    drop_context: Annotated[float, Range(0, 1 - 1e-9)] = 0.1

    def make(self) -> Callable:
        return flow_matching(self.matching, self.coupling, drop_context=self.drop_context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(Likelihood):
    """Likelihood plus flow matching."""

    # weight of flow matching; likelihood has weight 1
    matching_weight: NonNegative = 1.0
    # how base samples are paired with data: exact is optimal transport in the batch
    coupling: Coupling = "independent"

    matching: Matching = Matching()

    def make(self) -> Callable:
        matching = flow_matching(self.matching, self.coupling)
        weights = {super().make(): 1.0, objectives.without_solve(matching): self.matching_weight}
        return functools.partial(objectives.weighted_sum, weights=weights)

    @property
    def loss_units(self) -> str:
        return "no unit"


Objective = (
    Annotated[FlowMatching, choice("objective:flow-matching")]
    | Annotated[Likelihood, choice("objective:likelihood")]
    | Annotated[Mixed, choice("objective:mixed")]
)
