"""Bounds on the evidence log p(x) of a variational autoencoder."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_finite, check_instance, check_int, check_key
from jcnf.evaluate.chunks import solve_in_chunks
from jcnf.evaluate.log_prob import ACCURATE, full_precision
from jcnf.flows.vae import VAE, weigh
from jcnf.ode import Solve

CHUNK = 1000


class ELBOSamples(NamedTuple):
    """Weights of samples z ~ q(z | x) for each x; NaN where a solve failed."""

    log_likelihood: np.ndarray  # log p(x | z), (n, samples) nats
    log_ratio: np.ndarray  # log q(z | x) - log p(z), (n, samples) nats
    mean: np.ndarray  # mean of the samples z, (n, dim)
    nfe: float  # mean over chunks
    failed: np.ndarray  # (n,) whether any solve of this x failed

    @property
    def elbo(self) -> np.ndarray:
        """Mean of log p(x, z) - log q(z | x) over all samples, (n,) nats."""
        return np.mean(self.log_likelihood - self.log_ratio, axis=1)

    def iwae(self, k: int) -> np.ndarray:
        """Return E log mean_k exp(log p(x, z) - log q(z | x)), (n,) nats.

        This importance-weighted bound (Burda et al. 2016, eq. 8) rises with k from the ELBO at
        k = 1 to log p(x). It is averaged over as many groups of `k` samples as there are.

        **Raises:** `ValueError` if `k` is not from 1 to the number of samples.
        """
        n, samples = self.log_ratio.shape
        check_int(1, samples, k=k)
        groups = samples // k
        weights = np.asarray(self.log_likelihood - self.log_ratio, np.float64)
        weights = weights[:, : groups * k].reshape(n, groups, k)
        top = np.max(weights, axis=2, keepdims=True)
        return np.mean(np.log(np.mean(np.exp(weights - top), axis=2)) + top[:, :, 0], axis=1)


def elbo(
    model: VAE,
    x: Float[Array, "n data"],
    key: Key[Array, ""],
    *,
    samples: int = 64,
    solve: Solve = ACCURATE,
    chunk: int = CHUNK,
) -> ELBOSamples:
    """Compute the ELBO and importance-weighted bounds of each x, by samples of the posterior.

    The divergence is exact. One sample of each x is solved after another, in chunks of one compiled
    program. `key` is consumed once; the noise of an x depends on the key and on the row of x, not
    on `chunk` or the model, so models can be compared with the same noise.

    **Raises:** `ValueError` if `x` is empty or not finite, if `samples` is below 1, and as
    `jcnf.flows.vae.weigh` does.
    """
    check_instance(VAE, "a jcnf.flows.vae.VAE", model=model)
    check_int(samples=samples)
    check_key(key)
    if jnp.ndim(x) != 2 or not len(x):
        raise ValueError(f"expected x of shape (n, data), n at least 1; got {jnp.shape(x)}")
    check_finite(x=x)
    x = jnp.asarray(x)
    program, rows = partial(_weigh_all, model, samples), (x, jr.split(key, len(x)))
    values, nfe, failed = solve_in_chunks(program, solve, rows, chunk)
    log_likelihood, log_ratio, mean = np.split(values, [samples, 2 * samples], axis=1)
    return ELBOSamples(log_likelihood, log_ratio, mean, nfe, failed)


@eqx.filter_jit
@full_precision
def _weigh_all(model, samples, solve, x, keys):
    base = model.posterior.base

    def one(number):
        def draw(key):
            return base.sample(jr.fold_in(key, number), 1, x.dtype)[0]

        weighed = weigh(model, x, jax.vmap(draw)(keys), solve=solve)
        return weighed._replace(carried=weighed.carried.value), weighed.carried.stats

    weighed, stats = jax.lax.map(one, jnp.arange(samples))
    values = [weighed.log_likelihood.T, weighed.log_ratio.T, jnp.mean(weighed.carried, axis=0)]
    return jnp.concatenate(values, axis=1), stats.over_draws()
