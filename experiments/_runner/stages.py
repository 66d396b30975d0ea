"""The stages of a training, each with its own objective and optimizer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.random as jr
import optax
from jaxtyping import Array, Key

from jcnf import Flow, Solve, objectives, training

# Makes a function that draws batches of a given size (None for all rows of a table):
# `jcnf.training.draw_rows`, or `fresh_batches(sample)` for fresh samples.
MakeDraw = Callable[[int | None], training.DrawBatch]


class Stage(NamedTuple):
    """A stage of training."""

    objective: objectives.Objective  # of the flow, a batch (x or (x, context)) and a key
    steps: int
    optimizer: optax.GradientTransformation
    solve: Solve | None  # for an objective that solves an ODE
    average: float  # decay of the moving average of the parameters
    batch: int | None  # samples per batch; None for all rows of a table
    fixed: bool = False  # whether all steps use one batch and one noise draw, as L-BFGS needs

    def fit(
        self, model: Any, make_draw: MakeDraw, data: Any, key: Key[Array, ""], **settings: Any
    ) -> training.FitResult:
        """Train through this stage by `jcnf.fit`, which takes the `settings`."""
        settings |= {"key": key, "objective": self.objective, "batch": make_draw(self.batch)}
        settings |= {"steps": self.steps, "optimizer": self.optimizer, "solve": self.solve}
        if self.fixed:
            return training.fit_lbfgs(model, data, **settings)
        return training.fit(model, data, average=self.average, **settings)


def fresh_batches(sample: Callable[[Key[Array, ""], int], Any]) -> MakeDraw:
    """Return a `MakeDraw` for batches of fresh samples `sample(key, num)`."""

    def of(num):
        assert num is not None, "fresh samples need a batch size; got None"
        return lambda key, _: sample(key, num)

    return of


def stage_key(seed: int, number: int) -> Key[Array, ""]:
    """Return the key of the batches and the noise of a stage."""
    return jr.fold_in(jr.fold_in(jr.key(seed), 1), number)


class Trained(NamedTuple):
    """A trained flow and the cost of training it."""

    flow: Flow  # with the averaged parameters
    steps: int
    seconds: float  # without compilation
    skipped: int  # updates that were not applied


def train_stages(
    flow: Flow, stages: Sequence[Stage], make_draw: MakeDraw, data: Any = None, seed: int = 0
) -> Trained:
    """Train through `stages` without a run directory or validation."""
    ends = []
    for number, stage in enumerate(stages):
        key = stage_key(seed, number)
        result = stage.fit(flow, make_draw, data, key, validation=None, progress=False)
        flow = result.flow
        ends.append(result.snapshot)
    return Trained(
        flow,
        sum(end.step for end in ends),
        sum(end.seconds for end in ends),
        sum(int(end.state.skipped) for end in ends),
    )


def step_seconds(
    flow: Any, stage: Stage, make_draw: MakeDraw, steps: int, data: Any = None
) -> float:
    """Return the mean seconds of a step, after as many steps that are not timed."""
    settings: dict[str, Any] = {"every": steps, "validation": None, "progress": False}
    stage = stage._replace(steps=2 * steps)
    warm, end = stage.fit(flow, make_draw, data, jr.key(0), **settings).history
    return (end["seconds"] - warm["seconds"]) / steps
