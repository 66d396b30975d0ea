"""Penalties on a flow's path, each the rate of one integral carried by the same solve.

A regularizer is a function of one sample, `(t, x, velocity) -> rate >= 0`; its name is the name of
the penalty. The solve integrates rate * |dt|, so that penalties are positive whichever way time
runs. A new one is one function.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def kinetic(t: Float[Array, ""], x: Float[Array, " dim"], velocity: Float[Array, " dim"]):
    """1/2 |v|^2: straight, slow paths (RNODE, Finlay et al. 2020; OT-Flow,
    Onken et al. 2021, both up to the factor 1/2)."""
    return jnp.sum(velocity**2) / 2
