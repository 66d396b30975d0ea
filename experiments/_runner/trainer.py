"""The state of a training: its progress, its checkpoints and its rollbacks.

**Rollback.** An update that cannot be applied (the solve failed, or the loss or gradient is not
finite) is skipped and counted. After `MAX_STUCK_STEPS` skipped updates in a row, training returns
to the newest checkpoint from before the first of them, with `RATE_FACTOR` times the learning rate.
If it breaks down again before it has saved another checkpoint, it returns to the one before that.
After `MAX_ROLLBACKS` returns it stops and writes the reasons to `report.json`. A stage on one fixed
batch ends instead, because its next step would fail as well.
"""

import dataclasses
import hashlib
import math
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments._runner.metrics_log import MetricsLog, read_records
from experiments._runner.run_dir import RunDir, versions
from experiments._runner.stages import MAX_STUCK_STEPS, Stage
from jcnf import sharding, training
from jcnf._checks import InputError
from jcnf.training.checkpoint_manager import CheckpointManager, Restored

RATE_FACTOR, MAX_ROLLBACKS = 0.25, 4


@dataclasses.dataclass
class Progress:
    """Everything except arrays that a training needs to resume bit for bit; JSON-able."""

    stage: int = 0  # index of the current stage
    first_step: int = 0  # steps taken before this stage
    recorded: int = 0  # step of the last record, at which everything due is done
    totals: list[float] | None = None  # leaves of `MetricSums` over the steps since that record
    seconds: float = 0.0  # spent on the steps since that record
    train_s: float = 0.0  # seconds spent on all steps
    worse: int = 0  # validations of this stage since the last new best
    best: float | None = None  # lowest finite validation score, if there is one
    best_step: int | None = None  # step of a checkpoint that holds the best parameters
    rollbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def improved_by(self, score: float, step: int) -> bool:
        """Note a validation score; return whether it is the best, or none was finite so far."""
        first, finite = self.best is None, math.isfinite(score)
        if finite and (self.best is None or score < self.best):
            self.best, self.best_step, self.worse = score, step, 0
            return True
        self.worse += 1
        return first


