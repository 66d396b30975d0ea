"""Log-densities of points, and points carried along the flow, in chunks."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_finite, check_int
from jcnf.divergence import Divergence, Exact
from jcnf.evaluate.chunks import solve_in_chunks
from jcnf.flows import (
    ODE,
    Direction,
    Flow,
    check_batch,
    check_direction,
    check_flow,
    check_strategy,
    check_times,
    solve_log_prob,
    solve_trajectory,
    solve_transform,
)
from jcnf.ode import Solve, unknown, with_array_tolerances

ACCURATE = Solve(rtol=1e-5, atol=1e-5, norm="worst")


class LogProbs(NamedTuple):
    """Log-densities of a set of points, and their cost."""

    log_prob: np.ndarray  # (n,) nats; NaN where the solve failed
    nfe: float  # mean over chunks; lower with many chunks, which share a step plan
    failed: np.ndarray  # (n,) points whose solve failed

    @property
    def failures(self) -> int:
        """Number of points whose solve failed."""
        return int(self.failed.sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats; NaN where any solve failed."""
        return float(-np.mean(self.log_prob))

    @property
    def stderr(self) -> float:
        """Standard error of `nll`, over the points whose solve did not fail, nats."""
        return standard_error(self.log_prob[~self.failed])


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean of independent values, or inf for fewer than 2."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf


