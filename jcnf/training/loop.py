"""The training loop: one compiled program that runs any number of steps.

Data order and noise depend only on (key, step), so a run that is killed and resumed from a
checkpoint ends in the same state, bit for bit, as one that was not interrupted.
"""

import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PyTree

from jcnf import sharding
from jcnf._checks import (
    check_callable,
    check_finite,
    check_instance,
    check_int,
    check_key,
    check_number,
)
from jcnf.distributions import BaseDistribution
from jcnf.ode import Solve, unknown

MAX_SKIPPED_IN_A_ROW = 10
_REASONS = {
    "skipped_solve": "because the ODE solve failed for more than a tenth of the rows",
    "skipped_loss": "because the loss was not finite",
    "skipped_gradient": "because the gradient was not finite",
}

Objective = Callable[[Any, Any, Key[Array, ""]], tuple[Array, dict[str, Array]]]
DrawBatch = Callable[[Key[Array, ""], Any], Any]


class TrainState(eqx.Module):
    """Everything needed to continue training, as arrays; the random key is not part of it."""

    params: PyTree  # the trainable part of the model
    average: PyTree  # exponential moving average of params
    opt_state: PyTree
    step: Int[Array, ""]  # steps taken, including skipped ones
    skipped: Int[Array, ""]  # steps whose update was not applied
    stuck: Int[Array, ""]  # the number of skipped steps in a row, up to the last step
    rate: Float[Array, ""]  # factor of the updates; under AdamW, a factor of the learning rate
    step_plan: Float[Array, " parts"]  # for the next step's solve, see `jcnf.Solve`


class MetricSums(eqx.Module):
    """Sums of metrics, and counts of updates, over training steps."""

    sums: dict[str, Float[Array, ""]]  # metrics, summed over the applied updates
    applied: Int[Array, ""]  # number of applied updates
    skipped: dict[str, Int[Array, ""]]  # number of skipped updates: "skipped", and by reason


def means(totals: MetricSums) -> dict[str, Any]:
    """Return the mean of each metric over the applied updates, and the counts of skipped ones.

    Means are NaN if no update was applied.
    """
    of_all = {n: total / totals.applied.astype(total.dtype) for n, total in totals.sums.items()}
    return of_all | totals.skipped


def partition(model: PyTree) -> tuple[PyTree, PyTree]:
    """Split a flow, or a field, into its trainable arrays and the rest.

    All floating-point arrays are trainable, except those of base distributions.
    """

    def is_base(node):
        return isinstance(node, BaseDistribution)

    def trainable(node):
        return jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf) and not is_base(node), node)

    return eqx.partition(model, jax.tree.map(trainable, model, is_leaf=is_base))