def digest_of(data: PyTree) -> str:
    """Return a digest of the training data, by which a resumed run notices other data."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(data):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


class Trainer:
    """A training, resumed from the run's newest intact checkpoint or started from the beginning.

    `state` is where the next step starts, `best` holds the averaged parameters of the best
    validation, and `log` the records so far.

    **Raises:** `InputError` if the checkpoints are gone, all damaged, or of another training.
    """

    def __init__(
        self,
        run: RunDir,
        model: Any,
        digest: str,
        stages: list[Stage],
        patience: int,
        keeper: CheckpointManager,
    ):
        self.run, self.model, self.stages, self.keeper = run, model, stages, keeper
        self.digest, self.patience = digest, patience
        self.place: Progress
        self.state: training.TrainState
        self.best: PyTree
        self.step: int
        self.log: MetricsLog
        records = read_records(run.log)
        found = keeper.restore(self._like)
        if found is None and records:
            raise InputError(
                f"{run.checkpoints} has no checkpoint, though {run.log.name} goes to step "
                f"{records[-1]['step']}: restore one, or start a new run with another --out"
            )
        if found is not None and found.notes["place"]["recorded"] and not records:
            raise InputError(
                f"{run.log} has no record, though the newest checkpoint is from step {found.step}: "
                "restore it, or start a new run with another --out"
            )
        if found is not None and found.notes.get("data", digest) != digest:
            print("warning: the data have changed: the results will belong to neither data set")
        self._take(found, records)
        if found is None:
            self.save()
            keeper.wait()

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.place.stage]

    @property
    def end(self) -> int:
        """The step at which the stage ends."""
        return self.place.first_step + self.stage.steps

    @property
    def stuck(self) -> int:
        """The number of skipped steps in a row, up to the last one."""
        return int(self.state.stuck)

    @property
    def skipped(self) -> int:
        """The number of updates not applied, including those before a rollback."""
        return int(self.state.skipped) + sum(each["skipped"] for each in self.place.rollbacks)

    def over(self) -> bool:
        """Return whether the stage has ended.

        It ends early after `patience` validations without a new best and, if all its steps use one
        batch, after a skipped step.
        """
        return (
            self.step >= self.end
            or 0 < self.patience <= self.place.worse
            or (self.stage.fixed and self.stuck > 0)
        )

    def totals(self, none: training.MetricSums) -> training.MetricSums:
        """Return the totals of the steps since the last record, in the structure of `none`."""
        leaves, structure = jax.tree.flatten(none)
        kept = self.place.totals or [0] * len(leaves)
        return structure.unflatten(
            [np.asarray(total, leaf.dtype) for total, leaf in zip(kept, leaves, strict=True)]
        )

    def means(self, none: training.MetricSums) -> dict[str, float]:
        """Return the mean metrics of the updates since the last record (NaN if there were none),
        and the counts of skipped steps."""
        with np.errstate(invalid="ignore"):
            means = training.means(self.totals(none))
        return {name: float(value) for name, value in means.items()}

    def steps_taken(
        self, state: training.TrainState, totals: training.MetricSums, seconds: float
    ) -> None:
        """Note the state after some steps, the totals that include them, and their seconds."""
        self.state, self.step = state, int(state.step)
        self.place.totals = [leaf.item() for leaf in jax.tree.leaves(totals)]
        self.place.seconds += seconds
        self.place.train_s += seconds

    def record(self, record: dict[str, Any]) -> None:
        """Log the measurements of this step; start the next stage if this one has ended."""
        place = self.place
        self.log.add({"step": self.step, **record, "train_s": place.train_s})
        if self.over() and place.stage + 1 < len(self.stages):
            place.stage, place.first_step, place.worse = place.stage + 1, self.step, 0
            state = training.restart(self.state, self.best, self.stage.optimizer)
            self.state = sharding.replicate(state)
        place.recorded, place.totals, place.seconds = self.step, None, 0.0

    def save(self) -> None:
        """Save everything in the background; while stuck, keep the target of `roll_back` too."""
        place = dataclasses.asdict(self.place)
        notes = {"versions": versions(), "config": self.run.config, "place": place}
        notes["data"] = self.digest
        also = set() if self.place.best_step is None else {self.place.best_step}
        if self.stuck:
            also |= {*[s for s in self.keeper.steps() if s <= self.step - self.stuck][-1:]}
        self.keeper.save(self.step, (self.state, self.best), notes, also=also)

    def roll_back(self, none: training.MetricSums) -> str:
        """Return to an earlier checkpoint at a smaller learning rate; return a warning about it.

        The best parameters stay those of the best validation, even if it came after that
        checkpoint.

        **Raises:** `InputError` if no rollback is left, with a report saved.
        """
        before, skipped, step = self.place.rollbacks, int(self.state.skipped), self.step
        if len(before) == MAX_ROLLBACKS:
            self._give_up(none)
        upto = sound = step - self.stuck  # the last step that was not skipped
        means = self.means(none)
        # If nothing was saved since the last rollback, its checkpoint is where the trouble begins:
        # go to the one before it.
        if before and not any(before[-1]["to"] < s <= sound for s in self.keeper.steps()):
            upto = before[-1]["to"] - 1
        best, lowest = self.best, self.place.best
        found = self.keeper.restore(self._like, upto=upto)
        self._take(found or self.keeper.restore(self._like, upto=sound), self.log.records)
        if lowest is not None and (self.place.best is None or lowest < self.place.best):
            self.best, self.place.best, self.place.best_step = best, lowest, self.step
        rate = RATE_FACTOR ** (len(before) + 1)
        skipped -= int(self.state.skipped)
        this = {"from": step, "to": self.step, "rate": rate, "skipped": skipped, "last": means}
        self.place.rollbacks = [*before, this]
        new = jnp.full_like(self.state.rate, rate)
        self.state = eqx.tree_at(lambda state: state.rate, self.state, new)
        self.keeper.forget(after=self.step)
        self.save()
        return (
            f"warning: no update could be applied in {MAX_STUCK_STEPS} steps: back from step "
            f"{step} to step {self.step}, at {rate:g} times the original learning rate"
        )

    def _like(self, notes):
        """Return a state and best parameters with the structure of the checkpoint noted."""
        place = self.run.check_notes(notes)["place"]
        state = training.init(self.model, self.stages[place["stage"]].optimizer)
        return state, state.average

    def _take(self, found: Restored | None, records: list[dict]) -> None:
        """Go to a restored checkpoint, or to the beginning."""
        if found is None:
            self.place = Progress()
            self.state = training.init(self.model, self.stages[0].optimizer)
            self.best = self.state.average
        else:
            self.place = Progress(**found.notes["place"])
            self.state, self.best = found.tree
        self.state, self.best = sharding.replicate((self.state, self.best))
        self.step = int(self.state.step)
        self.log = MetricsLog(self.run.log, records, self.step)
        for path in found.damaged if found else []:
            print(
                f"warning: {path} is damaged, kept as {path.name}.damaged: "
                f"going on from step {self.step}"
            )

    def _give_up(self, none: training.MetricSums) -> NoReturn:
        name, place = "report.json", self.place
        largest = max(float(jnp.max(jnp.abs(p))) for p in jax.tree.leaves(self.state.params))
        report = {
            "step": self.step,
            "steps_without_update": self.stuck,
            "skipped_since_record": {n: int(v) for n, v in self.totals(none).skipped.items()},
            "last_records": self.log.records[-5:],
            "largest_parameter": largest,
            "learning_rate_factor": float(self.state.rate),
            "rollbacks": place.rollbacks,
            "checkpoints": [self.keeper.path(step).name for step in self.keeper.steps()],
        }
        self.run.write_json(name, report)
        raise InputError(
            f"no update could be applied in the last {self.stuck} steps, nor after "
            f"{len(place.rollbacks)} rollbacks to earlier checkpoints with smaller learning rates: "
            "solves failed, or losses or gradients were not finite. Start a new run with a smaller "
            "--learning-rate or --clip, a larger --max-steps, or looser --rtol and --atol; "
            f"details are in {self.run.path / name}"
        )