def log_prob(
    flow: Flow,
    x: Float[Array, "n dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    chunk: int | None = None,
    enough: Callable[[int], bool] = lambda done: False,
) -> LogProbs:
    """Return the log-density of each point, in chunks of one compiled program.

    `key` is consumed once, and only by a stochastic divergence; the noise of a point does not
    depend on `chunk`. `enough(done)` is called after each chunk with the number of points done; if
    it returns true, the result leaves out the remaining points.

    **Raises:** `ValueError` as `jcnf.log_prob` does, and if `x` or `context` is not finite.
    """
    check_data(flow, x, context, solve, divergence)
    x = jnp.asarray(x)
    solve = with_array_tolerances(solve, x.dtype)
    divergence, noise = flow.with_noise(divergence, key, x)
    program = partial(_log_prob, flow, divergence)
    return LogProbs(*solve_in_chunks(program, solve, (x, context, noise), chunk, enough))


class Trajectories(NamedTuple):
    """Points carried along the flow."""

    x: np.ndarray  # (times, n, dim); NaN where the solve failed
    nfe: float  # as in `LogProbs`
    failed: np.ndarray  # (n,) points whose solve failed

    @property
    def failures(self) -> int:
        """Number of points whose solve failed."""
        return int(self.failed.sum())


def trajectory(
    flow: Flow[ODE],
    x: Float[Array, "n dim"],
    times: Float[Array, " times"],
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int | None = None,
) -> Trajectories:
    """Return the points at each of `times`, starting from `x` at `times[0]`, as `jcnf.trajectory`.

    No gradient is taken, so `solve.adjoint` does not matter.

    **Raises:** `ValueError` as `log_prob` does, and for bad times as `jcnf.trajectory` does.
    """
    check_data(flow, x, context, solve)
    x = jnp.asarray(x)
    check_times(times, len(x), jnp.result_type(x))
    solve = with_array_tolerances(_without_gradient(solve), x.dtype)
    if solve.step_plan is None:  # each chunk finds its own steps
        solve = dataclasses.replace(solve, step_plan=unknown(x.dtype))
    program = partial(_trajectory, flow, jnp.asarray(times, x.dtype))
    paths, nfe, failed = solve_in_chunks(program, solve, (x, context), chunk)
    return Trajectories(np.moveaxis(paths, 0, 1), nfe, failed)


def transform(
    flow: Flow,
    x: Float[Array, "n dim"],
    direction: Direction,
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int | None = None,
) -> Trajectories:
    """Return points as `x[0]` and where the flow carries them as `x[-1]`, without the log-det.

    **Raises:** `ValueError` as `log_prob` does, and for an unknown direction.
    """
    check_data(flow, x, context, solve)
    check_direction(direction)
    x = jnp.asarray(x)
    solve = with_array_tolerances(_without_gradient(solve), x.dtype)
    program = partial(_transform, flow, direction)
    end, nfe, failed = solve_in_chunks(program, solve, (x, context), chunk)
    return Trajectories(np.stack([np.asarray(x), end]), nfe, failed)


def sample(
    flow: Flow,
    key: Key[Array, ""],
    num_samples: int,
    *,
    context: Float[Array, "num_samples context"] | None = None,
    solve: Solve = ACCURATE,
) -> Trajectories:
    """Draw samples, `x[-1]`, from base samples, `x[0]`; consumes `key`."""
    check_flow(flow)
    z = flow.base.sample(key, num_samples)
    return transform(flow, z, "to_data", context=context, solve=solve)


def roundtrip_error(
    flow: Flow,
    x: Float[Array, "n dim"],
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int | None = None,
) -> float:
    """Return max |x - to_data(to_base(x))| over the points whose solve succeeds, in units of x.

    On a manifold, it is the largest distance between x and to_data(to_base(x)).
    """
    return roundtrip(flow, x, context=context, solve=solve, chunk=chunk)[0]


def roundtrip(flow: Flow, x, **settings) -> tuple[float, Trajectories]:
    """Return the `roundtrip_error` and the trajectories of the way back."""
    z = transform(flow, x, "to_base", **settings)
    # A point that did not reach the base starts back from the origin, and counts as failed.
    back = transform(flow, jnp.asarray(np.nan_to_num(z.x[-1])), "to_data", **settings)
    failed = z.failed | back.failed
    x, end = np.asarray(x)[~failed], back.x[-1][~failed]
    error, manifold = np.abs(end - x), flow.bijection.manifold
    if manifold is not None:
        error = np.asarray(jax.vmap(manifold.distance)(x, end))
    return float(np.max(error, initial=np.nan if failed.all() else 0.0)), back._replace(
        failed=failed
    )


def check_data(
    flow: Flow,
    x: Any,
    context: Any = None,
    solve: Solve = ACCURATE,
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
) -> None:
    """Raise `ValueError` for data a flow cannot be evaluated on: bad shapes, NaN or inf."""
    check_batch(flow, x, context)
    check_strategy(solve, divergence)
    check_finite(x=x, context=context)


def _without_gradient(solve):
    """Return `solve` with the steps of its solver, which the adjoint "reversible" replaces."""
    return dataclasses.replace(solve, adjoint="checkpoint")


# By default, accelerators multiply float32 matrices at lower precision.
full_precision = jax.default_matmul_precision("highest")


_log_prob = eqx.filter_jit(full_precision(solve_log_prob))
_transform = eqx.filter_jit(full_precision(solve_transform))


@eqx.filter_jit
@full_precision
def _trajectory(flow, times, solve, x, context):
    paths, stats = solve_trajectory(flow, x, times, context=context, solve=solve)
    return jnp.moveaxis(paths, 1, 0), stats


Nats = TypeVar("Nats", float, np.ndarray, Array)


def bits_per_dim(log_prob: Nats, dim: int, levels: int) -> Nats:
    """Return -(log_prob / dim - log levels) / log 2, in bits per dimension, elementwise.

    `log_prob` is in nats, of x = (pixel + u) / `levels` in [0, 1]^dim as `dequantize` makes it. The
    mean over u is an upper bound for -log2 P(pixels) / dim, the code length of the pixel values
    under the model P(pixels) given by the integral of the density over the pixels' cell (Theis, van
    den Oord and Bethge 2016, "A note on the evaluation of generative models", section 3.1). The
    uniform density on [0, 1]^dim gives log2 levels. If x = pixel + u was not divided by the number
    of levels, or for any other density in nats, `levels=1` converts the unit alone:
    -log_prob / (dim log 2).
    """
    check_int(dim=dim, levels=levels)
    return -(log_prob / dim - math.log(levels)) / math.log(2)
