"""Train a flow: the one driver of the library and of the experiments."""

import contextlib
import dataclasses
import math
import operator
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from jcnf import sharding
from jcnf._checks import check_callable, check_instance, check_int, check_key, check_number
from jcnf.flows import Flow
from jcnf.objectives import Objective, flow_matching, with_context
from jcnf.ode import Solve
from jcnf.training.batches import DrawBatch, prepare
from jcnf.training.loop import make_train_loop
from jcnf.training.optimizers import make_optimizer
from jcnf.training.reports import report
from jcnf.training.state import MetricSums, TrainState, init, means, with_params

DEFAULT_RECORDS = 50
DISPATCH_SECONDS = 1.0  # about; between two times that the host sees metrics and can interrupt
MAX_SKIPS = 50
STOP = bool, np.bool_, jax.Array  # types of the truth that ends training; others are ignored

Rows = Array | np.ndarray | tuple[Array | np.ndarray, Array | np.ndarray]


class Snapshot(NamedTuple):
    """Everything that `fit` carries from one dispatch to the next.

    From a snapshot, `fit(..., start=snapshot)` trains on as if it had not stopped, bit for bit. To
    keep one on disk: `checkpoint.save(path, snapshot.arrays, snapshot.numbers)`.
    """

    state: TrainState
    best: PyTree  # averaged parameters of the best validation, or those at the start
    lowest: float = math.inf  # score of that validation
    worse: int = 0  # validations since then
    recorded: int = 0  # step of the last record
    sums: MetricSums | None = None  # over the steps since then
    seconds: float = 0.0  # spent on steps, without compilation, validation and callbacks

    @classmethod
    def first(cls, flow: Any, optimizer: optax.GradientTransformation) -> "Snapshot":
        """Return the snapshot before the first step."""
        state = init(flow, optimizer)
        return cls(state, state.average)

    @classmethod
    def restored(cls, arrays: tuple[TrainState, PyTree], numbers: dict[str, Any]) -> "Snapshot":
        """Return the snapshot that has these `arrays` and `numbers`."""
        restored = cls(*arrays, **numbers)
        if restored.sums is None:
            return restored
        sums = jax.tree.map(lambda number: jnp.asarray(number, type(number)), numbers["sums"])
        return restored._replace(sums=MetricSums(**sums))

    def validated(self, score: float) -> "Snapshot":
        """Return the snapshot after a validation with this score."""
        if score < self.lowest:
            return self._replace(best=self.state.average, lowest=score, worse=0)
        return self._replace(worse=self.worse + 1)

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return int(self.state.step)

    @property
    def arrays(self) -> tuple[TrainState, PyTree]:
        """The state and the best parameters."""
        return self.state, self.best

    @property
    def numbers(self) -> dict[str, Any]:
        """Everything else, which JSON can hold without loss."""
        numbers = self._asdict()
        del numbers["state"], numbers["best"]
        if self.sums is not None:
            sums = dataclasses.asdict(self.sums)
            numbers["sums"] = jax.tree.map(lambda leaf: leaf.item(), sums)
        return numbers


class Progress(NamedTuple):
    """The argument of a callback: where training stands."""

    step: int  # optimizer steps taken so far
    steps: int  # optimizer steps of the whole training
    metrics: dict[str, float]  # means since the last record; "val_nll" or "score" if validated
    flow: Any  # the flow with the averaged parameters of this step
    snapshot: Snapshot  # to train on from here
    stuck: bool  # whether training ends here, because too many updates in a row were skipped


class FitResult(NamedTuple):
    """The trained flow and its history."""

    flow: Any  # has the averaged parameters of the best validation, or of the last step without one
    history: list[dict[str, float]]  # the records: "step", "seconds", "loss" and other metrics
    snapshot: Snapshot  # to train on from here
    compile_seconds: float


