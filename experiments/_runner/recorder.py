"""A run directory's part in a training: the log, checkpoints, signals, and rollbacks.

**Rollback.** An update that cannot be applied (the solve failed, or the loss or gradient is not
finite) is skipped and counted. If too many in a row are skipped, training returns to the newest
checkpoint from before the first of them, with `RATE_FACTOR` times the learning rate. If it breaks
down again before it has saved another checkpoint, it returns to the one before that, but never to
an earlier stage. After `MAX_ROLLBACKS` returns it stops and writes the reasons to `report.json`. A
stage on one fixed batch ends instead, because its next step would fail as well.
"""

import dataclasses
import hashlib
import signal
import warnings
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments._runner.metrics_log import MetricsLog, read_records
from experiments._runner.run_dir import RunDir, versions
from experiments._runner.signals import DelayedSignals, Stopped
from experiments._runner.stages import Stage
from jcnf import sharding
from jcnf._checks import InputError
from jcnf.training import FitResult, Progress, Snapshot
from jcnf.training.checkpoint_manager import CheckpointManager, Restored

RATE_FACTOR, MAX_ROLLBACKS = 0.25, 4


@dataclasses.dataclass
class RunState:
    """Where a run stands, beside the snapshot of its stage; a checkpoint has it in its notes."""

    stage: int = 0  # index of the current stage
    first_step: int = 0  # steps taken before this stage
    best_step: int | None = None  # step of a checkpoint that holds the best parameters
    rollbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def digest_of(data: PyTree) -> str:
    """Return a digest of the training data, by which a resumed run notices other data."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(data):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


class Recorder:
    """The callback of each stage: it logs records, saves checkpoints, and rolls back.

    Training starts from `snapshot` in stage `run_state.stage`: those of the run's newest intact
    checkpoint, or the beginning. `log` has the records so far.

    **Raises:** `InputError` if the checkpoints are gone, all damaged, or of another training.
    """

    def __init__(
        self,
        run: RunDir,
        model: Any,
        stages: list[Stage],
        digest: str,
        score: str,
        checkpoint_every: int,
        manager: CheckpointManager,
        signals: DelayedSignals,
    ):
        self.run, self.model, self.stages, self.digest = run, model, stages, digest
        self.score, self.checkpoint_every = score, checkpoint_every
        self.manager, self.signals = manager, signals
        self.run_state, self.snapshot = RunState(), Snapshot.first(model, stages[0].optimizer)
        records = read_records(run.log)
        found = manager.restore(self._like)
        if found is None:
            if records:
                raise InputError(
                    f"{run.checkpoints} has no checkpoint, though {run.log.name} goes to step "
                    f"{records[-1]['step']}: restore one, or start a new run with another --out"
                )
            self.log = MetricsLog(run.log, [], 0)
            self.save(self.snapshot)
            manager.wait()
            return
        self._take(found, records)
        if self.run_state.first_step + self.snapshot.recorded > 0 and not records:
            raise InputError(
                f"{run.log} has no record, though the newest checkpoint is from step {found.step}: "
                "restore it, or start a new run with another --out"
            )
        if found.notes.get("data", digest) != digest:
            warnings.warn(
                "the data have changed: the results will belong to neither data set", stacklevel=2
            )

    def __call__(self, progress: Progress) -> Snapshot | None:
        """Log a record, and save a checkpoint if one is due; roll back if training is stuck."""
        run_state, snapshot = self.run_state, progress.snapshot
        if progress.stuck and not self.stages[run_state.stage].fixed:
            return self._roll_back(progress)
        step = run_state.first_step + progress.step
        metrics = {self.score if n == "score" else n: x for n, x in progress.metrics.items()}
        before = self.log.records[-1] if self.log.records else {"step": 0, "train_s": 0.0}
        taken, seconds = step - before["step"], snapshot.seconds - before["train_s"]
        times = {"step_ms": 1e3 * seconds / taken, "train_s": snapshot.seconds}
        self.log.add({"step": step, **metrics, **times})
        best = "score" in progress.metrics and snapshot.worse == 0
        due = step // self.checkpoint_every > before["step"] // self.checkpoint_every
        if best:
            run_state.best_step = step
        # `end_stage` saves the last one.
        if (best or due) and snapshot.state.stuck == 0 and progress.step < progress.steps:
            self.save(snapshot)

    def interrupt(self, snapshot: Snapshot) -> bool:
        """Raise `Stopped` if there was a signal, once everything is saved."""
        self.manager.poll()
        if not sharding.any_process(self.signals.number is not None):
            return False
        self.save(snapshot)
        self.manager.wait()
        number = self.signals.number or signal.SIGTERM  # if another process got the signal
        at = f"stopped at step {self.run_state.first_step + snapshot.step}, which is saved"
        raise Stopped(number, f"{at}: resume with {self.run.command_to_resume()}")

    def end_stage(self, result: FitResult) -> None:
        """Save the end of the training, or the start of its next stage from the best parameters."""
        self.snapshot = end = result.snapshot
        if self.run_state.stage + 1 < len(self.stages):
            self.run_state.stage += 1
            self.run_state.first_step += end.step
            start = Snapshot.first(result.flow, self.stages[self.run_state.stage].optimizer)
            self.snapshot = start._replace(lowest=end.lowest, seconds=end.seconds)
        self.save(self.snapshot)
        self.interrupt(self.snapshot)

    def save(self, snapshot: Snapshot) -> None:
        """Save everything in the background; while stuck, keep the target of a rollback too."""
        run_state, step = self.run_state, self.run_state.first_step + snapshot.step
        also = set() if run_state.best_step is None else {run_state.best_step}
        if snapshot.state.stuck:
            sound = step - int(snapshot.state.stuck)
            also |= {*[saved for saved in self.manager.steps() if saved <= sound][-1:]}
        notes = {"versions": versions(), "config": self.run.config, "data": self.digest}
        notes |= {"run_state": dataclasses.asdict(run_state), "snapshot": snapshot.numbers}
        self.manager.save(step, snapshot.arrays, notes, also=also)

    @property
    def skipped(self) -> int:
        """The number of updates not applied, including those before a rollback."""
        return sum(int(each["skipped"]) for each in (*self.log.records, *self.run_state.rollbacks))

    def _like(self, notes):
        """Return arrays with the structure of those of the checkpoint noted."""
        run_state = self.run.check_notes(notes)["run_state"]
        return Snapshot.first(self.model, self.stages[run_state["stage"]].optimizer).arrays

    def _take(self, found: Restored, records: list[dict]) -> None:
        """Go to a restored checkpoint."""
        self.run_state = RunState(**found.notes["run_state"])
        self.snapshot = Snapshot.restored(found.tree, found.notes["snapshot"])
        self.log = MetricsLog(self.run.log, records, found.step)
        for path in found.damaged:
            warnings.warn(
                f"{path} is damaged, kept as {path.name}.damaged: going on from step {found.step}",
                stacklevel=3,
            )

    def _roll_back(self, progress: Progress) -> Snapshot:
        """Return to an earlier checkpoint at a smaller learning rate.

        The best parameters stay those of the best validation, even if it came after that
        checkpoint.

        **Raises:** `InputError` if no rollback is left, with a report saved.
        """
        stage, before, now = self.run_state.stage, self.run_state.rollbacks, progress.snapshot
        step = self.run_state.first_step + progress.step
        if len(before) == MAX_ROLLBACKS:
            self._give_up(progress)
        upto = sound = step - int(now.state.stuck)  # the last step that was not skipped
        # If nothing was saved since the last rollback, its checkpoint is where the trouble begins:
        # go to the one before it.
        if before and not any(before[-1]["to"] < s <= sound for s in self.manager.steps()):
            upto = before[-1]["to"] - 1
        found = self.manager.restore(self._like, upto=upto)
        if found is None or found.notes["run_state"]["stage"] != stage:
            found = self.manager.restore(self._like, upto=sound)
        if found is None or found.notes["run_state"]["stage"] != stage:
            raise InputError(
                f"no checkpoint of this stage of the training is left in {self.run.checkpoints}: "
                f"restore one, or train the stage again with {self.run.command_to_resume()}"
            )
        self._take(found, self.log.records)
        back = self.snapshot
        if now.lowest < back.lowest:
            back = back._replace(best=now.best, lowest=now.lowest)
            self.run_state.best_step = found.step
        rate = RATE_FACTOR ** (len(before) + 1)
        lost = int(now.state.skipped) - int(back.state.skipped)
        this = {"from": step, "to": found.step, "rate": rate, "skipped": lost}
        self.run_state.rollbacks = [*before, this | {"last": progress.metrics}]
        new = jnp.full_like(back.state.rate, rate)
        self.snapshot = back = back._replace(
            state=eqx.tree_at(lambda state: state.rate, back.state, new)
        )
        self.manager.delete_after(found.step)
        self.save(back)
        warnings.warn(
            f"no update could be applied in {now.state.stuck} steps: back from step {step} to step "
            f"{found.step}, at {rate:g} times the original learning rate",
            stacklevel=2,
        )
        return back

    def _give_up(self, progress: Progress) -> NoReturn:
        name, state, metrics = "report.json", progress.snapshot.state, progress.metrics
        largest = max(float(jnp.max(jnp.abs(p))) for p in jax.tree.leaves(state.params))
        counts = {n: int(x) for n, x in metrics.items() if n.startswith("skipped")}
        report = {
            "step": self.run_state.first_step + progress.step,
            "steps_without_update": int(state.stuck),
            "skipped_since_record": counts,
            "last_records": self.log.records[-5:],
            "largest_parameter": largest,
            "learning_rate_factor": float(state.rate),
            "rollbacks": self.run_state.rollbacks,
            "checkpoints": [self.manager.path(step).name for step in self.manager.steps()],
        }
        self.run.write_json(name, report)
        raise InputError(
            f"no update could be applied in the last {state.stuck} steps, nor after "
            f"{MAX_ROLLBACKS} rollbacks to earlier checkpoints with smaller learning rates: "
            "solves failed, or losses or gradients were not finite. Start a new run with a smaller "
            "--learning-rate or --clip, a larger --max-steps, or looser --rtol and --atol; "
            f"details are in {self.run.path / name}"
        )
