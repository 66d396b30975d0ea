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

from experiments.rundir import MetricsLog, RunDir, read_jsonl
from experiments.settings import FlowSettings
from jcnf import CNF, checkpoint, train
from jcnf.errors import InputError

STUCK = 50  # steps in a row without an update, after which training gives up


class Fitted(NamedTuple):
    """What training gave."""

    flow: CNF  # with the averaged parameters of the lowest validation NLL
    val_nll: float  # that NLL, nats
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
    records = read_jsonl(run.log)
    if run.checkpoint.exists():
        (state, best), notes = checkpoint.load(run.checkpoint, (state, best))
    elif records and records[-1]["step"] > settings.checkpoint_every:
        raise InputError(
            f"{run.checkpoint} is missing, though {run.log.name} goes to step "
            f"{records[-1]['step']}: restore it, or start a new run with another --out"
        )
    step = int(state.step)
    log = MetricsLog(run.log, records, step)

    start = time.perf_counter()
    key = jr.fold_in(jr.key(settings.seed), 1)
    run_steps = train.make_run(
        flow,
        settings.make_objective(),
        draw_batch,
        optimizer,
        average=settings.average,
        differentiate=train.differentiator(settings.make_solve()),
    )
    if step < settings.steps:
        run_steps = run_steps.lower(state, data, key, settings.steps).compile()
    compile_s = time.perf_counter() - start

    stuck = 0  # steps since an update was applied
    events = (settings.log_every, settings.checkpoint_every, settings.validate_every)
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
            stuck = stuck + until - step if record["skipped"] == until - step else 0
            bar.update(until - step)
            bar.set_postfix_str(_shown(record, state))
            step, last = until, until == settings.steps
            if last or step % settings.validate_every == 0:
                record["val_nll"] = validate(train.with_params(flow, state.average))
                if notes["best_nll"] is None or record["val_nll"] < notes["best_nll"]:
                    best = jax.tree.map(jnp.copy, state.average)
                    # A validation that failed is beaten by any that does not.
                    finite = math.isfinite(record["val_nll"])
                    notes["best_nll"] = record["val_nll"] if finite else None
            log.add({"step": step, **record, "train_s": notes["train_s"]})
            if last or stuck >= STUCK or step % settings.checkpoint_every == 0:
                checkpoint.save(run.checkpoint, (state, best), notes)
            if stuck >= STUCK:
                raise InputError(
                    f"no update could be applied in the last {stuck} steps: their solves failed, "
                    "or their gradients were not finite. Start anew with a smaller "
                    "--learning-rate or --clip, a larger --max-steps, or looser --rtol and "
                    f"--atol; {run.path} keeps the state and the log up to here"
                )
    skipped = int(state.skipped)
    if skipped > settings.steps // 2:
        print(
            f"warning: {skipped} of {settings.steps} updates were skipped: see the help of --clip, "
            "--learning-rate, --max-steps and the tolerances"
        )
    timing = {
        "compile_s": compile_s,
        "train_s": notes["train_s"],
        "fit_s": time.perf_counter() - start,
        "step_ms_median": statistics.median(r["step_ms"] for r in log.records),
    }
    val_nll = math.nan if notes["best_nll"] is None else notes["best_nll"]
    return Fitted(train.with_params(flow, best), val_nll, log.records, skipped, timing)


def _shown(record, state):
    text = "{loss:.3f} nats, {step_ms:.1f} ms, {nfe:.0f} NFE".format(**record)
    skipped = int(state.skipped)
    return f"{text}, {skipped} skipped" if skipped else text
