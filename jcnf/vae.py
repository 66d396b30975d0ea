"""Variational autoencoders whose approximate posterior is a flow (Kingma & Welling 2014).

The posterior q(z | x) is a flow of z whose context is x, so that `jcnf.log_prob`, `jcnf.sample` and
`jcnf.evaluate` serve it as any other. `Posterior` is a Gaussian, or what another flow makes of it
(Rezende & Mohamed 2015; by a CNF, Grathwohl et al. 2019, section 4.3). `jcnf.objectives.elbo`
trains the whole, `jcnf.evaluate.bounds` measures it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf.distributions import Base, StandardNormal
from jcnf.divergence import Divergence, Exact
from jcnf.flow import Direction, Flow, Transformed, transform
from jcnf.solve import Solve, Stats


class Encoded(NamedTuple):
    """What an encoder makes of x."""

    loc: Float[Array, "*batch dim"]
    log_scale: Float[Array, "*batch dim"]
    features: Float[Array, "*batch features"]  # the context of a flow that refines the Gaussian


class Encoder(eqx.Module):
    """x -> features -> mean and log-scale, both affine in the features. Written for one sample.

    **Arguments:**

    - `trunk`: x -> features (features,), as an `eqx.nn.MLP`.
    - `features`, `dim`: sizes of the features and of z.
    - `key`: consumed once, for the initial weights of the affine map.
    """

    trunk: Callable
    head: eqx.nn.Linear

    def __init__(self, trunk: Callable, features: int, dim: int, *, key: Key[Array, ""]):
        self.trunk = trunk
        self.head = eqx.nn.Linear(features, 2 * dim, key=key)

    def __call__(self, x: Float[Array, "..."]) -> Encoded:
        """The mean and log-scale of z, (dim,) each, and the features."""
        features = self.trunk(x)
        loc, log_scale = jnp.split(self.head(features), 2)
        return Encoded(loc, log_scale, features)


class Posterior(Flow):
    """q(z | x): z = loc(x) + scale(x) * e, with e ~ N(0, I) carried by `flow` given features(x).

    Its context is x. The flow works in the units of the Gaussian, e, so that log q(z | x) =
    log N(eps; 0, I) - logdet_flow - sum log scale(x); without it e is eps, and q is
    N(loc, diag scale^2). A flow that starts at rest starts from that Gaussian.

    **Arguments:**

    - `encoder`: x -> `Encoded`, of one sample.
    - `dim`: dimension of z.
    - `flow`: a conditional flow with a standard normal base of that `dim`, whose context are the
      features; None for the Gaussian. The penalties of that are 0.

    **Raises:** `ValueError` for a flow of another dimension or base; when used, without a context.
    """

    encoder: Callable
    flow: Flow | None
    base: Base

    def __init__(self, encoder: Callable, dim: int, flow: Flow | None = None):
        if flow is not None and (flow.base.dim != dim or not isinstance(flow.base, StandardNormal)):
            raise ValueError(
                f"the flow must have the base StandardNormal({dim}); got "
                f"{type(flow.base).__name__} of dim {flow.base.dim}"
            )
        self.encoder, self.flow, self.base = encoder, flow, StandardNormal(dim)

    @property
    def context_dim(self) -> None:
        """None: the encoder knows the size of x."""
        return None

    def carry(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
    ) -> tuple[Float[Array, "batch dim"], Stats]:
        """From eps to z ("to_data") or back, without the log-det."""
        loc, log_scale, features = self._encode(context)
        scale = jnp.exp(log_scale)
        if direction == "to_base":
            x = (x - loc) / scale
        end, stats = (
            (x, _at_rest(x))
            if self.flow is None
            else self.flow.carry(x, direction, features, solve)
        )
        return (end if direction == "to_base" else loc + scale * end), stats

    def carry_with_logdet(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        key: Key[Array, ""] | None,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
        divergence: Divergence,
        regularizers: tuple[Callable, ...],
    ) -> Transformed:
        """From eps to z ("to_data") or back, with the log-det and the flow's penalties."""
        loc, log_scale, features = self._encode(context)
        scale, logdet = jnp.exp(log_scale), jnp.sum(log_scale, axis=1)
        if direction == "to_base":
            x = (x - loc) / scale
        if self.flow is None:
            zeros = jnp.zeros(x.shape[0], x.dtype)
            still = {r.__name__: zeros for r in regularizers}
            result = Transformed(x, zeros, still, _at_rest(x))
        else:
            result = transform(
                self.flow,
                x,
                direction=direction,
                key=key,
                context=features,
                solve=solve,
                divergence=divergence,
                regularizers=regularizers,
            )
        if direction == "to_base":
            return result._replace(logdet=result.logdet - logdet)
        return result._replace(x=loc + scale * result.x, logdet=result.logdet + logdet)

    def _encode(self, x) -> Encoded:
        if x is None:
            raise ValueError("the posterior is of z given x: pass context=x, (batch, ...)")
        encoded = jax.vmap(self.encoder)(x)
        shape = (x.shape[0], self.base.dim)
        if encoded.loc.shape != shape or encoded.log_scale.shape != shape:
            raise ValueError(
                f"the encoder must give a mean and a log-scale of shape {shape[1:]}; got "
                f"{encoded.loc.shape[1:]} and {encoded.log_scale.shape[1:]}"
            )
        return encoded


