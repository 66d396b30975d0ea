"""The training loop: progress, metrics, validation, checkpoints, resumption."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from tqdm import tqdm

from experiments.rundir import MetricsLog, RunDir
from experiments.settings import FlowSettings
from jcnf import CNF, checkpoint, train


class Fitted(NamedTuple):
    """What training gave."""

    flow: CNF  # with the averaged parameters of the lowest validation NLL
    records: list[dict]  # of metrics.jsonl
    skipped: int  # updates that were not applied
    timing: dict[str, float]


def fit(
    run: RunDir,
    settings: FlowSettings,
    flow: CNF,
    draw_batch: train.DrawBatch,
    data: Any,
    validate: Callable[[CNF], float],
) -> Fitted:
    """Train from the beginning, or from the run's checkpoint, to `settings.steps`.

    `validate(flow)` is a held-out NLL in nats; it chooses the parameters to keep.
    """
    optimizer = settings.make_optimizer()
    state = train.init(flow, optimizer)
    best, notes = jax.tree.map(jnp.copy, state.average), {"best_nll": None, "train_s": 0.0}
    if run.checkpoint.exists():
        (state, best), notes = checkpoint.load(run.checkpoint, (state, best))
    log = MetricsLog(run.path / "metrics.jsonl", int(state.step))

    tic = time.perf_counter()
    key = jr.fold_in(jr.key(settings.seed), 1)
    run_steps = train.make_run(
        flow, settings.make_objective(), draw_batch, optimizer, average=settings.average
    )
    run_steps = run_steps.lower(state, data, key, settings.steps).compile()
    compile_s = time.perf_counter() - tic

    events = (settings.log_every, settings.checkpoint_every, settings.validate_every)
    step = int(state.step)
    with tqdm(total=settings.steps, initial=step, unit="step", dynamic_ncols=True) as bar:
        while step < settings.steps:
            # One dispatch to the next step at which anything happens on the host.
            until = min(settings.steps, *(step - step % n + n for n in events))
            tic = time.perf_counter()
            state, metrics = run_steps(state, data, key, until)
            record = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds = time.perf_counter() - tic
            record["step_ms"] = 1e3 * seconds / (until - step)
            notes["train_s"] += seconds
            bar.update(until - step)
            bar.set_postfix_str("{loss:.3f} nats, {step_ms:.1f} ms, {nfe:.0f} NFE".format(**record))
            step, last = until, until == settings.steps
            if last or step % settings.validate_every == 0:
                record["val_nll"] = validate(train.with_params(flow, state.average))
                if notes["best_nll"] is None or record["val_nll"] < notes["best_nll"]:
                    best = jax.tree.map(jnp.copy, state.average)
                    # A validation that failed is beaten by any that does not.
                    finite = math.isfinite(record["val_nll"])
                    notes["best_nll"] = record["val_nll"] if finite else None
            log.add({"step": step, **record, "train_s": notes["train_s"]})
            if last or step % settings.checkpoint_every == 0:
                checkpoint.save(run.checkpoint, (state, best), notes)
    timing = {
        "compile_s": compile_s,
        "train_s": notes["train_s"],
        "step_ms_median": statistics.median(r["step_ms"] for r in log.records),
    }
    return Fitted(train.with_params(flow, best), log.records, int(state.skipped), timing)
