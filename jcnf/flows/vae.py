"""Variational autoencoders whose approximate posterior is a flow (Kingma & Welling 2014).

The posterior q(z | x) is a flow of z whose context is x, so `jcnf.log_prob`, `jcnf.sample` and
`jcnf.evaluate` work on it as on any other flow. `Posterior` is a Gaussian, optionally transformed
by a bijection (Rezende & Mohamed 2015; an ODE, Grathwohl et al. 2019, section 4.3).
`jcnf.objectives.elbo` trains the whole model, and `jcnf.evaluate.elbo` measures it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf._checks import check_callable, check_instance, check_int, check_key
from jcnf.distributions import StandardNormal
from jcnf.divergence import Divergence, Exact
from jcnf.flows.base import Bijection, Flow, Transformed
from jcnf.flows.functional import transform
from jcnf.flows.multiscale import Identity
from jcnf.ode import Solve


class Encoded(NamedTuple):
    """The output of an encoder."""

    loc: Float[Array, "*batch dim"]
    log_scale: Float[Array, "*batch dim"]
    features: Float[Array, "*batch features"]  # context of `Posterior.refine`


class Encoder(eqx.Module):
    """An encoder of one sample, x -> features -> mean and log-scale, both affine in the features.

    **Arguments:**

    - `trunk`: a function x -> features (features,), such as an `eqx.nn.MLP`.
    - `features`, `dim`: sizes of the features and of z.
    - `key`: consumed once, for the initial weights of the affine map.
    """

    trunk: Callable
    head: eqx.nn.Linear

    def __init__(self, trunk: Callable, features: int, dim: int, *, key: Key[Array, ""]):
        check_callable("a function x -> features of one sample", trunk=trunk)
        check_int(features=features, dim=dim)
        check_key(key)
        self.trunk = trunk
        self.head = eqx.nn.Linear(features, 2 * dim, key=key)

    def __call__(self, x: Float[Array, " data"]) -> Encoded:
        """Return the mean and log-scale of z, (dim,) each, and the features."""
        features = self.trunk(x)
        loc, log_scale = jnp.split(self.head(features), 2)
        return Encoded(loc, log_scale, features)


def Posterior(
    encoder: Callable, dim: int, refine: Bijection | None = None
) -> Flow["Reparameterized"]:
    """Return q(z | x): z = loc(x) + scale(x) * e, where `refine` carries eps ~ N(0, I) to e.

    The context of this flow is x, and the context of `refine` is the encoder's features of x.
    `refine` works in the units of the Gaussian, so
    log q(z | x) = log N(eps; 0, I) - logdet_refine - sum log scale(x), and q is that Gaussian as
    long as `refine` is the identity.

    **Arguments:**

    - `encoder`: a function x -> `Encoded` of one sample.
    - `dim`: dimension of z.
    - `refine`: a conditional `jcnf.flows.Bijection` of the same dimension, such as
      `jcnf.flows.ODE(field)`; None for the identity, whose regularizers are 0.

    **Raises:** `ValueError`, when used, without a context, for an encoder of another `dim`, or if
    the number of features is not what `refine` takes.
    """
    return Flow(
        Reparameterized(encoder, Identity() if refine is None else refine), StandardNormal(dim)
    )


class Reparameterized(Bijection):
    """The bijection of `Posterior`, forward from eps to z."""

    encoder: Callable
    refine: Bijection

    def __check_init__(self):
        check_callable("a function x -> Encoded of one sample", encoder=self.encoder)
        hint = "a bijection, such as jcnf.flows.ODE(field)"
        check_instance(Bijection, hint, refine=self.refine)

    @property
    def context_dim(self) -> None:
        """Always None: only the encoder knows the size of x."""
        return None

    def forward(self, x, context, solve):
        loc, log_scale, features = self._encode(context, x)
        e, stats = self.refine.forward(x, features, solve)
        return loc + jnp.exp(log_scale) * e, stats

    def inverse(self, x, context, solve):
        loc, log_scale, features = self._encode(context, x)
        return self.refine.inverse((x - loc) / jnp.exp(log_scale), features, solve)

    def forward_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        loc, log_scale, features = self._encode(context, x)
        end = self.refine.forward_and_log_det(x, features, solve, divergence, noise, regularizers)
        z, logdet = loc + jnp.exp(log_scale) * end.value, jnp.sum(log_scale, axis=1)
        return end._replace(value=z, logdet=end.logdet + logdet)

    def inverse_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        loc, log_scale, features = self._encode(context, x)
        e = (x - loc) / jnp.exp(log_scale)
        end = self.refine.inverse_and_log_det(e, features, solve, divergence, noise, regularizers)
        return end._replace(logdet=end.logdet - jnp.sum(log_scale, axis=1))

    def draw_noise(self, divergence, key, batch, dim, dtype):
        """Return the noise of `refine`."""
        return self.refine.draw_noise(divergence, key, batch, dim, dtype)

    def _encode(self, x, z) -> Encoded:
        if x is None:
            raise ValueError("the posterior q(z | x) needs x: pass context=x, (batch, context)")
        encoded, shape = jax.vmap(self.encoder)(x), z.shape
        if encoded.loc.shape != shape or encoded.log_scale.shape != shape:
            raise ValueError(
                f"the encoder must give a mean and a log-scale of shape {shape[1:]}; got "
                f"{encoded.loc.shape[1:]} and {encoded.log_scale.shape[1:]}"
            )
        size = self.refine.context_dim
        if size and encoded.features.shape != (x.shape[0], size):
            raise ValueError(
                f"the encoder must give {size} features, the context of refine; got "
                f"{encoded.features.shape[1:]}"
            )
        return encoded


class VAE(eqx.Module):
    """The model p(x, z) = N(z; 0, I) p(x | z) and its approximate posterior. It is a plain pytree.

    **Arguments:**

    - `posterior`: q(z | x), a flow of z whose context is x: `Posterior` or any other.
    - `decoder`: a function z (dim,) -> parameters of p(x | z) of one sample.
    - `likelihood`: a function (x, parameters) -> log p(x | z) of one sample, a scalar in nats:
      `Binomial` or any hashable function.
    """

    posterior: Flow
    decoder: Callable
    likelihood: Callable[[Any, Any], Float[Array, ""]] = eqx.field(static=True)

    @property
    def prior(self) -> StandardNormal:
        """The prior p(z) = N(0, I)."""
        return StandardNormal(self.posterior.dim)


@dataclasses.dataclass(frozen=True)
class Binomial:
    """Components k/n in [0, 1]: k of n trials succeed, each with probability sigmoid(logit).

    With n = 1 it is the Bernoulli distribution of binary images.
    """

    trials: int

    def __post_init__(self):
        check_int(trials=self.trials)

    def __call__(self, x: Float[Array, "*shape"], logits: Float[Array, "*shape"]) -> Array:
        """Return log p(x) in nats, summed over the components."""
        if x.shape != logits.shape:
            raise ValueError(
                f"expected a logit for each component; got logits of shape {logits.shape} for x of "
                f"shape {x.shape}"
            )
        n = jnp.asarray(self.trials, x.dtype)
        k, lgamma = n * x, jax.scipy.special.gammaln
        ways = lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
        return jnp.sum(ways + k * logits - n * jax.nn.softplus(logits))


class Weighed(NamedTuple):
    """One sample z ~ q(z | x) for each x, with the terms of its log-weight, (batch,) in nats."""

    log_likelihood: Float[Array, " batch"]  # log p(x | z)
    log_ratio: Float[Array, " batch"]  # log q(z | x) - log p(z), whose mean is their KL
    carried: Transformed  # from eps to z; z is carried.value

    @property
    def log_weight(self) -> Float[Array, " batch"]:
        """The log-weight log p(x, z) - log q(z | x), whose mean is the ELBO."""
        return self.log_likelihood - self.log_ratio


def weigh(
    model: VAE,
    x: Float[Array, "batch data"],
    eps: Float[Array, "batch dim"],
    *,
    key: Key[Array, ""] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    regularizers: tuple[Callable, ...] = (),
) -> Weighed:
    """Carry noise `eps` of the posterior's base to z, and weigh it: log p(x, z) - log q(z | x).

    Here log q(z | x) = base.log_prob(eps) - logdet, with the logdet from eps to z. A solve that
    fails does not raise; it is flagged in `carried.stats.failed`. `key` is consumed once, by a
    stochastic divergence only.

    **Raises:** the errors of `jcnf.transform`, and `ValueError` for integer x or log-likelihoods
    that are not of shape (batch,).
    """
    check_instance(VAE, "a jcnf.flows.vae.VAE", model=model)
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            f"expected x of a floating dtype; got {jnp.result_type(x)}: cast it and scale it to "
            "the units of the likelihood"
        )
    posterior = model.posterior
    carried = transform(
        posterior,
        eps,
        direction="to_data",
        key=key,
        context=x,
        solve=solve,
        divergence=divergence,
        regularizers=regularizers,
    )
    log_q = posterior.base.log_prob(eps) - carried.logdet
    # NaN in the decoder's input would be NaN in the gradient of its parameters.
    z = jnp.where(carried.stats.failed[:, None], 0, carried.value)
    log_likelihood = jax.vmap(lambda x, z: model.likelihood(x, model.decoder(z)))(x, z)
    if log_likelihood.shape != log_q.shape:
        # One value per component might broadcast, and the result would pass for a bound.
        raise ValueError(
            f"the likelihood must give a scalar for each sample; got {log_likelihood.shape[1:]}"
        )
    log_likelihood = jnp.where(carried.stats.failed, jnp.nan, log_likelihood)
    return Weighed(log_likelihood, log_q - model.prior.log_prob(carried.value), carried)