def _at_rest(x):
    zero = jnp.int32(0)
    failed = ~jnp.all(jnp.isfinite(x), axis=1)
    return Stats(nfe=zero, steps=zero, rejected=zero, failed=failed)


class VAE(eqx.Module):
    """p(x, z) = N(z; 0, I) p(x | z), and the posterior that goes with it. A pytree, nothing more.

    **Arguments:**

    - `posterior`: q(z | x), a flow of z whose context is x: `Posterior`, or any other.
    - `decoder`: z (dim,) -> parameters of p(x | z), of one sample.
    - `likelihood`: x, parameters -> log p(x | z) in nats, a scalar, of one sample: `Binomial`, or
      any hashable function.
    """

    posterior: Flow
    decoder: Callable
    likelihood: Callable[[Any, Any], Float[Array, ""]] = eqx.field(static=True)

    @property
    def prior(self) -> StandardNormal:
        """p(z), N(0, I)."""
        return StandardNormal(self.posterior.base.dim)


@dataclasses.dataclass(frozen=True)
class Binomial:
    """Components k/n in [0, 1], each the share of n trials that succeed with p = sigmoid(logit).

    With n = 1 it is the Bernoulli distribution of binary pictures.
    """

    trials: int

    def __post_init__(self):
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1; got {self.trials}")

    def __call__(self, x: Float[Array, "*shape"], logits: Float[Array, "*shape"]) -> Array:
        """log p(x) in nats, summed over the components."""
        n = jnp.asarray(self.trials, x.dtype)
        k, lgamma = n * x, jax.scipy.special.gammaln
        ways = lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
        return jnp.sum(ways + k * logits - n * jax.nn.softplus(logits))


class Weighed(NamedTuple):
    """One sample z ~ q(z | x) for each x, and what it weighs; (batch,) nats."""

    log_likelihood: Float[Array, " batch"]  # log p(x | z)
    log_ratio: Float[Array, " batch"]  # log q(z | x) - log p(z), whose mean is their KL
    carried: Transformed  # from eps to z, which is carried.x

    @property
    def log_weight(self) -> Float[Array, " batch"]:
        """log p(x, z) - log q(z | x), whose mean is the ELBO."""
        return self.log_likelihood - self.log_ratio


def weigh(
    model: VAE,
    x: Float[Array, "batch ..."],
    eps: Float[Array, "batch dim"],
    *,
    key: Key[Array, ""] | None = None,
    solve: Solve = Solve(),  # noqa: B008 (frozen)
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    regularizers: tuple[Callable, ...] = (),
) -> Weighed:
    """Carry noise `eps` of the posterior's base to z, and weigh it: log p(x, z) - log q(z | x).

    log q(z | x) is base.log_prob(eps) - logdet, from eps to z. It never raises for a solve that
    fails, which is `carried.stats.failed`. `key` is consumed once, by a stochastic divergence only.

    **Raises:** `ValueError` as `jcnf.transform` does, for integers x, and for log-likelihoods of
    another shape than (batch,).
    """
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
    log_likelihood = jax.vmap(lambda x, z: model.likelihood(x, model.decoder(z)))(x, carried.x)
    if log_likelihood.shape != log_q.shape:
        # One value a component might broadcast, and give a bound of nothing.
        raise ValueError(
            f"the likelihood must give a scalar for each sample; got {log_likelihood.shape[1:]}"
        )
    return Weighed(log_likelihood, log_q - model.prior.log_prob(carried.x), carried)
