"""Settings of a flow and of the objective that trains it, which most experiments have."""

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import Float

from experiments._runner.config import Experiment, Measure, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.objectives import BySolves, MatchingThenLikelihood
from experiments._runner.stages import Stage
from jcnf import Flow
from jcnf.distributions import FullNormal


class FlowExperiment(Experiment):
    """The settings of an experiment that trains a flow by an objective."""

    objective: BySolves | MatchingThenLikelihood
    flow: FlowSettings
    training: Training
    measure: Measure

    def check(self) -> None:
        super().check()
        for solve in self.objective.solves:
            solve.check_interval(self.flow.t1)
        self.make_stages()

    def make_flow(
        self, dim: int, context_dim: int = 0, data: Float[np.ndarray, "n dim"] | None = None
    ) -> Flow:
        """Return the untrained flow; without data, a flow of the same structure."""
        flow = self.flow.make(dim, context_dim, jr.fold_in(jr.key(self.run.seed), 0))
        unknown = FullNormal(np.zeros(dim), np.eye(dim))
        reference = unknown if data is None else FullNormal.fit(data)
        return self.objective.prepare(flow, reference, self.flow.base.std)

    def make_stages(self) -> list[Stage]:
        """Return the stages of training: by the objective, then by L-BFGS if it has steps."""
        return self.training.then_lbfgs(self.objective.make_stages(self.training))

    def trace_objectives(self, dim: int, context_dim: int = 0) -> None:
        """Trace the objectives in `dim` dimensions; raise `ValueError` for settings that clash."""
        x = jax.ShapeDtypeStruct((2, dim), float)
        batch = (x, jax.ShapeDtypeStruct((2, context_dim), float)) if context_dim else x
        for stage in self.make_stages():
            eqx.filter_eval_shape(
                lambda batch, stage=stage: stage.objective(
                    self.make_flow(dim, context_dim), batch, jr.key(0)
                ),
                batch,
            )

    @property
    def loss_units(self) -> str:
        """The unit of the training loss."""
        return self.objective.loss_units
