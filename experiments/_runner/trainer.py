"""The course of a training: where it has come to, how that is saved, and how it goes back.

**Rollback.** An update that cannot be applied (the solve failed, or loss or gradient is not finite)
is skipped and counted. After `STUCK` in a row training goes back to the newest checkpoint of before
the first of them, at `SMALLER` times the learning rate; if it breaks down again before it has saved
another, to the one before that. After `ROLLBACKS` returns it stops, and says why in `report.json`.
A stage on one fixed batch, where the next step would fail as well, ends instead.
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
from experiments._runner.stages import STUCK, Stage
from jcnf import sharding, training
from jcnf._checks import InputError
from jcnf.training.checkpoint_manager import Keeper, Restored

SMALLER, ROLLBACKS = 0.25, 4


@dataclasses.dataclass
class Place:
    """All but the arrays that a training needs to go on bit for bit; JSON-able."""

    stage: int = 0  # number of the part of training
    first_step: int = 0  # steps taken before it
    recorded: int = 0  # the step of the last record: what was due at it is done
    totals: list[float] | None = None  # of the steps since, the leaves of `jcnf.training.Totals`
    seconds: float = 0.0  # that these steps took
    train_s: float = 0.0  # that all took
    worse: int = 0  # validations of the stage without a new best
    best: float | None = None  # lowest of all validations; None before any was finite
    best_step: int | None = None  # of a checkpoint that has its parameters
    rollbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def improved_by(self, score: float, step: int) -> bool:
        """Note a validation; whether its parameters are to be kept: any, until one is finite."""
        first, finite = self.best is None, math.isfinite(score)
        if finite and (self.best is None or score < self.best):
            self.best, self.best_step, self.worse = score, step, 0
            return True
        self.worse += 1
        return first


def digest_of(data: PyTree) -> str:
    """What tells the data of a training from others."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(data):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


