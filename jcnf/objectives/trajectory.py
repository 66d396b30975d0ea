"""Neural ODEs: trajectories fitted to observations, on windows of a series."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Key

from jcnf._checks import check_instance, check_int, check_number
from jcnf.fields import Field
from jcnf.flows import ODE, Flow, solve_trajectory
from jcnf.objectives.base import Loss
from jcnf.objectives.likelihood import costs
from jcnf.ode import Solve


class Windows(NamedTuple):
    """Windows of a series, each with its times; shorter ones repeat their last row."""

    times: Float[Array, "times batch"]
    values: Float[Array, "times batch dim"]
    observed: Bool[Array, "times batch"]  # false for repeated rows and for the start
    batch_axis = 1  # for `jcnf.sharding.shard`


def trajectory_fit(
    field: Flow[ODE] | Field,
    windows: Windows,
    key: Key[Array, ""] | None = None,
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
) -> Loss:
    """Mean squared error of trajectories from each window's first row (Chen et al. 2018).

    The mean is over the `observed` rows and their components, in squared units of the values; a
    window of n rows has n - 1 of them, because its start is given. `field` is as in
    `jcnf.trajectory`. `key` is not consumed. The metrics are "rmse" (the square root of the loss),
    "nfe", "failed_rows", "failed" and "step_plan". Windows whose solve failed are left out.

    **Raises:** `ValueError` as `jcnf.trajectory` does.
    """
    check_instance(
        Windows, "a Windows(times, values, observed), as from sample_windows", windows=windows
    )
    times, values, observed = windows
    if not values.shape[:2] == times.shape == observed.shape or observed.dtype != bool:
        raise ValueError(
            "expected times and bool observed of shape (times, batch), and values of shape "
            f"(times, batch, dim); got times {times.shape}, {observed.dtype} observed "
            f"{observed.shape} and values {values.shape}"
        )
    xs, stats = solve_trajectory(field, values[0], times, context=context, solve=solve)
    squares = jnp.mean((xs - values) ** 2, axis=2)
    observed &= ~stats.failed[None]
    number = jnp.maximum(jnp.sum(observed), 1).astype(xs.dtype)
    loss = jnp.sum(jnp.where(observed, squares, 0)) / number
    return loss, {"rmse": jnp.sqrt(loss), **costs(stats)}


def sample_windows(
    num: int | None, *, shortest: float, longest: float, rows: int = 32
) -> Callable[[Key[Array, ""], tuple[Array, Array]], Windows]:
    """Return a `draw_batch(key, (times, values))` that draws `num` random windows of a series.

    The series is times (n,) and values (n, dim). A window starts at a random row other than the
    last. Its length is uniform between `shortest` and `longest`, in units of the times. Its other
    rows are those that follow within this length, and at least the next one; if there are more than
    `rows` - 1, that many of them at random. `num` None gives all n - 1 windows of length `longest`,
    with the first rows of each, and consumes no key.

    **Raises:** `ValueError` if `num` is below 1, `rows` is below 2, or not 0 < `shortest` <=
    `longest` < inf; from `draw_batch`, for a series of fewer than 2 rows.
    """
    if num is not None:
        check_int(num=num)
    check_int(2, rows=rows)
    check_number("(0, inf)", shortest=shortest, longest=longest)
    if shortest > longest:
        raise ValueError(f"expected shortest <= longest; got {shortest} and {longest}")

    def window(times, values, start, length, order):
        """Return one window, of the eligible rows that are lowest in `order` (n,)."""
        n = len(times)
        place = jnp.arange(n)
        inside = (place > start) & (times <= times[start] + length) | (place == start + 1)
        chosen = jnp.argsort(jnp.where(inside, order, jnp.inf))[: rows - 1]
        chosen = jnp.sort(jnp.where(inside[chosen], chosen, n))
        observed = chosen < n
        # Row 0 never follows a start, so 0 is a safe filler in the search for the last row.
        last = jnp.max(jnp.where(observed, chosen, 0))
        chosen = jnp.concatenate([start[None], jnp.where(observed, chosen, last)])
        return Windows(
            times[chosen], values[chosen], jnp.concatenate([jnp.zeros(1, bool), observed])
        )

    def draw(key, data):
        times, values = data
        n = len(times)
        if n < 2 or len(values) != n:
            raise ValueError(
                f"expected a series of at least 2 times and as many values; got {n} times and "
                f"{len(values)} values"
            )
        if num is None:
            start, length = jnp.arange(n - 1), jnp.full(n - 1, longest, times.dtype)
            order = jnp.broadcast_to(jnp.arange(n, dtype=times.dtype), (n - 1, n))
        else:
            keys = jr.split(key, 3)
            start = jr.randint(keys[0], (num,), 0, n - 1)
            length = jr.uniform(keys[1], (num,), times.dtype, shortest, longest)
            order = jr.uniform(keys[2], (num, n), times.dtype)
        return jax.vmap(window, (None, None, 0, 0, 0), 1)(times, values, start, length, order)

    return draw
