"""Training in a run directory: `jcnf.fit`, stage by stage, with a log, checkpoints and signals."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments._runner.config import LoopExperiment
from experiments._runner.recorder import Recorder, digest_of
from experiments._runner.run_dir import RunDir
from experiments._runner.signals import DelayedSignals
from experiments._runner.stages import MakeDraw, Stage, stage_key
from jcnf import sharding
from jcnf._checks import InputError
from jcnf.training.checkpoint_manager import CheckpointManager


class RunResult(NamedTuple):
    """The result of a training."""

    flow: Any  # the model with the averaged parameters of the best validation
    score: float  # of that validation
    records: list[dict]  # the lines of metrics.jsonl
    skipped: int  # updates that were not applied, including those before a rollback
    rollbacks: int  # number of returns to an earlier checkpoint
    timing: dict[str, float]

    def numerics(self) -> dict[str, int]:
        """Return the counts for the summary."""
        return {"skipped_updates": self.skipped, "rollbacks": self.rollbacks}


def fit(
    run: RunDir,
    settings: LoopExperiment,
    model: Any,
    make_draw: MakeDraw,
    data: Any,
    validate: Callable[[Any], float],
    score: str = "val_nll",
    stages: list[Stage] | None = None,
) -> RunResult:
    """Train through `stages` (by default those of the settings), or resume the run's checkpoint.

    `validate(model)` returns a held-out figure, lower when better, that the log calls `score`: an
    NLL in nats unless the caller says otherwise. It decides which parameters are kept, and which
    ones the next stage starts from.

    **Raises:** `Stopped` after SIGINT or SIGTERM, once everything is saved; `InputError` if
    training cannot go on; `OSError` if the disk is full, which leaves its checkpoints intact.
    """
    tic, results = time.perf_counter(), []
    stages = stages or settings.make_stages()
    loop, digest = settings.loop, digest_of(data)
    every = loop.checkpoint_every
    if sharding.any_process(digest != sharding.on_process_zero(lambda: digest)):
        raise InputError("the processes have read different data: give each of them the same files")
    with (
        DelayedSignals() as signals,
        CheckpointManager(run.checkpoints, loop.keep_checkpoints) as manager,
    ):
        recorder = Recorder(run, model, stages, digest, score, every, manager, signals)
        for number in range(recorder.run_state.stage, len(stages)):
            result = stages[number].fit(
                model,
                make_draw,
                data,
                stage_key(settings.run.seed, number),
                start=recorder.snapshot,
                validation=validate,
                every=min(loop.log_every, every, loop.validate_every),
                validate_every=loop.validate_every,
                patience=loop.patience or None,
                callbacks=[recorder],
                interrupt=recorder.interrupt,
            )
            recorder.end_stage(result)
            results.append(result)
    end, records = results[-1].snapshot, recorder.log.records
    timing = {
        "compile_s": sum(result.compile_seconds for result in results),
        "train_s": end.seconds,
        "fit_s": time.perf_counter() - tic,
        "step_ms_median": statistics.median(record["step_ms"] for record in records),
        "checkpoint_stall_s": manager.stalled,
    }
    best = end.lowest if math.isfinite(end.lowest) else math.nan
    rollbacks = len(recorder.run_state.rollbacks)
    return RunResult(results[-1].flow, best, records, recorder.skipped, rollbacks, timing)