def init(model: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step.

    **Raises:** `ValueError` if `optimizer` is not an optax optimizer, or if the model has no
    trainable arrays.
    """
    _check_optimizer(optimizer)
    params: Any = partition(model)[0]
    if not jax.tree.leaves(params):
        raise ValueError(
            "nothing to train: model must have floating-point arrays outside of base "
            f"distributions, which are not trained; got {type(model).__name__} without any"
        )
    zero = jnp.zeros((), jnp.int32)
    counts = {"step": zero, "skipped": zero, "stuck": zero}
    pace = {"rate": jnp.ones(()), "step_plan": unknown(float)}
    return TrainState(params, params, optimizer.init(params), **counts, **pace)


def restart(
    state: TrainState, params: PyTree, optimizer: optax.GradientTransformation
) -> TrainState:
    """Return `state` with `params` as parameters and as their average, and a fresh optimizer."""
    return dataclasses.replace(
        state,
        params=params,
        average=params,
        opt_state=optimizer.init(params),
        stuck=jnp.zeros_like(state.stuck),
    )


def with_params(model: PyTree, params: PyTree) -> Any:
    """Return `model` with other parameters, for example `state.average` to evaluate.

    **Raises:** `ValueError` if the shapes differ.
    """
    own, rest = partition(model)
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (own, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"params must have the shapes of this model's parameters, {shapes[0]}; got {shapes[1]}"
        )
    return eqx.combine(params, rest)


def _check_optimizer(optimizer):
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            "optimizer must be an optax optimizer, such as jcnf.training.make_optimizer returns; "
            f"got {optimizer!r}"
        )


def draw_rows(batch: int | None) -> DrawBatch:
    """Return a `draw_batch(key, data)` that draws `batch` rows at random, with replacement.

    `data` is a table or a pytree of tables; the same rows are drawn from each. With `batch=None`,
    `draw_batch` returns all rows in order and does not consume its key.

    **Raises:** `ValueError` if `batch` is not a positive integer. `draw_batch` raises `ValueError`
    for tables without rows or with unequal numbers of rows.
    """
    if batch is not None:
        check_int(batch=batch)

    def draw(key, data):
        rows = {table.shape[0] for table in jax.tree.leaves(data)}
        if len(rows) != 1 or min(rows) < 1:
            raise ValueError(
                f"data must be tables with equal numbers of rows, at least 1; got {sorted(rows)}"
            )
        if batch is None:
            return data
        index = jr.randint(key, (batch,), 0, *rows)
        return jax.tree.map(lambda table: table[index], data)

    return draw


def by_reverse_mode(function: Callable) -> Callable:
    """Differentiate `function(params) -> (value, aux)` in reverse mode.

    The result maps params to `((value, aux), gradient)`, where `gradient()` runs the backward pass.
    The caller can therefore skip it after a failed solve.
    """

    def differentiated(params):
        value, pull_back, aux = jax.vjp(function, params, has_aux=True)
        return (value, aux), lambda: pull_back(jnp.ones_like(value))[0]

    return differentiated


def by_forward_mode(function: Callable) -> Callable:
    """Differentiate like `by_reverse_mode`, with one jvp per parameter and no backward pass."""

    def differentiated(params):
        flat, unravel = ravel_pytree(params)

        def twice(flat):
            value, aux = function(unravel(flat))
            return value, (value, aux)

        gradient, outputs = jax.jacfwd(twice, has_aux=True)(flat)
        return outputs, lambda: unravel(gradient)

    return differentiated


def differentiator(solve: Solve) -> Callable:
    """Return `by_forward_mode` for the "forward" adjoint, and `by_reverse_mode` otherwise."""
    return by_forward_mode if solve.adjoint == "forward" else by_reverse_mode


class TrainLoop:
    """A compiled training program that checks its data and reports skipped updates.

    **Arguments:**

    - `program`: the compiled `program(state, data, key, until, totals=None) -> (state, totals)`
      that `make_train_loop` builds. Call it directly to skip the checks and the reports, for
      example if you handle skipped updates yourself.
    """

    def __init__(self, program: jax.stages.Wrapped):
        self.program = program
        self._checked: list[weakref.ref] = []  # leaves of the last data, if immutable

    def __call__(
        self,
        state: TrainState,
        data: Any,
        key: Key[Array, ""],
        until: int,
        totals: MetricSums | None = None,
    ) -> tuple[TrainState, MetricSums]:
        """Train until `state.step == until`; return the new state and sums over the steps.

        The call waits until the steps are done. The sums are added to `totals` if given. `key` is
        not consumed: each step folds its number into it. If anything is traced (inside jit, vmap or
        grad), the call just runs `program`, without the reports.

        **Raises:** `ValueError` for data with NaN or inf, naming the first rows. `RuntimeError` if
        the call applied no update and either no earlier call did (a single skipped step is excused)
        or at least `MAX_SKIPPED_IN_A_ROW` updates in a row, or as many as `stuck` allows, were
        skipped. Warns if some updates were skipped, and if samples were left out of the loss
        because their solve failed.
        """
        self._check(data)
        after, sums = self.program(state, data, key, until, totals)
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, after, sums))):
            self._report_failed_rows(state, after, totals, sums)
            self._report_skipped(state, after, int(until), totals, sums)
        return after, sums

    def _check(self, data):
        paths = jax.tree_util.tree_leaves_with_path(data)
        leaves = [leaf for _, leaf in paths]
        if len(leaves) == len(self._checked) and all(
            seen() is leaf for seen, leaf in zip(self._checked, leaves, strict=True)
        ):
            return
        for path, leaf in paths:
            if eqx.is_inexact_array(leaf) and not isinstance(leaf, Tracer):
                values = sharding.to_host(leaf)
                # Check in the dtype of training: a large float64 may be infinite in float32.
                with np.errstate(over="ignore"):
                    values = np.asarray(values).astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
                check_finite(**{f"data{jax.tree_util.keystr(path)}": values})
        # The contents of a NumPy array may change, so NumPy data are checked in every call.
        fixed = all(isinstance(leaf, jax.Array) for leaf in leaves)
        self._checked = [weakref.ref(leaf) for leaf in leaves] if fixed else []

    def _report_failed_rows(self, before, after, totals, sums):
        earlier = 0 if totals is None else totals.sums.get("failed_rows", 0)
        failed = int(sums.sums.get("failed_rows", 0) - earlier)
        if failed:
            taken = int(after.step) - int(before.step)
            warnings.warn(
                f"{failed} samples were left out of the loss in the {taken} updates after step "
                f"{int(before.step)}, because their ODE solve failed. Look for outliers in the "
                "data; raise max_steps of the solve if many fail.",
                stacklevel=3,
            )

    def _report_skipped(self, before, after, until, totals, sums):
        start, end = int(before.step), int(after.step)
        skipped = int(after.skipped) - int(before.skipped)
        if not skipped and end >= until:
            return
        earlier = {} if totals is None else totals.skipped
        counts = {name: int(sums.skipped[name]) - int(earlier.get(name, 0)) for name in _REASONS}
        why = ", ".join(f"{count} {_REASONS[name]}" for name, count in counts.items() if count)
        told = f"{skipped} of {end - start} updates after step {start} were skipped: {why}. "
        if end < until:
            told += (
                f"Training ended before step {until}, "
                f"after {after.stuck} skipped updates in a row. "
            )
        told += (
            "Look for NaN, inf or huge values in the batches; lower the learning rate or clip "
            "gradients; loosen the tolerances or raise max_steps of the solve."
        )
        untrained = int(after.skipped) == end > start + 1
        hopeless = int(after.stuck) >= MAX_SKIPPED_IN_A_ROW or end < until
        if skipped == end - start and (untrained or hopeless):
            raise RuntimeError(f"nothing was learned: {told}")
        warnings.warn(told, stacklevel=3)


def make_train_loop(
    model: PyTree,
    objective: Objective,
    draw_batch: DrawBatch,
    optimizer: optax.GradientTransformation,
    *,
    average: float = 0.999,
    solve: Solve | None = None,
    fixed: bool = False,
    stuck: int | None = None,
) -> TrainLoop:
    """Build a compiled training loop, `loop(state, data, key, until, totals=None)`.

    `loop` takes all steps until `state.step == until` in one dispatch, and returns a new state and
    sums over the steps. The old state is not donated: it stays valid, at the price of memory for
    two states.

    An update is skipped and counted if its solve failed or its loss or gradient is not finite.
    `means(totals)` gives the means, over the applied updates, of the objective's metrics, "loss"
    and "grad_norm", and the counts of skipped updates. Sums are added to `totals` if given, so that
    the result does not depend on how steps are grouped into dispatches, not even in the last bit.

    **Arguments:**

    - `model`: a flow, or any other model that `objective` takes.
    - `objective`: `objective(model, batch, key) -> (loss, metrics)`, see `jcnf.objectives`.
    - `draw_batch`: `draw_batch(key, data)` returns a batch; it runs inside the compiled program.
    - `optimizer`: an optax optimizer.
    - `average`: decay of the moving average of the parameters. The decay is lower in the first
      steps: min(average, (1 + step) / (10 + step)).
    - `solve`: passed to the objective as `objective(model, batch, key, solve=solve)`; the loss is
      differentiated in forward mode if its adjoint is "forward". If the metrics contain the solve's
      `Stats.step_plan` as "step_plan", the next step's solve follows it (not with `fixed`).
    - `fixed`: if True, every step has the same batch and the same noise, as an optimizer with a
      line search (`optax.lbfgs`) needs, and `state.rate` is ignored.
    - `stuck`: if given, `loop` ends early after this many skipped steps in a row.

    **Returns:** a `TrainLoop`.

    **Raises:** `ValueError` if `objective` or `draw_batch` is not a function, if `optimizer` is not
    an optax optimizer, if `average` is out of range, and if the objective does not take the given
    `solve`.
    """
    check_callable(
        "a function of (model, batch, key), such as jcnf.objectives.likelihood", objective=objective
    )
    check_callable("a function of (key, data), such as draw_rows(64)", draw_batch=draw_batch)
    if solve is not None:
        check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
        taken = inspect.signature(objective).parameters.values()
        if not any(p.name == "solve" or p.kind is p.VAR_KEYWORD for p in taken):
            raise ValueError(
                "solve must be None for an objective that takes no solve argument: leave out solve="
            )
    check_number("[0, 1)", average=average)
    _check_optimizer(optimizer)
    _, static = partition(model)
    optimizer = optax.with_extra_args_support(optimizer)
    differentiate = by_reverse_mode if solve is None else differentiator(solve)

    def settings(state):
        if solve is None or fixed:
            return {} if solve is None else {"solve": solve}
        return {"solve": dataclasses.replace(solve, step_plan=state.step_plan)}

    @jax.jit  # traced only once for the two uses below
    def one_step(state, data, key):
        check_key(key)
        batch_key, noise_key = jr.split(jr.fold_in(key, 0 if fixed else state.step))
        batch = sharding.shard(draw_batch(batch_key, data))

        def loss_of(params):
            return objective(eqx.combine(params, static), batch, noise_key, **settings(state))

        def value_of(params):  # for a line search, which must avoid parameters where solves fail
            loss, metrics = loss_of(params)
            return jnp.where(metrics.get("failed", False), jnp.inf, loss)

        (loss, metrics), gradient = differentiate(loss_of)(state.params)
        metrics, failed, bad_loss = dict(metrics), jnp.asarray(False), ~jnp.isfinite(loss)
        step_plan = metrics.pop("step_plan", state.step_plan).astype(state.step_plan.dtype)
        if "failed" in metrics:
            failed = metrics.pop("failed")
            # A failed solve has taken many steps, and its gradient would not be used.
            zeros = lambda: jax.tree.map(jnp.zeros_like, state.params)  # noqa: E731
            grads = jax.lax.cond(failed | bad_loss, zeros, gradient)
        else:
            grads = gradient()
        norm = optax.global_norm(grads)
        good = ~(failed | bad_loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=loss, grad=grads, value_fn=value_of
        )
        if not fixed:
            updates = jax.tree.map(lambda u: state.rate.astype(u.dtype) * u, updates)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(average, (1 + state.step) / (10 + state.step))
        mean = jax.tree.map(
            lambda a, p: a + (1 - decay).astype(p.dtype) * (p - a), state.average, params
        )
        params, mean, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, mean, opt_state),
            (state.params, state.average, state.opt_state),
        )
        metrics |= {"loss": loss, "grad_norm": norm}
        after = TrainState(
            params,
            mean,
            opt_state,
            step=state.step + 1,
            skipped=state.skipped + jnp.where(good, 0, 1),
            stuck=jnp.where(good, 0, state.stuck + 1),
            rate=state.rate,
            step_plan=jnp.where(good, step_plan, state.step_plan),
        )
        return sharding.replicate(after), MetricSums(
            {name: jnp.where(good, value, 0).astype(float) for name, value in metrics.items()},
            applied=good.astype(int),
            skipped={
                "skipped": (~good).astype(int),
                "skipped_solve": failed.astype(int),
                "skipped_loss": (bad_loss & ~failed).astype(int),
                "skipped_gradient": (~(good | failed | bad_loss)).astype(int),
            },
        )

    def run(state, data, key, until, totals=None):
        if totals is None:
            _, shapes = jax.eval_shape(one_step, state, data, key)
            totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def more(carry):
            state, _ = carry
            going = state.step < until
            return going if stuck is None else going & (state.stuck < stuck)

        def body(carry):
            state, totals = carry
            state, step = one_step(state, data, key)
            return state, jax.tree.map(jnp.add, totals, step)

        return jax.lax.while_loop(more, body, (state, totals))

    return TrainLoop(jax.jit(run))
