"""Density matching, through the ODE solve: learn a density known up to a constant factor."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf._checks import check_callable
from jcnf.divergence import Divergence, Exact
from jcnf.flows import Flow, check_batch, transform
from jcnf.objectives.base import Loss
from jcnf.objectives.likelihood import check_regularizers, regularized
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
    regularizers: Mapping[Callable, float] = MappingProxyType({}),
) -> Loss:
    """Mean of log q(x) + U(x) in nats, with x the image of base samples `z`, plus regularizers.

    Without regularizers this is an unbiased estimate of KL(q || p) - log Z, where p = exp(-U) / Z
    and Z is the integral of exp(-U) (Rezende & Mohamed 2015, section 6.1; Chen et al. 2018, section
    5.1). The batch holds base samples, not data, and log q(x) is base.log_prob(z) - logdet.

    `energy(x)`, or `energy(x, context)` if there is a context, maps x (batch, dim) to U in nats,
    (batch,). `regularizers` maps functions such as those in `jcnf.regularizers` to their weights.
    `key` is consumed once, and only by a stochastic divergence. The metrics are "reverse_kl" (the
    mean without regularizers), each regularizer's mean under the name of its function, "nfe",
    "failed_rows", "failed" and "step_plan". Rows whose solve failed are left out of all means.

    **Raises:** `ValueError` as `jcnf.transform` does, and if the energies have another shape.
    """
    check_regularizers(regularizers)
    check_callable("a function of x (batch, dim), as in jcnf.data.energies", energy=energy)
    check_batch(flow, z, context)
    given = (z,) if context is None else (z, context)
    shape = jnp.shape(jax.eval_shape(energy, *given))
    if shape != z.shape[:1]:
        # A column (batch, 1) would broadcast to (batch, batch), whose mean is meaningless.
        raise ValueError(
            f"energy must map x of shape {z.shape} to values of shape {z.shape[:1]}; got "
            f"{shape}: wrap an energy of one point in jax.vmap"
        )
    result = transform(
        flow,
        z,
        direction="to_data",
        key=key,
        context=context,
        solve=solve,
        divergence=divergence,
        regularizers=tuple(regularizers),
    )
    u = energy(result.value) if context is None else energy(result.value, context)
    kl = flow.base.log_prob(z) - result.logdet + u
    return regularized("reverse_kl", kl, regularizers, result)
