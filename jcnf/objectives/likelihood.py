"""Maximum likelihood, through the ODE solve."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_key, check_number
from jcnf.divergence import Divergence, Exact
from jcnf.fields import TimeRescaling
from jcnf.flows import ODE, Flow, Transformed, ode_of, transform
from jcnf.objectives.base import Loss
from jcnf.ode import Solve, Stats

# Metric names of the objectives and of `jcnf.training.loop`: no regularizer may have one of them.
RESERVED = {"nll", "reverse_kl", "matching", "negative_elbo", "reconstruction", "kl"}
RESERVED |= {"nfe", "failed", "failed_rows", "step_plan", "loss", "grad_norm", "skipped"}
# Largest share of a batch's rows whose solve may fail. The loss leaves these rows out, so without a
# limit a flow could learn to make hard samples fail.
MAX_FAILED = 0.1


def likelihood(
    flow: Flow,
    x: Float[Array, "batch dim"],
    key: Key[Array, ""] | None,
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    regularizers: Mapping[Callable, float] = MappingProxyType({}),
    random_end_time: float = 0.0,
) -> Loss:
    """Mean negative log-likelihood in nats, plus weighted regularizers (FFJORD; RNODE).

    `regularizers` maps functions such as those in `jcnf.regularizers` to their weights. With
    `random_end_time` = b > 0, the base is not at time 0 but at a time drawn from (-b, b), once for
    the batch (STEER, Ghosh et al. 2020, where a solve ends at the base). `key` is consumed once,
    and only by a stochastic divergence or a random end time. The metrics are "nll", each
    regularizer's mean under the name of its function, "nfe", "failed_rows", "failed" and
    "step_plan". Rows whose solve failed are left out of all means.

    **Raises:** `ValueError` as `jcnf.transform` does, and if `random_end_time` is not in [0, t1).
    """
    check_regularizers(regularizers)
    if random_end_time:
        ode = ode_of(flow, "random_end_time")
        check_number(f"[0, {ode.t1})", random_end_time=random_end_time)
        if key is None:
            raise ValueError("random_end_time draws a time: pass key=jax.random.key(seed)")
        check_key(key)
        key, time_key = jr.split(key)
        start = jr.uniform(time_key, (), x.dtype, -random_end_time, random_end_time)
        rescaled = TimeRescaling(ode.field, rate=1 - start / ode.t1, start=start)
        flow = Flow(ODE(rescaled, ode.t1), flow.base)
    result = transform(
        flow,
        x,
        key=key,
        context=context,
        solve=solve,
        divergence=divergence,
        regularizers=tuple(regularizers),
    )
    nll = -(flow.base.log_prob(result.value) + result.logdet)
    return regularized("nll", nll, regularizers, result)


def check_regularizers(regularizers: Mapping[Callable, float]) -> None:
    """Raise `ValueError` unless all are functions with valid weights and no metric's name."""
    if not isinstance(regularizers, Mapping) or not all(
        hasattr(r, "__name__") for r in regularizers
    ):
        raise ValueError(
            "regularizers must map functions as in jcnf.regularizers to their weights, such as "
            f"{{kinetic: 0.01}}; got {regularizers}"
        )
    for regularizer, weight in regularizers.items():
        check_number("[0, inf)", **{f"the weight of {regularizer.__name__}": weight})
    taken = RESERVED & {r.__name__ for r in regularizers}
    if taken:
        raise ValueError(f"no regularizer may have a metric's name: rename {', '.join(taken)}")


def regularized(
    name: str,
    values: Float[Array, " batch"],
    regularizers: Mapping[Callable, float],
    result: Transformed,
) -> Loss:
    """Return the mean of `values` plus weighted regularizers, and the metrics.

    Means are over the rows whose solve did not fail.
    """
    means = {
        penalty: mean_of_solved(rows, result.stats) for penalty, rows in result.regularizers.items()
    }
    value = mean_of_solved(values, result.stats)
    loss = value + sum(weight * means[r.__name__] for r, weight in regularizers.items())
    return loss, {name: value, **means, **costs(result.stats)}


def mean_of_solved(values: Float[Array, " batch"], stats: Stats) -> Float[Array, ""]:
    """Return the mean over the rows whose solve did not fail, or 0 if all failed."""
    number = jnp.maximum(jnp.sum(~stats.failed), 1).astype(values.dtype)
    return jnp.sum(jnp.where(stats.failed, 0, values)) / number


def costs(stats: Stats) -> dict[str, Array]:
    """Return the metrics of a solve that `jcnf.training.loop` uses.

    They are "nfe", "step_plan", "failed_rows" (the number of failed rows, which the loss leaves
    out) and "failed": whether these are more than `MAX_FAILED` of the batch, too many to train on
    the others.
    """
    number = jnp.sum(stats.failed)
    return {
        "nfe": stats.nfe,
        "failed_rows": number,
        "failed": number > int(MAX_FAILED * stats.failed.size),
        "step_plan": stats.step_plan,
    }
