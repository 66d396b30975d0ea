"""Networks that shorten data before a posterior is given them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key


class SetEmbedding(eqx.Module):
    """Features of a set of observations (m, size), the same for any order of them.

    One network is applied to each observation, and another to the mean of what it returns (Zaheer
    et al. 2017, "Deep Sets"). Use it for several independent observations of one theta: simulate
    `m` of them for each theta, x (n, m, size), and pass
    `embedding=lambda key: SetEmbedding(size, key=key)`.

    **Arguments:**

    - `size`: the number of entries of one observation.
    - `features`: the number of features that are returned.
    - `width`: the width of the two networks.
    - `key`: consumed once, for the weights.
    """

    each: eqx.nn.MLP
    together: eqx.nn.MLP

    def __init__(self, size: int, features: int = 16, width: int = 64, *, key: Key[Array, ""]):
        check_int(size=size, features=features, width=width)
        check_key(key)
        first, second = jr.split(key)
        self.each = eqx.nn.MLP(size, width, width, 2, activation=jax.nn.silu, key=first)
        self.together = eqx.nn.MLP(width, features, width, 1, activation=jax.nn.silu, key=second)

    def __call__(self, x: Float[Array, "m size"]) -> Float[Array, " features"]:
        """Return the features of a set."""
        return self.together(jnp.mean(jax.vmap(self.each)(x), axis=0))
