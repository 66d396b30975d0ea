"""What is minimised: `objective(flow, x, key, ...) -> (loss, metrics)`, both scalars.

`metrics` has "failed", true when the loss is not to be trained upon. A new objective is one
function of that form; `functools.partial` binds its settings.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf.divergence import Divergence, Exact
from jcnf.flow import CNF, transform
from jcnf.regularizers import REGULARIZERS
from jcnf.solve import Solve


def likelihood(
    flow: CNF,
    x: Float[Array, "batch dim"],
    key: Key[Array, ""],
    *,
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    penalties: Mapping[str, float] | tuple[tuple[str, float], ...] = (),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean negative log-likelihood in nats, plus weighted penalties (FFJORD; RNODE, eq. 9).

    `penalties` maps names in `jcnf.regularizers.REGULARIZERS` to weights. `key` is consumed once,
    by a stochastic divergence only. The metrics are "nll", each penalty's mean, "nfe", "failed".
    """
    weights = dict(penalties)
    result = transform(
        flow,
        x,
        key=key,
        context=context,
        solve=solve,
        divergence=divergence,
        regularizers=tuple(REGULARIZERS[name] for name in weights),
    )
    nll = -jnp.mean(flow.base.log_prob(result.x) + result.logdet)
    means = {name: jnp.mean(value) for name, value in result.penalties.items()}
    loss = nll + sum(weights[name] * mean for name, mean in means.items())
    stats = {"nfe": result.stats.nfe, "failed": result.stats.failed}
    return loss, {"nll": nll, **means, **stats}
