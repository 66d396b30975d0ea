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
from jcnf.distributions import BaseDistribution, StandardNormal
from jcnf.divergence import Divergence, Exact
from jcnf.flows.base import Bijection, Direction, Flow, Transformed
from jcnf.flows.functional import transform
from jcnf.ode import Solve, Stats


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


class Posterior(Flow):
    """q(z | x): z = loc(x) + scale(x) * e, where `refine` carries eps ~ N(0, I) to e.

    The context of this flow is x, and the context of `refine` is the encoder's features of x.
    `refine` works in the units of the Gaussian, so
    log q(z | x) = log N(eps; 0, I) - logdet_refine - sum log scale(x), and q is that Gaussian as
    long as `refine` is the identity. Without `refine`, e is eps.

    **Arguments:**

    - `encoder`: a function x -> `Encoded` of one sample.
    - `dim`: dimension of z.
    - `refine`: a conditional `jcnf.flows.Bijection` of the same dimension, such as
      `jcnf.flows.ODE(field)`; None for N(loc, diag scale^2), whose regularizers are 0.

    **Raises:** `ValueError`, when used, without a context, for an encoder of another `dim`, or if
    the number of features is not what `refine` takes.
    """

    encoder: Callable
    refine: Bijection | None
    base: BaseDistribution

    def __init__(self, encoder: Callable, dim: int, refine: Bijection | None = None):
        check_callable("a function x -> Encoded of one sample", encoder=encoder)
        if refine is not None:
            check_instance(Bijection, "a bijection, such as jcnf.flows.ODE(field)", refine=refine)
        self.encoder, self.refine, self.base = encoder, refine, StandardNormal(dim)

    @property
    def context_dim(self) -> None:
        """Always None: only the encoder knows the size of x."""
        return None

    def transform(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
    ) -> tuple[Float[Array, "batch dim"], Stats]:
        """Carry eps to z ("to_data") or back, without the log-det."""
        loc, log_scale, features = self._encode(context)
        scale = jnp.exp(log_scale)
        end = (x - loc) / scale if direction == "to_base" else x
        stats = Stats.unsolved(end)
        if self.refine is not None:
            end, stats = self.refine.transform(end, direction, features, solve)
        return (end if direction == "to_base" else loc + scale * end), stats

    def transform_and_log_det(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        key: Key[Array, ""] | None,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
        divergence: Divergence,
        regularizers: tuple[Callable, ...],
    ) -> Transformed:
        """Carry eps to z ("to_data") or back, with the log-det and `refine`'s regularizers."""
        loc, log_scale, features = self._encode(context)
        scale, logdet = jnp.exp(log_scale), jnp.sum(log_scale, axis=1)
        e = (x - loc) / scale if direction == "to_base" else x
        zeros = jnp.zeros_like(logdet)
        none = {r.__name__: zeros for r in regularizers}
        end = Transformed(e, zeros, none, Stats.unsolved(e))
        if self.refine is not None:
            end = self.refine.transform_and_log_det(
                e, direction, key, features, solve, divergence, regularizers
            )
        if direction == "to_base":
            return end._replace(logdet=end.logdet - logdet)
        return end._replace(x=loc + scale * end.x, logdet=end.logdet + logdet)

    def draw_noise(
        self, divergence: Divergence, key: Key[Array, ""] | None, batch: int, dim: int, dtype
    ) -> Any:
        """Return the noise of `refine`; None without it."""
        if self.refine is None:
            return None
        return self.refine.draw_noise(divergence, key, batch, dim, dtype)

    def _encode(self, x) -> Encoded:
        if x is None:
            raise ValueError("the posterior q(z | x) needs x: pass context=x, (batch, context)")
        encoded = jax.vmap(self.encoder)(x)
        shape = (x.shape[0], self.base.dim)
        if encoded.loc.shape != shape or encoded.log_scale.shape != shape:
            raise ValueError(
                f"the encoder must give a mean and a log-scale of shape {shape[1:]}; got "
                f"{encoded.loc.shape[1:]} and {encoded.log_scale.shape[1:]}"
            )
        size = None if self.refine is None else self.refine.context_dim
        if size is not None and encoded.features.shape != (x.shape[0], size):
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
        return StandardNormal(self.posterior.base.dim)


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
    carried: Transformed  # from eps to z; z is carried.x

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
    z = jnp.where(carried.stats.failed[:, None], 0, carried.x)
    log_likelihood = jax.vmap(lambda x, z: model.likelihood(x, model.decoder(z)))(x, z)
    if log_likelihood.shape != log_q.shape:
        # One value per component might broadcast, and the result would pass for a bound.
        raise ValueError(
            f"the likelihood must give a scalar for each sample; got {log_likelihood.shape[1:]}"
        )
    log_likelihood = jnp.where(carried.stats.failed, jnp.nan, log_likelihood)
    return Weighed(log_likelihood, log_q - model.prior.log_prob(carried.x), carried)
