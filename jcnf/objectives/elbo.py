"""Evidence lower bound (ELBO) of a variational autoencoder, through its posterior's ODE solve."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_key
from jcnf.divergence import Divergence, Exact
from jcnf.flows.vae import VAE, weigh
from jcnf.objectives.base import Loss
from jcnf.objectives.likelihood import check_regularizers, mean_of_solved, regularized
from jcnf.ode import Solve


def elbo(
    model: VAE,
    x: Float[Array, "batch data"],
    key: Key[Array, ""],
    *,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    regularizers: Mapping[Callable, float] = MappingProxyType({}),
) -> Loss:
    """Mean of log q(z | x) - log p(z) - log p(x | z) in nats, with one z ~ q(z | x) for each x.

    Without regularizers this is an unbiased estimate of the negative ELBO (Kingma & Welling 2014,
    eq. 3; with a flow, Rezende & Mohamed 2015, eq. 15). `regularizers` maps functions such as those
    in `jcnf.regularizers` to their weights. `key` is consumed once, split between z and the
    divergence's noise. The metrics are "negative_elbo", its two parts "reconstruction" (the mean of
    -log p(x | z)) and "kl", each regularizer's mean under the name of its function, "nfe",
    "failed_rows", "failed" and "step_plan". Rows whose solve failed are left out of all means.

    **Raises:** `ValueError` as `jcnf.flows.vae.weigh` does.
    """
    check_regularizers(regularizers)
    check_key(key)
    eps_key, noise_key = jr.split(key)
    weighed = weigh(
        model,
        x,
        model.posterior.base.sample(eps_key, x.shape[0], x.dtype),
        key=noise_key,
        solve=solve,
        divergence=divergence,
        regularizers=tuple(regularizers),
    )
    loss, metrics = regularized("negative_elbo", -weighed.log_weight, regularizers, weighed.carried)
    stats = weighed.carried.stats
    parts = {
        "reconstruction": -mean_of_solved(weighed.log_likelihood, stats),
        "kl": mean_of_solved(weighed.log_ratio, stats),
    }
    return loss, metrics | parts
