"""Maximum likelihood, through the solve."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_key, check_number
from jcnf.divergence import Divergence, Exact
from jcnf.fields import TimeChange
from jcnf.flows import CNF, Flow, Transformed, transform
from jcnf.ode import Solve, Stats

# Names of metrics, of objectives and of `jcnf.training.loop`.
RESERVED = {"nll", "reverse_kl", "matching", "negative_elbo", "reconstruction", "kl"}
RESERVED |= {"nfe", "failed", "failed_rows", "step_plan", "loss", "grad_norm", "skipped"}
# Share of a batch's rows whose solve may fail. The loss is over the others, and a flow could learn
# to make hard samples fail.
MAX_FAILED = 0.1


def likelihood(
    flow: Flow,
    x: Float[Array, "batch dim"],
    key: Key[Array, ""] | None,
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    penalties: Mapping[Callable, float] = MappingProxyType({}),
    steer: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean negative log-likelihood in nats, plus weighted penalties (FFJORD; RNODE).

    `penalties` maps regularizers, as in `jcnf.regularizers`, to their weights. With `steer` = b > 0
    the base is at a time drawn from (-b, b), one for the batch, in place of 0 (STEER, Ghosh et al.
    2020, whose end is the base's). `key` is consumed once, by a stochastic divergence and by
    `steer` only. The metrics are "nll", each penalty's mean by the name of its function, "nfe",
    "failed_rows", "failed" and "step_plan". Rows whose solve failed are left out of all means.

    **Raises:** `ValueError` as `jcnf.transform` does, and for a `steer` not in [0, t1).
    """
    check_penalties(penalties)
    if steer:
        if not isinstance(flow, CNF):
            raise ValueError("steer moves the end time of a CNF; this flow has none")
        check_number(f"[0, {flow.t1})", steer=steer)
        if key is None:
            raise ValueError("steer draws a time: it needs a key, jax.random.key(seed)")
        check_key(key)
        key, steer_key = jr.split(key)
        start = jr.uniform(steer_key, (), x.dtype, -steer, steer)
        steered = TimeChange(flow.field, rate=1 - start / flow.t1, start=start)
        flow = eqx.tree_at(lambda flow: flow.field, flow, steered)
    result = transform(
        flow,
        x,
        key=key,
        context=context,
        solve=solve,
        divergence=divergence,
        regularizers=tuple(penalties),
    )
    nll = -(flow.base.log_prob(result.x) + result.logdet)
    return penalised("nll", nll, penalties, result)


def check_penalties(penalties: Mapping[Callable, float]) -> None:
    """Raise `ValueError` for what is no penalty, bad weights, and names that metrics have."""
    if not isinstance(penalties, Mapping) or not all(hasattr(r, "__name__") for r in penalties):
        raise ValueError(
            "penalties must be functions as in jcnf.regularizers, each with its weight, as in "
            f"{{kinetic: 0.01}}; got {penalties}"
        )
    for regularizer, weight in penalties.items():
        check_number("[0, inf)", **{f"the weight of {regularizer.__name__}": weight})
    taken = RESERVED & {r.__name__ for r in penalties}
    if taken:
        raise ValueError(f"no penalty may have the name of a metric: rename {', '.join(taken)}")


def penalised(
    name: str,
    values: Float[Array, " batch"],
    penalties: Mapping[Callable, float],
    result: Transformed,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the mean of `values` plus weighted penalties, and the metrics: these and the solve's.

    Means are over the rows whose solve did not fail.
    """
    means = {
        penalty: mean_of_solved(rows, result.stats) for penalty, rows in result.penalties.items()
    }
    value = mean_of_solved(values, result.stats)
    loss = value + sum(weight * means[r.__name__] for r, weight in penalties.items())
    return loss, {name: value, **means, **costs(result.stats)}


def mean_of_solved(values: Float[Array, " batch"], stats: Stats) -> Float[Array, ""]:
    """Return the mean over the rows whose solve did not fail, 0 where all did."""
    number = jnp.maximum(jnp.sum(~stats.failed), 1).astype(values.dtype)
    return jnp.sum(jnp.where(stats.failed, 0, values)) / number


def costs(stats: Stats) -> dict[str, Array]:
    """Return what `jcnf.training.loop` is told of a solve.

    "nfe", "step_plan", "failed_rows" (how many rows failed, which have left the loss) and "failed":
    whether they are more than `MAX_FAILED` of the batch, too many to train on the rest.
    """
    number = jnp.sum(stats.failed)
    return {
        "nfe": stats.nfe,
        "failed_rows": number,
        "failed": number > int(MAX_FAILED * stats.failed.size),
        "step_plan": stats.step_plan,
    }
