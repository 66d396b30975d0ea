"""Training: one compiled program that runs any number of steps.

Data order and noise derive from (key, step) alone, so that a run killed and resumed from a
checkpoint ends bit for bit where the uninterrupted one does.
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
from jcnf.distributions import Base
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
    """Everything a run needs to go on; arrays only, and no random key."""

    params: PyTree  # the trainable part of the model
    average: PyTree  # its exponential moving average
    opt_state: PyTree
    step: Int[Array, ""]  # steps taken, skipped ones included
    skipped: Int[Array, ""]  # of them, with an update that was not applied
    stuck: Int[Array, ""]  # the last ones in a row that were skipped
    rate: Float[Array, ""]  # a factor of the updates: under AdamW, of the learning rate
    step_plan: Float[Array, " parts"]  # of the next step's solve, as of `jcnf.Solve`


class Totals(eqx.Module):
    """Sums over steps."""

    sums: dict[str, Float[Array, ""]]  # of the metrics of the updates applied
    applied: Int[Array, ""]  # how many these are
    skipped: dict[str, Int[Array, ""]]  # "skipped", all others, and of them by reason


def means(totals: Totals) -> dict[str, Any]:
    """The mean of each metric over the updates applied, NaN where there were none, and the counts
    of those that were not."""
    of_all = {n: total / totals.applied.astype(total.dtype) for n, total in totals.sums.items()}
    return of_all | totals.skipped


def partition(model: PyTree) -> tuple[PyTree, PyTree]:
    """The trainable arrays of a flow, or of a field, and the rest: bases are never trained."""

    def is_base(node):
        return isinstance(node, Base)

    def trainable(node):
        return jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf) and not is_base(node), node)

    return eqx.partition(model, jax.tree.map(trainable, model, is_leaf=is_base))


def init(model: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    _check_optimizer(optimizer)
    params: Any = partition(model)[0]
    if not jax.tree.leaves(params):
        raise ValueError(f"nothing to train in a {type(model).__name__}: bases are not trained")
    zero = jnp.zeros((), jnp.int32)
    counts = {"step": zero, "skipped": zero, "stuck": zero}
    pace = {"rate": jnp.ones(()), "step_plan": unknown(float)}
    return TrainState(params, params, optimizer.init(params), **counts, **pace)


def restart(
    state: TrainState, params: PyTree, optimizer: optax.GradientTransformation
) -> TrainState:
    """`state` with these parameters, their average too, and a fresh optimiser."""
    return dataclasses.replace(
        state,
        params=params,
        average=params,
        opt_state=optimizer.init(params),
        stuck=jnp.zeros_like(state.stuck),
    )


def with_params(model: PyTree, params: PyTree) -> Any:
    """`model` with trained parameters in place of its own: `state.average`, to evaluate."""
    own, rest = partition(model)
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (own, params)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"parameters of another model: expected shapes {shapes[0]}; got {shapes[1]}"
        )
    return eqx.combine(params, rest)


def _check_optimizer(optimizer):
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            "expected an optax optimizer, such as jcnf.training.make_optimizer makes; "
            f"got {optimizer!r}"
        )


def draw_rows(batch: int | None) -> DrawBatch:
    """`draw_batch` for a table, or a pytree of tables: `batch` rows at random, the same of each.

    None gives all of them, in order. It raises `ValueError` for tables without rows, or of unequal
    numbers of them.
    """
    if batch is not None:
        check_int(batch=batch)

    def draw(key, data):
        rows = {table.shape[0] for table in jax.tree.leaves(data)}
        if len(rows) != 1 or min(rows) < 1:
            raise ValueError(f"expected tables of one number of rows, at least 1; got {rows}")
        if batch is None:
            return data
        index = jr.randint(key, (batch,), 0, *rows)
        return jax.tree.map(lambda table: table[index], data)

    return draw


def by_reverse_mode(function: Callable) -> Callable:
    """`function(params) -> (value, aux)`, made to return a function that gives its gradient too."""

    def differentiated(params):
        value, pull_back, aux = jax.vjp(function, params, has_aux=True)
        return (value, aux), lambda: pull_back(jnp.ones_like(value))[0]

    return differentiated


def by_forward_mode(function: Callable) -> Callable:
    """As `by_reverse_mode`, with one jvp for each parameter in place of a backward pass."""

    def differentiated(params):
        flat, unravel = ravel_pytree(params)

        def twice(flat):
            value, aux = function(unravel(flat))
            return value, (value, aux)

        gradient, outputs = jax.jacfwd(twice, has_aux=True)(flat)
        return outputs, lambda: unravel(gradient)

    return differentiated


def differentiator(solve: Solve) -> Callable:
    """Forward mode for the "forward" adjoint, which has no other; reverse mode otherwise."""
    return by_forward_mode if solve.adjoint == "forward" else by_reverse_mode


class Run:
    """A compiled training program that checks its data and reports skipped updates.

    **Arguments:**

    - `program`: `program(state, data, key, until, totals=None) -> (state, totals)`, compiled, as
      `make_run` builds it. Call it directly where you count skipped updates yourself.
    """

    def __init__(self, program: jax.stages.Wrapped):
        self.program = program
        self._checked: list[weakref.ref] = []  # the leaves of the last data, if none can change

    def __call__(
        self,
        state: TrainState,
        data: Any,
        key: Key[Array, ""],
        until: int,
        totals: Totals | None = None,
    ) -> tuple[TrainState, Totals]:
        """Train until `state.step == until`; return the new state, and sums over the steps.

        It waits until the steps are done. The sums are added to `totals`, if these are given. `key`
        is not consumed: each step folds its number into it. Where something is traced, inside jit,
        vmap or grad, it is `program`, without the report.

        **Raises:** `ValueError` for data with NaN or inf, naming the first rows; `RuntimeError`
        where no update of the call was applied and the training has had none yet, or
        `MAX_SKIPPED_IN_A_ROW` were skipped in a row, or as many as `stuck` allows. Warns where some
        were skipped, and where samples were left out of the loss because their solve failed.
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
                values = sharding.on_host(leaf)
                # In the dtype that it is trained in: a large float64 may be infinite in float32.
                with np.errstate(over="ignore"):
                    values = np.asarray(values).astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
                check_finite(**{f"data{jax.tree_util.keystr(path)}": values})
        # NumPy arrays may be filled anew, and are looked at every time.
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
            told += f"Training ended before step {until}, after {after.stuck} skipped in a row. "
        told += (
            "Look for NaN, inf or huge values in the batches; lower the learning rate or clip "
            "gradients; loosen the tolerances or raise max_steps of the solve."
        )
        untrained = int(after.skipped) == end > start + 1
        hopeless = int(after.stuck) >= MAX_SKIPPED_IN_A_ROW or end < until
        if skipped == end - start and (untrained or hopeless):
            raise RuntimeError(f"nothing was learned: {told}")
        warnings.warn(told, stacklevel=3)


