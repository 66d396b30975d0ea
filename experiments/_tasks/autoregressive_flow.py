"""Masked autoregressive flows of flowjax, trained by likelihood, as peers of our flows.

Masked networks give the parameters of a transformer of each column: an affine map (MAF,
Papamakarios et al. 2017, arXiv:1705.07057) or a rational-quadratic spline (neural spline flow,
Durkan et al. 2019, arXiv:1906.04032), as the package builds them. `jcnf.fit` trains them as it does
our flows, on standardized data, at a learning rate with a cosine decay to zero.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from experiments._runner.stages import Stage, step_seconds
from jcnf import training
from jcnf._checks import InputError

LAYERS, WIDTH = 5, 128  # autoregressive transforms, and width of the two hidden layers of each
KNOTS, HALF_WIDTH = 8, 5.0  # of each spline, in standard deviations; beyond, it is the identity
LEARNING_RATE, CLIP, AVERAGE = 2e-3, 5.0, 0.999
VALIDATIONS = 20
TIMED_STEPS = 20
CHUNK = 1024  # points that log_prob takes at once

Transformer = Literal["spline", "affine"]


@dataclasses.dataclass(frozen=True)
class AutoregressiveFlow:
    """A trained flow and the cost of training it."""

    log_prob: Callable[[Float[Array, "batch dim"]], Float[np.ndarray, " batch"]]  # nats, data units
    parameters: int
    steps: int
    seconds: float  # of training, without compilation and validation


def train_autoregressive_flow(
    draw_batch: training.DrawBatch,
    data: Any,
    *,
    transformer: Transformer,
    seconds: float,
    seed: int = 0,
    val: Float[Array, "val dim"] | None = None,
) -> AutoregressiveFlow:
    """Train a masked autoregressive flow for about `seconds` by maximum likelihood.

    The learning rate reaches zero at the step where the budget will be spent, by the time of a
    first few steps. Therefore each point on a curve of quality against seconds takes its own run.

    **Arguments:**

    - `draw_batch`: `draw_batch(key, data)` returns a batch (batch, dim).
    - `data`: the data to draw from; None if it needs none.
    - `transformer`: the map of each column, "spline" or "affine".
    - `seconds`: budget of training time.
    - `seed`: seed of the weights and batches.
    - `val`: rows to validate on. The parameters of the best of 20 validations are returned; without
      these rows, the last parameters are.

    **Raises:** `InputError` if flowjax is not installed or a column is constant.
    """
    weight_key, fit_key, moment_key = jr.split(jr.key(seed), 3)
    sample = jnp.concatenate([draw_batch(k, data) for k in jr.split(moment_key, 64)])
    mean, std = jnp.mean(sample, axis=0), jnp.std(sample, axis=0)
    if not np.all(std > 0):
        raise InputError(f"column {int(np.argmin(std)) + 1} is constant: remove it")
    flow, unwrap = _make_flow(weight_key, sample.shape[1], transformer)

    def log_prob_of(flow, x):
        return unwrap(flow).log_prob((x - mean) / std) - jnp.sum(jnp.log(std))

    @jax.jit
    def evaluated(params, x):
        trained = training.with_params(flow, params)
        return jax.lax.map(lambda x: log_prob_of(trained, x), x, batch_size=CHUNK)

    def log_prob(flow, x):
        return np.asarray(evaluated(training.partition(flow)[0], x))

    def stage(steps):
        return Stage(
            lambda flow, x, _: (-jnp.mean(log_prob_of(flow, x)), {}),
            steps,
            training.make_optimizer(LEARNING_RATE, steps, clip=CLIP),
            solve=None,
            average=AVERAGE,
            batch=None,
        )

    def make_draw(_):
        return draw_batch

    step = step_seconds(flow, stage(TIMED_STEPS), make_draw, TIMED_STEPS, data)
    steps = max(1, round(seconds / step))
    result = stage(steps).fit(
        flow,
        make_draw,
        data,
        fit_key,
        every=max(1, steps // VALIDATIONS),
        validation=None if val is None else lambda flow: -float(np.mean(log_prob(flow, val))),
        progress=False,
    )
    num_parameters = sum(p.size for p in jax.tree.leaves(training.partition(flow)[0]))
    spent = result.snapshot.seconds
    return AutoregressiveFlow(lambda x: log_prob(result.flow, x), num_parameters, steps, spent)


def require_flowjax() -> None:
    """Raise `InputError` if flowjax is not installed."""
    if importlib.util.find_spec("flowjax") is None:
        raise InputError(
            "masked autoregressive flows need flowjax: pip install -c constraints.txt "
            "-e '.[peers]', or leave them out"
        )


def _make_flow(key, dim, transformer: Transformer):
    """Return the untrained flow and the function that applies its masks and constraints."""
    require_flowjax()
    import paramax  # pyright: ignore[reportMissingImports]
    from flowjax import (  # pyright: ignore[reportMissingImports]
        bijections,
        distributions,
        flows,
    )

    spline = bijections.RationalQuadraticSpline(knots=KNOTS, interval=HALF_WIDTH)
    flow = flows.masked_autoregressive_flow(
        key,
        base_dist=distributions.Normal(jnp.zeros(dim)),
        transformer=spline if transformer == "spline" else None,  # affine by default
        flow_layers=LAYERS,
        nn_width=WIDTH,
        nn_depth=2,
    )
    return flow, paramax.unwrap