class Course:
    """A training, from the run's newest sound checkpoint or from its beginning.

    `state` is what steps are taken from, `best` the averaged parameters of the best validation, and
    `log` has the records up to here.

    **Raises:** `InputError` where the checkpoints are gone, all damaged, or of something else.
    """

    def __init__(
        self,
        run: RunDir,
        model: Any,
        digest: str,
        stages: list[Stage],
        patience: int,
        keeper: Keeper,
    ):
        self.run, self.model, self.stages, self.keeper = run, model, stages, keeper
        self.digest, self.patience = digest, patience
        self.place: Place
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
                f"{run.log} has no record, though the newest checkpoint is of step {found.step}: "
                "restore it, or start a new run with another --out"
            )
        if found is not None and found.notes.get("data", digest) != digest:
            print("warning: the data are others than before: the numbers are of neither run")
        self._take(found, records)
        if found is None:
            self.save()
            keeper.wait()

    @property
    def stage(self) -> Stage:
        """The part of training that is under way."""
        return self.stages[self.place.stage]

    @property
    def end(self) -> int:
        """The step that the stage ends at."""
        return self.place.first_step + self.stage.steps

    @property
    def stuck(self) -> int:
        """Steps in a row, the last ones, without an update."""
        return int(self.state.stuck)

    @property
    def skipped(self) -> int:
        """Updates that were not applied, those of steps that were gone back upon included."""
        return int(self.state.skipped) + sum(each["skipped"] for each in self.place.rollbacks)

    def over(self) -> bool:
        """Whether the stage is: early after `patience` validations without a new best, or, where
        every step has the same batch, after one that could not be taken."""
        return (
            self.step >= self.end
            or 0 < self.patience <= self.place.worse
            or (self.stage.fixed and self.stuck > 0)
        )

    def totals(self, none: training.Totals) -> training.Totals:
        """Those of the steps since the last record, of the structure of `none`."""
        leaves, structure = jax.tree.flatten(none)
        kept = self.place.totals or [0] * len(leaves)
        return structure.unflatten(
            [np.asarray(total, leaf.dtype) for total, leaf in zip(kept, leaves, strict=True)]
        )

    def means(self, none: training.Totals) -> dict[str, float]:
        """The metrics' over the updates since the last record, NaN where there were none, and how
        many steps were without one."""
        with np.errstate(invalid="ignore"):
            means = training.means(self.totals(none))
        return {name: float(value) for name, value in means.items()}

    def steps_taken(
        self, state: training.TrainState, totals: training.Totals, seconds: float
    ) -> None:
        """Note the state after some steps, the totals with theirs, and how long they took."""
        self.state, self.step = state, int(state.step)
        self.place.totals = [leaf.item() for leaf in jax.tree.leaves(totals)]
        self.place.seconds += seconds
        self.place.train_s += seconds

    def record(self, record: dict[str, Any]) -> None:
        """Add to the log what was measured at this step; start the next stage where one is over."""
        place = self.place
        self.log.add({"step": self.step, **record, "train_s": place.train_s})
        if self.over() and place.stage + 1 < len(self.stages):
            place.stage, place.first_step, place.worse = place.stage + 1, self.step, 0
            state = training.restart(self.state, self.best, self.stage.optimizer)
            self.state = sharding.everywhere(state)
        place.recorded, place.totals, place.seconds = self.step, None, 0.0

    def save(self) -> None:
        """Save it all, in the background; while stuck, beside what `roll_back` would go to."""
        place = dataclasses.asdict(self.place)
        notes = {"versions": versions(), "config": self.run.config, "place": place}
        notes["data"] = self.digest
        also = set() if self.place.best_step is None else {self.place.best_step}
        if self.stuck:
            also |= {*[s for s in self.keeper.steps() if s <= self.step - self.stuck][-1:]}
        self.keeper.save(self.step, (self.state, self.best), notes, also=also)

    def roll_back(self, none: training.Totals) -> str:
        """Go back to an earlier checkpoint at a smaller learning rate; the message about it.

        The best parameters stay those of the best validation, also where that was later.

        **Raises:** `InputError`, with a report saved, after the last return.
        """
        before, skipped, step = self.place.rollbacks, int(self.state.skipped), self.step
        if len(before) == ROLLBACKS:
            self._give_up(none)
        upto = sound = step - self.stuck
        means = self.means(none)
        if before and not any(before[-1]["to"] < s <= sound for s in self.keeper.steps()):
            upto = before[-1]["to"] - 1
        best, lowest = self.best, self.place.best
        found = self.keeper.restore(self._like, upto=upto)
        self._take(found or self.keeper.restore(self._like, upto=sound), self.log.records)
        if lowest is not None and (self.place.best is None or lowest < self.place.best):
            self.best, self.place.best, self.place.best_step = best, lowest, self.step
        rate = SMALLER ** (len(before) + 1)
        skipped -= int(self.state.skipped)
        this = {"from": step, "to": self.step, "rate": rate, "skipped": skipped, "last": means}
        self.place.rollbacks = [*before, this]
        new = jnp.full_like(self.state.rate, rate)
        self.state = eqx.tree_at(lambda state: state.rate, self.state, new)
        self.keeper.forget(after=self.step)
        self.save()
        return (
            f"warning: no update could be applied in {STUCK} steps: back from step {step} to "
            f"{self.step}, at {rate:g} times the learning rate"
        )

    def _like(self, notes):
        """State and best parameters of the structure that a checkpoint with these notes has."""
        place = self.run.check_notes(notes)["place"]
        state = training.init(self.model, self.stages[place["stage"]].optimizer)
        return state, state.average

    def _take(self, found: Restored | None, records: list[dict]) -> None:
        """Be where a checkpoint is, or at the beginning."""
        if found is None:
            self.place = Place()
            self.state = training.init(self.model, self.stages[0].optimizer)
            self.best = self.state.average
        else:
            self.place = Place(**found.notes["place"])
            self.state, self.best = found.tree
        self.state, self.best = sharding.everywhere((self.state, self.best))
        self.step = int(self.state.step)
        self.log = MetricsLog(self.run.log, records, self.step)
        for path in found.damaged if found else []:
            print(
                f"warning: {path} is damaged, kept as {path.name}.damaged: "
                f"going on from step {self.step}"
            )

    def _give_up(self, none: training.Totals) -> NoReturn:
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
            f"{len(place.rollbacks)} returns to earlier checkpoints with smaller learning rates: "
            "solves failed, or losses or gradients were not finite. Start anew with a smaller "
            "--learning-rate or --clip, a larger --max-steps, or looser --rtol and --atol; "
            f"{self.run.path / name} says more"
        )