def make_run(
    model: PyTree,
    objective: Objective,
    draw_batch: DrawBatch,
    optimizer: optax.GradientTransformation,
    *,
    average: float = 0.999,
    solve: Solve | None = None,
    fixed: bool = False,
    stuck: int | None = None,
) -> Run:
    """Build a compiled training loop, `run(state, data, key, until, totals=None)`.

    `run`, a `Run`, takes steps until `state.step == until` in one dispatch, whatever their number;
    or until `stuck` steps in a row were skipped, if that is given. It returns a new state and sums
    over the steps. The old state is not donated, so that you can keep it, and the parameters in it,
    at the price of memory for a second one.
    `draw_batch(key, data)` gives a batch inside the compiled program and
    `objective(model, batch, key)` its loss, of a flow or of whatever is trained. `average` is the
    decay of the parameters' moving average, lower at first: min(average, (1 + step) / (10 + step)).
    With `fixed`, every step has the same batch and the same noise, as an optimiser with a line
    search (`optax.lbfgs`) needs, and the rate of the state is not heeded.

    An objective that solves is given `solve` if that is: `objective(model, batch, key,
    solve=solve)`, by forward mode where its adjoint is "forward". Each step's solve then takes the
    steps that the one before found to be right, by its `Stats.step_plan`, which is to be among the
    metrics; not so with `fixed`.

    An update whose loss or gradient is not finite, or whose solve failed, is not applied, and
    counted. `means(totals)` gives the means over the updates applied of the objective's metrics,
    of "loss" and "grad_norm", and the numbers of those that were not. Totals that are given are
    added to, so that how steps are grouped into dispatches does not change a bit of them.

    **Raises:** `ValueError` for what is no objective, no optimizer, or nothing to draw batches by,
    and for a `solve` that the objective does not take.
    """
    check_callable("a function of (model, batch, key), as jcnf.objectives has", objective=objective)
    check_callable("a function of (key, data), as draw_rows(64) is", draw_batch=draw_batch)
    if solve is not None:
        check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
        taken = inspect.signature(objective).parameters.values()
        if not any(p.name == "solve" or p.kind is p.VAR_KEYWORD for p in taken):
            raise ValueError("the objective solves nothing, or takes no solve: leave out solve=")
    check_number("[0, 1)", average=average)
    _check_optimizer(optimizer)
    _, static = partition(model)
    optimizer = optax.with_extra_args_support(optimizer)
    differentiate = by_reverse_mode if solve is None else differentiator(solve)

    def settings(state):
        if solve is None or fixed:
            return {} if solve is None else {"solve": solve}
        return {"solve": dataclasses.replace(solve, step_plan=state.step_plan)}

    @jax.jit  # so that the two uses below are one trace
    def one_step(state, data, key):
        check_key(key)
        batch_key, noise_key = jr.split(jr.fold_in(key, 0 if fixed else state.step))
        batch = sharding.split(draw_batch(batch_key, data))

        def loss_of(params):
            return objective(eqx.combine(params, static), batch, noise_key, **settings(state))

        def value_of(params):  # for a line search, which must not go where solves fail
            loss, metrics = loss_of(params)
            return jnp.where(metrics.get("failed", False), jnp.inf, loss)

        (loss, metrics), gradient = differentiate(loss_of)(state.params)
        metrics, failed, bad_loss = dict(metrics), jnp.asarray(False), ~jnp.isfinite(loss)
        step_plan = metrics.pop("step_plan", state.step_plan).astype(state.step_plan.dtype)
        if "failed" in metrics:
            failed = metrics.pop("failed")
            # Such a solve took many steps: there is no point in going back through them.
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
        return sharding.everywhere(after), Totals(
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

    return Run(jax.jit(run))
