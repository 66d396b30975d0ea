"""What is minimised: `objective(flow, x, key, ...) -> (loss, metrics)`, both scalars.

`metrics` has "failed", true when the loss is not to be trained upon. A new objective is one
function of that form; `functools.partial` binds its settings.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf.divergence import Divergence, Exact
from jcnf.flow import CNF, transform
from jcnf.solve import Solve


def likelihood(
    flow: CNF,
    x: Float[Array, "batch dim"],
    key: Key[Array, ""],
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    penalties: Mapping[Callable, float] = MappingProxyType({}),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean negative log-likelihood in nats, plus weighted penalties (FFJORD; RNODE).

    `penalties` maps regularizers, as in `jcnf.regularizers`, to their weights. `key` is consumed
    once, by a stochastic divergence only. The metrics are "nll", each penalty's mean by the name
    of its function, "nfe" and "failed".

    **Raises:** `ValueError` as `jcnf.transform` does.
    """
    result = transform(
        flow,
        x,
        key=key,
        context=context,
        solve=solve,
        divergence=divergence,
        regularizers=tuple(penalties),
    )
    nll = -jnp.mean(flow.base.log_prob(result.x) + result.logdet)
    means = {name: jnp.mean(value) for name, value in result.penalties.items()}
    loss = nll + sum(weight * means[r.__name__] for r, weight in penalties.items())
    stats = {"nfe": result.stats.nfe, "failed": result.stats.failed}
    return loss, {"nll": nll, **means, **stats}