def fit(
    flow: Any,
    data: Any,
    *,
    key: Key[Array, ""],
    objective: Objective = flow_matching,
    steps: int = 5000,
    batch: int | DrawBatch | None = 512,
    optimizer: optax.GradientTransformation | None = None,
    validation: float | Rows | Callable[[Any], float] | None = 0.1,
    every: int | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    callbacks: Sequence[Callable[[Progress], bool | Snapshot | None]] = (),
    interrupt: Callable[[Snapshot], bool] | None = None,
    start: Snapshot | None = None,
    average: float = 0.999,
    solve: Solve | None = None,
    max_skips: int = MAX_SKIPS,
    devices: int | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a flow on an array or a sampler; return the flow and the history of its training.

    ```python
    result = jcnf.fit(flow, x, key=jr.key(0))
    jcnf.log_prob(result.flow, x)
    ```

    **Arguments:**

    - `flow`: the flow, or any other model that `objective` takes.
    - `data`: an array (n, dim); a pair of arrays `(x, context)` for a conditional density; or a
      sampler `data(key, num)` that returns either, and is compiled with the step.
    - `key`: consumed once. It determines the batches, the noise, and the rows held out.
    - `objective`: a function like those in `jcnf.objectives` (see `jcnf.objectives.Objective`);
      set its options with `functools.partial`.
    - `steps`: the number of optimizer steps.
    - `batch`: the number of samples in each; None for all rows of `data` in order; or a function
      `batch(key, data)` that draws a batch from `data`, any pytree of arrays, in the form that
      `objective(flow, batch, key)` takes.
    - `optimizer`: an optax optimizer; by default AdamW at 1e-3 with warm-up, cosine decay and
      clipping.
    - `validation`: how the best parameters are chosen. A float is the share of the rows of `data`
      to hold out (for a sampler, any float stands for 1000 new points). An array or a pair like
      `data` is the validation set. In both cases the score is "val_nll", the NLL in nats, from
      solves at a tolerance of 1e-4. A function of the flow returns a "score" of your own, lower is
      better. With None, the last parameters are returned.
    - `every`: number of steps between records, each of which is an entry of the history and a call
      of the callbacks; by default a fiftieth of `steps`. There is one at the end, too.
    - `validate_every`: number of steps between validations; each waits for the next record, and the
      last record always has one. By default every record has one.
    - `patience`: stop after this many validations in a row without a new best one.
    - `callbacks`: each is called with a `Progress` at every record. If one returns True, training
      stops; if one returns a `Snapshot`, training goes on from there.
    - `interrupt`: called with a `Snapshot` about once a second; training stops if it returns True.
    - `start`: the snapshot to train on from, if the other arguments are the same.
    - `average`: decay of the moving average of the parameters. The average is what is returned.
    - `solve`: how to solve the ODE, for objectives that do. Each solve reuses the step plan of the
      one before.
    - `max_skips`: number of updates in a row that are skipped, because the solve failed or the loss
      or gradient is not finite, after which training is stuck: it ends unless a callback returns a
      `Snapshot`.
    - `devices`: number of devices that share each batch; by default those of the current mesh.
    - `progress`: whether to show a progress bar.

    **Raises:** `ValueError` for arguments that are out of range or do not fit together, and for
    data with NaN or inf; `RuntimeError` if nothing was learned. Warns of skipped updates, and of
    samples left out of the loss because their solve failed.
    """
    check_key(key)
    check_int(steps=steps, max_skips=max_skips)
    every = max(1, steps // DEFAULT_RECORDS) if every is None else every
    validate_every = every if validate_every is None else validate_every
    check_int(every=every, validate_every=validate_every)
    if isinstance(validation, int | float):
        check_number("(0, 1)", validation=validation)
    if not (validation is None or callable(validation) or isinstance(flow, Flow)):
        raise ValueError(
            "expected a flow, such as jcnf.CNF(field, base), to validate by its NLL; got one of "
            f"type {type(flow).__name__}: for another model, validation must be a function or None"
        )
    if patience is not None:
        check_int(patience=patience)
        if validation is None:
            raise ValueError(
                "patience counts validations, so it needs some; got validation=None: "
                "give validation=0.1, or leave out patience"
            )
    if start is not None:
        check_instance(Snapshot, "a Snapshot, such as result.snapshot", start=start)
    functions = "a sequence of functions that take a Progress"
    check_instance(Sequence, functions, callbacks=callbacks)
    for callback in callbacks:
        check_callable(functions, callbacks=callback)
    if optimizer is None:
        optimizer = make_optimizer(1e-3, steps, warmup=min(200, steps // 10), clip=10.0)
    max_skips = min(max_skips, steps)
    data_key, train_key = jr.split(key)
    rows, draw_batch, paired, score = prepare(data, batch, validation, data_key)
    score_name = "score" if callable(validation) else "val_nll"
    loop = make_train_loop(
        flow,
        with_context(objective) if paired else objective,
        draw_batch,
        optimizer,
        average=average,
        solve=solve,
        max_skips=max_skips,
    )

    def stuck(at):
        return int(at.state.stuck) >= max_skips

    def over(at):
        return at.step >= steps or stuck(at) or (patience is not None and at.worse >= patience)

    at = Snapshot.first(flow, optimizer) if start is None else start
    history, told, begin, scored = [], None, at.recorded, {}
    compiled, compile_seconds, pace = None, 0.0, 1
    with _mesh(devices), _bar(steps, at.step, progress) as bar:
        train_key, rows = sharding.replicate((train_key, rows))
        at = _replicated(at)
        while not over(at):
            if compiled is None:
                tic = time.perf_counter()
                compiled = loop.compile(at.state, rows, train_key)
                compile_seconds = time.perf_counter() - tic
            program, nothing = compiled
            # One dispatch runs to the next record, or for about DISPATCH_SECONDS.
            step = at.step
            due = min(steps, step - step % every + every)
            sums = nothing if at.sums is None else at.sums
            tic = time.perf_counter()
            state, sums = program(at.state, rows, train_key, min(due, step + pace), sums)
            sums = jax.device_get(sums)
            seconds = time.perf_counter() - tic
            at = at._replace(state=state, sums=sums, seconds=at.seconds + seconds)
            taken = at.step - step
            quicker = min(max(1, int(DISPATCH_SECONDS / seconds * taken)), 10 * taken)
            # All processes must take the same number of steps.
            pace = sharding.on_process_zero(lambda quicker=quicker: quicker)
            bar.n = at.step
            bar.set_postfix_str(_shown(_means(sums) | scored, int(state.skipped)))
            if at.step == due or stuck(at):
                metrics, here = _means(sums), with_params(flow, state.average)
                late = at.step // validate_every > at.recorded // validate_every
                if score is not None and (late or over(at)):
                    scored = {score_name: score(here)}
                    metrics |= scored
                    at = at.validated(scored[score_name])
                at = at._replace(recorded=at.step, sums=None)
                told = sums if told is None else jax.tree.map(operator.add, told, sums)
                history.append({"step": at.step, "seconds": at.seconds, **metrics})
                place = Progress(at.step, steps, metrics, here, at, stuck(at))
                answers = [callback(place) for callback in callbacks]
                back = next((each for each in answers if isinstance(each, Snapshot)), None)
                if back is not None:
                    at = _replicated(back)
                    history = [record for record in history if record["step"] <= at.step]
                elif any(isinstance(each, STOP) and each for each in answers):
                    break
            if interrupt is not None and interrupt(at):
                break
    if told is not None:
        report(told, begin, at.state, steps if stuck(at) else at.step)
    if scored and at.lowest == math.inf:
        warnings.warn(
            "no validation gave a finite score, so the last parameters are returned", stacklevel=2
        )
    chosen = at.best if at.lowest < math.inf else at.state.average
    return FitResult(with_params(flow, chosen), history, at, compile_seconds)


def _means(sums):
    """Return the means of the metrics, NaN without an applied update, and the counts of skips."""
    with np.errstate(invalid="ignore"):
        return {name: float(value) for name, value in means(sums).items()}


def _replicated(snapshot):
    state, best = sharding.replicate(snapshot.arrays)
    return snapshot._replace(state=state, best=best)


def _mesh(devices):
    if devices is None:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(devices))


def _bar(steps, step, progress):
    """Return a progress bar, which the first process shows."""
    from tqdm import tqdm

    shown = progress and jax.process_index() == 0
    return tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not shown)


def _shown(metrics, skipped):
    """Return what the progress bar says beside the number of steps."""
    forms = {"loss": "loss {:.4g}", "nfe": "{:.0f} NFE"}
    forms |= {"val_nll": "val_nll {:.4g}", "score": "score {:.4g}"}
    parts = [form.format(metrics[name]) for name, form in forms.items() if name in metrics]
    return ", ".join([*parts, f"{skipped} skipped"] if skipped else parts)
