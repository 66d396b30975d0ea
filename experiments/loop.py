"""The training loop: progress, metrics, validation, checkpoints, resumption."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from tqdm import tqdm

from experiments.run_settings import LoopSettings
from experiments.rundir import MetricsLog, RunDir, read_jsonl
from experiments.stages import DrawOf, Stage, compiled, next_state
from jcnf import checkpoint, train
from jcnf.errors import InputError

STUCK = 50  # steps in a row without an update, after which training gives up


class Fitted(NamedTuple):
    """What training gave."""

    flow: Any  # the model with the averaged parameters of the best validation
    score: float  # that validation
    records: list[dict]  # of metrics.jsonl
    skipped: int  # updates that were not applied
    timing: dict[str, float]


def fit(
    run: RunDir,
    settings: LoopSettings,
    model: Any,
    draw_of: DrawOf,
    data: Any,
    validate: Callable[[Any], float],
    score: str = "val_nll",
    stages: list[Stage] | None = None,
) -> Fitted:
    """Train from the beginning, or from the run's checkpoint, through `stages`: the settings' own.

    `validate(model)` is a held-out figure, lower when better, that the log calls `score`: a NLL in
    nats unless said otherwise. It chooses the parameters to keep, and those that the next stage
    starts from.
    """
    stages = stages or settings.make_stages()
    records = read_jsonl(run.log)
    place = _Place()
    if run.checkpoint.exists():
        place = _Place(**checkpoint.read_notes(run.checkpoint))
    elif records and records[-1]["step"] > settings.checkpoint_every:
        raise InputError(
            f"{run.checkpoint} is missing, though {run.log.name} goes to step "
            f"{records[-1]['step']}: restore it, or start a new run with another --out"
        )
    state = train.init(model, stages[place.stage].optimizer)
    best = jax.tree.map(jnp.copy, state.average)
    if run.checkpoint.exists():
        (state, best), _ = checkpoint.load(run.checkpoint, (state, best))
    log = MetricsLog(run.log, records, int(state.step))

    start, compile_s = time.perf_counter(), 0.0
    key = jr.fold_in(jr.key(settings.seed), 1)
    events = (settings.log_every, settings.checkpoint_every, settings.validate_every)
    total = sum(stage.steps for stage in stages)
    with tqdm(total=total, initial=int(state.step), unit="step", dynamic_ncols=True) as bar:
        while True:
            stage, step = stages[place.stage], int(state.step)
            over = place.over(stage, settings.patience)
            end = step if over else place.first_step + stage.steps
            if step == end:
                break
            tic = time.perf_counter()
            run_steps = compiled(model, stage, draw_of, state, data)
            compile_s += time.perf_counter() - tic
            while step < end:
                # One dispatch to the next step at which anything happens on the host.
                until = min(end, *(step - step % n + n for n in events))
                tic = time.perf_counter()
                state, metrics = run_steps(state, data, key, until)
                record = {name: float(value) for name, value in jax.device_get(metrics).items()}
                seconds = time.perf_counter() - tic
                record["step_ms"] = 1e3 * seconds / (until - step)
                place.train_s += seconds
                place.stuck = place.stuck + until - step if record["skipped"] == until - step else 0
                bar.update(until - step)
                bar.set_postfix_str(_shown(record, state))
                step = until
                if place.over(stage, settings.patience):
                    end = step
                if step == end or step % settings.validate_every == 0:
                    record[score] = validate(train.with_params(model, state.average))
                    if place.improved_by(record[score]):
                        best = jax.tree.map(jnp.copy, state.average)
                    if place.over(stage, settings.patience):
                        end = step
                log.add({"step": step, **record, "train_s": place.train_s})
                if step == end or place.stuck >= STUCK or step % settings.checkpoint_every == 0:
                    if step == end and place.stage + 1 < len(stages):
                        place.next_stage(step)
                        state = next_state(state, best, stages[place.stage])
                    checkpoint.save(run.checkpoint, (state, best), dataclasses.asdict(place))
                if place.stuck >= STUCK and not stage.fixed:
                    raise InputError(
                        f"no update could be applied in the last {place.stuck} steps: their solves "
                        "failed, or their gradients were not finite. Start anew with a smaller "
                        "--learning-rate or --clip, a larger --max-steps, or looser --rtol and "
                        f"--atol; {run.path} keeps the state and the log up to here"
                    )
    skipped = int(state.skipped)
    if skipped > step // 2:
        print(
            f"warning: {skipped} of {step} updates were skipped: see the help of --clip, "
            "--learning-rate, --max-steps and the tolerances"
        )
    timing = {
        "compile_s": compile_s,
        "train_s": place.train_s,
        "fit_s": time.perf_counter() - start,
        "step_ms_median": statistics.median(r["step_ms"] for r in log.records),
    }
    best_score = math.nan if place.best is None else place.best
    return Fitted(train.with_params(model, best), best_score, log.records, skipped, timing)


@dataclasses.dataclass
class _Place:
    """Where training has come to: what a checkpoint notes beside the state."""

    stage: int = 0  # number of the part of training
    first_step: int = 0  # steps taken before it
    worse: int = 0  # validations of it without a new best
    stuck: int = 0  # steps since an update was applied
    best: float | None = None  # lowest of all validations; None before any was finite
    train_s: float = 0.0

    def improved_by(self, score: float) -> bool:
        """Note a validation; whether its parameters are to be kept: any, until one is finite."""
        first, finite = self.best is None, math.isfinite(score)
        if finite and (self.best is None or score < self.best):
            self.best, self.worse = score, 0
            return True
        self.worse += 1
        return first

    def over(self, stage: Stage, patience: int) -> bool:
        """Whether the stage ends early: after `patience` validations without a new best, or, where
        every step has the same batch, after one that could not be taken."""
        return 0 < patience <= self.worse or (stage.fixed and self.stuck > 0)

    def next_stage(self, step: int) -> None:
        """Go on to the next, after so many steps in all."""
        self.stage, self.first_step, self.worse, self.stuck = self.stage + 1, step, 0, 0


def _shown(record, state):
    shown = {"loss": "loss {:.4g}", "step_ms": "{:.1f} ms", "nfe": "{:.0f} NFE"}
    parts = [form.format(record[name]) for name, form in shown.items() if name in record]
    skipped = int(state.skipped)
    return ", ".join([*parts, f"{skipped} skipped"] if skipped else parts)
