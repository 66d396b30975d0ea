"""The training loop: one compiled program that runs any number of steps.

Data order and noise depend only on (key, step), so a run that is killed and resumed from a
checkpoint ends in the same state, bit for bit, as one that was not interrupted.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key, PyTree

from jcnf import sharding
from jcnf._checks import check_callable, check_instance, check_key, check_number
from jcnf.objectives import Objective
from jcnf.ode import Solve
from jcnf.training.batches import DrawBatch
from jcnf.training.reports import check_data, report
from jcnf.training.state import MetricSums, TrainState, check_optimizer, partition


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

    - `program`: the compiled `program(state, data, key, until, sums=None) -> (state, sums)` that
      `make_train_loop` builds. Call it directly to skip the checks and the reports, for example if
      you handle skipped updates yourself.
    """

    def __init__(self, program: jax.stages.Wrapped):
        self.program = program
        self._checked: list[weakref.ref] = []  # leaves of the last data, if immutable

    def compile(
        self, state: TrainState, data: Any, key: Key[Array, ""]
    ) -> tuple[jax.stages.Compiled, MetricSums]:
        """Compile `program` for such arguments; return it and the sums of no steps."""
        arguments = (state, data, key, 0)
        shapes = jax.eval_shape(self.program, *arguments)[1]
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return self.program.lower(*arguments, nothing).compile(), nothing

    def __call__(
        self,
        state: TrainState,
        data: Any,
        key: Key[Array, ""],
        until: int,
        sums: MetricSums | None = None,
    ) -> tuple[TrainState, MetricSums]:
        """Train until `state.step == until`; return the new state and sums over the steps.

        The call waits until the steps are done. The new sums are added to `sums` if given. `key` is
        not consumed: each step folds its number into it. If anything is traced (inside jit, vmap or
        grad), the call just runs `program`, without the reports.

        **Raises:** `ValueError` for data with NaN or inf, naming the first rows. `RuntimeError` if
        the call applied no update and either no earlier call did (a single skipped step is excused)
        or many updates in a row were skipped. Warns if some updates were skipped, and if samples
        were left out of the loss because their solve failed.
        """
        self._check(data)
        after, total = self.program(state, data, key, until, sums)
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((state, after, total))):
            own = total if sums is None else jax.tree.map(lambda a, b: a - b, total, sums)
            report(own, int(state.step), after, int(until))
        return after, total

    def _check(self, data):
        leaves = jax.tree.leaves(data)
        if len(leaves) == len(self._checked) and all(
            seen() is leaf for seen, leaf in zip(self._checked, leaves, strict=True)
        ):
            return
        check_data(data)
        # The contents of a NumPy array may change, so NumPy data are checked in every call.
        fixed = all(isinstance(leaf, jax.Array) for leaf in leaves)
        self._checked = [weakref.ref(leaf) for leaf in leaves] if fixed else []


def make_train_loop(
    model: PyTree,
    objective: Objective,
    draw_batch: DrawBatch,
    optimizer: optax.GradientTransformation,
    *,
    average: float = 0.999,
    solve: Solve | None = None,
    max_skips: int | None = None,
) -> TrainLoop:
    """Build a compiled training loop, `loop(state, data, key, until, sums=None)`.

    `loop` takes all steps until `state.step == until` in one dispatch, and returns a new state and
    sums over the steps. The old state is not donated: it stays valid, at the price of memory for
    two states.

    An update is skipped and counted if its solve failed or its loss or gradient is not finite.
    `means(sums)` gives the means, over the applied updates, of the objective's metrics, "loss" and
    "grad_norm", and the counts of skipped updates. New sums are added to `sums` if given, so that
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
      `Stats.step_plan` as "step_plan", the next step's solve follows it.
    - `max_skips`: if given, `loop` ends early after this many skipped steps in a row.

    **Returns:** a `TrainLoop`.

    **Raises:** `ValueError` if `objective` or `draw_batch` is not a function, if `optimizer` is not
    an optax optimizer, and if `average` is out of range. The loop raises it if the objective does
    not take the given `solve`.
    """
    check_callable(
        "a function of (model, batch, key), such as jcnf.objectives.likelihood", objective=objective
    )
    check_callable("a function of (key, data), such as draw_rows(64)", draw_batch=draw_batch)
    if solve is not None:
        check_instance(Solve, "a jcnf.Solve(...)", solve=solve)
    check_number("[0, 1)", average=average)
    check_optimizer(optimizer)
    _, static = partition(model)
    optimizer = optax.with_extra_args_support(optimizer)
    differentiate = by_reverse_mode if solve is None else differentiator(solve)

    def evaluated(params, batch, key, step_plan):
        model = eqx.combine(params, static)
        if solve is None:
            return _checked(objective(model, batch, key))
        try:
            planned = dataclasses.replace(solve, step_plan=step_plan)
            return _checked(objective(model, batch, key, solve=planned))
        except TypeError as error:
            if "unexpected keyword argument 'solve'" not in str(error):
                raise
            raise ValueError(
                "solve must be None for an objective that takes no solve argument: leave out solve="
            ) from error

    @jax.jit  # traced only once for the two uses below
    def one_step(state, data, key):
        check_key(key)
        batch_key, noise_key = jr.split(jr.fold_in(key, state.step))
        batch = sharding.shard(draw_batch(batch_key, data))

        def loss_of(params):
            return evaluated(params, batch, noise_key, state.step_plan)

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

    def run(state, data, key, until, sums=None):
        if sums is None:
            _, shapes = jax.eval_shape(one_step, state, data, key)
            sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def more(carry):
            state, _ = carry
            going = state.step < until
            return going if max_skips is None else going & (state.stuck < max_skips)

        def body(carry):
            state, sums = carry
            state, step = one_step(state, data, key)
            return state, jax.tree.map(jnp.add, sums, step)

        return jax.lax.while_loop(more, body, (state, sums))

    return TrainLoop(jax.jit(run))


def _checked(result):
    """Return the result of an objective if it is a scalar loss and a dict of scalar metrics."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise ValueError(
            "objective must return a pair (loss, metrics), metrics being a dict, perhaps empty; "
            f"got a {type(result).__name__}"
        )
    loss, metrics = result
    numbers = {"the loss": loss} | {repr(n): metrics[n] for n in metrics if n != "step_plan"}
    for name, number in numbers.items():
        if jnp.shape(number) != ():
            raise ValueError(
                f"objective must return scalars; got {name} of shape {jnp.shape(number)}: "
                "take the mean over the batch"
            )
    return result
