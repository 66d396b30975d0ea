"""Density matching, through the solve: a flow learns a density that is known but for its scale."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf._checks import check_callable
from jcnf.divergence import Divergence, Exact
from jcnf.flows import Flow, check_batch, transform
from jcnf.objectives.likelihood import check_penalties, penalised
from jcnf.ode import Solve


def reverse_kl(
    flow: Flow,
    z: Float[Array, "batch dim"],
    key: Key[Array, ""] | None = None,
    *,
    energy: Callable[..., Float[Array, " batch"]],
    context: Float[Array, "batch context"] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    penalties: Mapping[Callable, float] = MappingProxyType({}),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean of log q(x) + U(x) in nats, x where base samples `z` are carried to, plus penalties.

    Without penalties that is an unbiased estimate of KL(q || p) - log Z, where p = exp(-U) / Z and
    Z is the integral of exp(-U) (Rezende & Mohamed 2015, section 6.1; Chen et al. 2018, section
    5.1). The batch is one of base samples, not of data, and log q(x) is base.log_prob(z) - logdet.

    `energy(x)`, or `energy(x, context)` where there is a context, maps a batch (batch, dim) to U in
    nats, (batch,). `penalties` maps regularizers, as in `jcnf.regularizers`, to their weights.
    `key` is consumed once, by a stochastic divergence only. The metrics are "reverse_kl", the mean
    without penalties, each penalty's mean by the name of its function, "nfe",
    "failed_rows", "failed" and "step_plan". Rows whose solve failed are left out of all means.

    **Raises:** `ValueError` as `jcnf.transform` does, and for energies of another shape.
    """
    check_penalties(penalties)
    check_callable("a function of x (batch, dim), as jcnf.data.energies has them", energy=energy)
    check_batch(flow, z, context)
    given = (z,) if context is None else (z, context)
    shape = jnp.shape(jax.eval_shape(energy, *given))
    if shape != z.shape[:1]:
        # A column would broadcast, and give a mean of nothing.
        raise ValueError(
            f"the energy must map x of shape {z.shape} to values of shape {z.shape[:1]}; got "
            f"{shape}: jax.vmap makes an energy of one point one of a batch"
        )
    result = transform(
        flow,
        z,
        direction="to_data",
        key=key,
        context=context,
        solve=solve,
        divergence=divergence,
        regularizers=tuple(penalties),
    )
    u = energy(result.x) if context is None else energy(result.x, context)
    kl = flow.base.log_prob(z) - result.logdet + u
    return penalised("reverse_kl", kl, penalties, result)
