"""The training loop: progress, metrics, validation, checkpoints, resumption, signals."""

import math
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.random as jr
from tqdm import tqdm

from experiments._runner.config import LoopExperiment
from experiments._runner.run_dir import RunDir
from experiments._runner.signals import Stopped, Waiting
from experiments._runner.stages import MAX_STUCK_STEPS, DrawOf, Stage, compiled
from experiments._runner.trainer import Trainer, digest_of
from jcnf import sharding, training
from jcnf._checks import InputError
from jcnf.training.checkpoint_manager import CheckpointManager

DISPATCH_SECONDS = 1.0  # between two times that the host sees metrics and reacts to signals


class FitResult(NamedTuple):
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
    draw_of: DrawOf,
    data: Any,
    validate: Callable[[Any], float],
    score: str = "val_nll",
    stages: list[Stage] | None = None,
) -> FitResult:
    """Train through `stages` (by default those of the settings), or resume the run's checkpoint.

    `validate(model)` returns a held-out figure, lower when better, that the log calls `score`: an
    NLL in nats unless the caller says otherwise. It decides which parameters are kept, and which
    ones the next stage starts from.

    **Raises:** `Stopped` after SIGINT or SIGTERM, once everything is saved; `InputError` if
    training cannot go on; `OSError` if the disk is full, which leaves its checkpoints intact.
    """
    start, compile_s, pace = time.perf_counter(), 0.0, 1
    stages = stages or settings.make_stages()
    loop = settings.loop
    events = (loop.log_every, loop.checkpoint_every, loop.validate_every)
    digest = digest_of(data)
    if sharding.any_process(digest != sharding.on_process_zero(lambda: digest)):
        raise InputError("the processes have read different data: give each of them the same files")
    key, data = sharding.replicate((jr.fold_in(jr.key(settings.run.seed), 1), data))
    programs: dict[int, tuple[jax.stages.Compiled, training.MetricSums]] = {}
    with Waiting() as waiting, CheckpointManager(run.checkpoints, loop.keep_checkpoints) as keeper:
        course = Trainer(run, model, digest, stages, loop.patience, keeper)
        total = sum(stage.steps for stage in stages)
        with tqdm(
            total=total,
            initial=course.step,
            unit="step",
            dynamic_ncols=True,
            disable=jax.process_index() > 0,
        ) as bar:
            while not course.over() or course.step > course.place.recorded:
                number, step = course.place.stage, course.step
                if number not in programs:
                    tic = time.perf_counter()
                    programs[number] = compiled(model, course.stage, draw_of, course.state, data)
                    compile_s += time.perf_counter() - tic
                program, none = programs[number]
                due = course.over() or any(step % n == 0 for n in events)
                if due and step > course.place.recorded:
                    _record(course, settings, none, validate, score)
                elif course.stuck >= MAX_STUCK_STEPS and not course.stage.fixed:
                    bar.write(course.roll_back(none))
                elif sharding.any_process(waiting.number is not None):
                    break
                else:
                    # One dispatch runs to the next step at which something is due, or for about
                    # DISPATCH_SECONDS.
                    until = min(course.end, step + pace, *(step - step % n + n for n in events))
                    tic = time.perf_counter()
                    after = program(course.state, data, key, until, course.totals(none))
                    state, totals = after[0], jax.device_get(after[1])
                    seconds = time.perf_counter() - tic
                    course.steps_taken(state, totals, seconds)
                    taken = course.step - step
                    quicker = min(max(1, int(DISPATCH_SECONDS / seconds * taken)), 10 * taken)
                    pace = sharding.on_process_zero(
                        lambda pace=quicker: pace
                    )  # the same for all processes
                    bar.n = course.step
                    bar.set_postfix_str(_shown(course.means(none), course.skipped))
                keeper.poll()
        if sharding.any_process(waiting.number is not None):
            course.save()
            keeper.wait()
            at = f"stopped at step {course.step}, which is saved"
            number = waiting.number or signal.SIGTERM  # if another process got the signal
            raise Stopped(number, f"{at}: resume with {run.command_to_resume()}")
    step, skipped, place = course.step, course.skipped, course.place
    if skipped > step // 2:
        print(
            f"warning: {skipped} of {step} updates were skipped: lower --learning-rate or --clip, "
            "raise --max-steps, or loosen --rtol and --atol"
        )
    timing = {
        "compile_s": compile_s,
        "train_s": place.train_s,
        "fit_s": time.perf_counter() - start,
        "step_ms_median": statistics.median(r["step_ms"] for r in course.log.records),
        "checkpoint_stall_s": keeper.stalled,
    }
    return FitResult(
        training.with_params(model, course.best),
        math.nan if place.best is None else place.best,
        course.log.records,
        skipped,
        len(place.rollbacks),
        timing,
    )


def _record(course, settings, none, validate, score):
    """Log this step; validate and save a checkpoint if they are due."""
    step, place, better = course.step, course.place, False
    record = course.means(none) | {"step_ms": 1e3 * place.seconds / (step - place.recorded)}
    if course.over() or step % settings.loop.validate_every == 0:
        record[score] = validate(training.with_params(course.model, course.state.average))
        better = place.improved_by(record[score], step)
        if better:
            course.best = course.state.average
    over, sound = course.over(), course.stuck == 0
    course.record(record)
    if over or (sound and (better or step % settings.loop.checkpoint_every == 0)):
        course.save()


def _shown(record, skipped):
    shown = {"loss": "loss {:.4g}", "nfe": "{:.0f} NFE"}
    parts = [form.format(record[name]) for name, form in shown.items() if name in record]
    return ", ".join([*parts, f"{skipped} skipped"] if skipped else parts)
