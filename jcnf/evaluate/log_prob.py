"""Log-densities of points, and points carried along the flow."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_finite, check_int
from jcnf.divergence import Divergence, Drawn, Exact
from jcnf.evaluate.chunks import in_chunks, solved_in_chunks
from jcnf.flows import (
    CNF,
    Direction,
    Flow,
    check_batch,
    check_direction,
    check_flow,
    check_strategy,
    check_times,
    compiled,
    solve_trajectory,
    transform,
)
from jcnf.ode import Solve, with_array_tolerances

ACCURATE = Solve(rtol=1e-5, atol=1e-5, norm="worst")


class Scores(NamedTuple):
    """Log-densities of a set of points, and what they cost."""

    log_prob: np.ndarray  # (n,) nats; NaN where the solve failed
    nfe: float  # mean over chunks; many of them share a step plan, which takes fewer
    failed: np.ndarray  # (n,) points whose solve failed

    @property
    def failures(self) -> int:
        """Points whose solve failed."""
        return int(self.failed.sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats; NaN where any solve failed."""
        return float(-np.mean(self.log_prob))

    @property
    def stderr(self) -> float:
        """Its standard error over the points that arrived, nats."""
        return standard_error(self.log_prob[~self.failed])


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values; infinite for fewer than 2."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.inf


def score(
    flow: Flow,
    x: Float[Array, "n dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    chunk: int | None = None,
    enough: Callable[[int], bool] = lambda done: False,
) -> Scores:
    """Log-density of each point, in chunks of one compiled program.

    `key` is consumed once, by a stochastic divergence only; the noise of a point does not depend
    on `chunk`. `enough(done)` is asked after each chunk, with the number of points that are done;
    where it is true, the points that follow are left out of what is returned.

    **Raises:** `ValueError` as `jcnf.log_prob` does, and for `x` or `context` that is not finite.
    """
    check_data(flow, x, context, solve, divergence)
    x = jnp.asarray(x)
    solve = with_array_tolerances(solve, x.dtype)
    noise = flow.draw_noise(divergence, key, len(x), x.shape[1], x.dtype)
    strategy = divergence.strategy if isinstance(divergence, Drawn) else divergence

    def program(solve, x, context, noise):
        return _score(flow, x, context, solve, Drawn(strategy, noise))

    rows = x, context, noise
    return Scores(*solved_in_chunks(program, solve, rows, len(x), chunk, enough))


class Transport(NamedTuple):
    """Points carried along the flow."""

    x: np.ndarray  # (times, n, dim); NaN where the solve failed
    nfe: float  # as of `Scores`
    failed: np.ndarray  # (n,) points whose solve failed

    @property
    def failures(self) -> int:
        """Points whose solve failed."""
        return int(self.failed.sum())


def transport(
    flow: CNF,
    x: Float[Array, "n dim"],
    times: Float[Array, " times"],
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int | None = None,
) -> Transport:
    """Points at each of `times`, from where they are at `times[0]`; as `jcnf.trajectory`.

    No gradient is taken: `solve.adjoint` does not matter.

    **Raises:** `ValueError` as `score` does, and for times as `jcnf.trajectory` does.
    """
    check_data(flow, x, context, solve)
    x = jnp.asarray(x)
    check_times(times, len(x), jnp.result_type(x))
    solve = with_array_tolerances(_without_gradient(solve), x.dtype)
    times = jnp.asarray(times, jnp.result_type(x))

    def program(x, context):
        return _transport(flow, x, times, context, solve)

    paths, nfe, failed = in_chunks(program, (x, context), len(x), chunk)
    return Transport(np.moveaxis(paths, 0, 1), nfe, failed)


def carry(
    flow: Flow,
    x: Float[Array, "n dim"],
    direction: Direction,
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int | None = None,
) -> Transport:
    """Points and where the flow carries them, at `x[0]` and `x[-1]`: no log-det is computed.

    **Raises:** `ValueError` as `score` does, and for an unknown direction.
    """
    check_data(flow, x, context, solve)
    check_direction(direction)
    x = jnp.asarray(x)
    solve = with_array_tolerances(_without_gradient(solve), x.dtype)

    def program(solve, x, context):
        return _carry(flow, x, direction, context, solve)

    end, nfe, failed = solved_in_chunks(program, solve, (x, context), len(x), chunk)
    return Transport(np.stack([np.asarray(x), end]), nfe, failed)


def draw(
    flow: Flow,
    key: Key[Array, ""],
    num_samples: int,
    *,
    context: Float[Array, "num_samples context"] | None = None,
    solve: Solve = ACCURATE,
) -> Transport:
    """Samples at `x[-1]` and the base draws they came from at `x[0]`; consumes `key`."""
    check_flow(flow)
    z = flow.base.sample(key, num_samples)
    return carry(flow, z, "to_data", context=context, solve=solve)


def roundtrip_error(
    flow: Flow,
    x: Float[Array, "n dim"],
    *,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    chunk: int | None = None,
) -> float:
    """max |x - to_data(to_base(x))| over the points that arrive, in the units of `x`."""
    return roundtrip(flow, x, context=context, solve=solve, chunk=chunk)[0]


def roundtrip(flow: Flow, x, **settings) -> tuple[float, Transport]:
    """`roundtrip_error`, and the way back."""
    z = carry(flow, x, "to_base", **settings)
    # What did not get there starts back from the origin, and counts as failed.
    back = carry(flow, jnp.asarray(np.nan_to_num(z.x[-1])), "to_data", **settings)
    failed = z.failed | back.failed
    error = np.abs(back.x[-1] - np.asarray(x))[~failed]
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
    """Raise `ValueError` for what a flow cannot be measured by: NaN, besides bad shapes."""
    check_batch(flow, x, context)
    check_strategy(solve, divergence)
    check_finite(x=x, context=context)


def _without_gradient(solve):
    """By the solver itself where the adjoint is "reversible"."""
    return dataclasses.replace(solve, adjoint="checkpoint")


# Accelerators multiply float32 matrices with fewer digits unless told otherwise.
full_precision = jax.default_matmul_precision("highest")


@compiled
@full_precision
def _score(flow, x, context, solve, divergence):
    result = transform(flow, x, context=context, solve=solve, divergence=divergence)
    return flow.base.log_prob(result.x) + result.logdet, result.stats


@compiled
@full_precision
def _carry(flow, x, direction, context, solve):
    return flow.carry(x, direction, context, solve)


@compiled
@full_precision
def _transport(flow, x, times, context, solve):
    paths, stats = solve_trajectory(flow, x, times, context=context, solve=solve)
    return jnp.moveaxis(paths, 1, 0), stats


Nats = TypeVar("Nats", float, np.ndarray, Array)


def bits_per_dim(log_prob: Nats, dim: int, levels: int) -> Nats:
    """-(log_prob / dim - log levels) / log 2, in bits a dimension; elementwise.

    `log_prob` is in nats, of x = (pixel + u) / `levels` in [0, 1]^dim as `dequantise` makes it. In
    its mean over u this is an upper bound of -log2 P(pixels) / dim, the length of a code for the
    grey values under the model P(pixels) that the density's integral over the pixels' cell is
    (Theis, van den Oord and Bethge 2016, "A note on the evaluation of generative models",
    section 3.1). The uniform density on [0, 1]^dim gives log2 levels.
    """
    check_int(dim=dim, levels=levels)
    return -(log_prob / dim - math.log(levels)) / math.log(2)
