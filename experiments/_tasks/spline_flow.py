"""A neural spline flow of flowjax, trained by likelihood, as a peer of our flows.

Rational-quadratic splines (Durkan et al. 2019, arXiv:1906.04032) under masked autoregressive
networks (Papamakarios et al. 2017, arXiv:1705.07057), as the package builds them. Training is as
favorable as for our flows: standardized data, a moving average of the parameters, a learning rate
with a cosine decay to zero at the end of the budget, and any number of steps in one dispatch.
"""

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float

from jcnf._checks import InputError
from jcnf.training import DrawBatch

_DISPATCHES = 20  # of a run; a validation follows each
_CHUNK = 1024  # points that log_prob takes at once


@dataclasses.dataclass(frozen=True)
class SplineFlow:
    """A trained flow and the cost of training it."""

    log_prob: Callable[[Float[Array, "batch dim"]], Float[np.ndarray, " batch"]]  # nats, data units
    parameters: int
    steps: int
    seconds: float  # of training, without compilation and validation


def train_spline_flow(
    draw_batch: DrawBatch,
    data: Any,
    *,
    seconds: float,
    seed: int = 0,
    val: Float[Array, "val dim"] | None = None,
    layers: int = 5,
    width: int = 128,
    knots: int = 8,
    interval: float = 5.0,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.0,
    clip: float = 5.0,
    average: float = 0.999,
) -> SplineFlow:
    """Train a spline flow for `seconds` by maximum likelihood on batches `draw_batch(key, data)`.

    The optimizer is Adam with clipping by the global norm. The learning rate follows a cosine to
    zero at the step where the budget will be spent, which is estimated from the time of the steps
    beforehand and after each dispatch. Therefore each point on a curve of quality against seconds
    takes its own run.

    **Arguments:**

    - `draw_batch`: returns a batch (batch, dim) inside the compiled program.
    - `data`: the data to draw from, resident on the device; None if it needs none.
    - `seconds`: budget of training time.
    - `seed`: seed of the weights and batches.
    - `val`: rows to validate on. The parameters of the best of 20 validations, which are dense
      early on, are returned; without these rows, the last parameters are.
    - `layers`: number of autoregressive transforms; in between, the order of columns is reversed or
      permuted.
    - `width`: width of the two hidden layers of each network.
    - `knots`: inner knots of each spline.
    - `interval`: half width of the splines, in standard deviations; beyond it they are the
      identity.
    - `learning_rate`: learning rate at the start.
    - `weight_decay`: decoupled weight decay of all parameters.
    - `clip`: gradient norm above which gradients are scaled down.
    - `average`: decay of the moving average of the parameters, which is evaluated; lower at first,
      as in `jcnf.training.make_train_loop`.

    **Raises:** `InputError` if flowjax is not installed or a column is constant.
    """
    weight_key, batch_key, moment_key = jr.split(jr.key(seed), 3)
    sample = jnp.concatenate([draw_batch(k, data) for k in jr.split(moment_key, 64)])
    mean, std = jnp.mean(sample, axis=0), jnp.std(sample, axis=0)
    if not np.all(std > 0):
        raise InputError(f"column {int(np.argmin(std)) + 1} is constant: remove it")
    flow, unwrap = _make_flow(weight_key, sample.shape[1], layers, width, knots, interval)
    params, static = eqx.partition(flow, eqx.is_inexact_array)
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay),
    )

    def log_prob_of(params, x):
        z = (x - mean) / std
        return unwrap(eqx.combine(params, static)).log_prob(z) - jnp.sum(jnp.log(std))

    @jax.jit
    def evaluate(params, x):
        return jax.lax.map(lambda x: log_prob_of(params, x), x, batch_size=_CHUNK)

    def nll(params, x):
        return -float(jnp.mean(evaluate(params, x)))

    @jax.jit
    def run(state, data, until, total):
        def one_step(state):
            params, mean_params, opt_state, step = state
            batch = draw_batch(jr.fold_in(batch_key, step), data)
            grads = jax.grad(lambda p: -jnp.mean(log_prob_of(p, batch)))(params)
            good = jnp.isfinite(optax.global_norm(grads))
            updates, new_opt_state = optimizer.update(grads, opt_state, params)
            rate = learning_rate * 0.5 * (1 + jnp.cos(math.pi * step / total))
            new_params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            decay = jnp.minimum(average, (1 + step) / (10 + step))
            new_mean = optax.incremental_update(new_params, mean_params, 1 - decay)
            new, old = (new_params, new_mean, new_opt_state), (params, mean_params, opt_state)
            return *jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old), step + 1

        return jax.lax.while_loop(lambda state: state[-1] < until, one_step, state)

    def timed(state, until, total):
        tic = time.perf_counter()
        state = jax.block_until_ready(run(state, data, until, total))
        return state, time.perf_counter() - tic

    start = (params, params, optimizer.init(params), jnp.zeros((), jnp.int32))
    warm, _ = timed(start, 2, 1000)
    step_seconds = timed(warm, 22, 1000)[1] / 20

    state, best, spent, step, lowest = start, params, 0.0, 0, math.inf
    for part in range(1, _DISPATCHES + 1):
        total = step + max(1, round((seconds - spent) / step_seconds))
        step = max(step, round(total * (part / _DISPATCHES) ** 2))
        state, elapsed = timed(state, step, total)
        spent += elapsed
        step_seconds = spent / step if step else step_seconds
        found = -math.inf if val is None else nll(state[1], val)
        if found < lowest or val is None:
            best, lowest = state[1], found
    num_parameters = sum(p.size for p in jax.tree.leaves(params))
    return SplineFlow(lambda x: np.asarray(evaluate(best, x)), num_parameters, step, spent)


def require_flowjax() -> None:
    """Raise `InputError` if flowjax is not installed."""
    if importlib.util.find_spec("flowjax") is None:
        raise InputError(
            "the spline flow needs flowjax: pip install -c constraints.txt -e '.[peers]'"
        )


def _make_flow(key, dim, layers, width, knots, interval):
    """Return the untrained flow and the function that applies its masks and constraints."""
    require_flowjax()
    import paramax  # pyright: ignore[reportMissingImports]
    from flowjax import (  # pyright: ignore[reportMissingImports]
        bijections,
        distributions,
        flows,
    )

    flow = flows.masked_autoregressive_flow(
        key,
        base_dist=distributions.Normal(jnp.zeros(dim)),
        transformer=bijections.RationalQuadraticSpline(knots=knots, interval=interval),
        flow_layers=layers,
        nn_width=width,
        nn_depth=2,
    )
    return flow, paramax.unwrap
