"""Matrices laid out so that XLA's CPU compiler makes their gradients fast."""

import jax
from jax.experimental import jet
from jaxtyping import Array, Float

jet.deflinear(jax.lax.optimization_barrier_p)  # for which jax has no rule


def turned(matrix: Float[Array, "out in"]) -> Float[Array, "in out"]:
    """The transpose of a matrix, which XLA is kept from turning back.

    A gradient of x @ A is a product over the batch, of the shape of A: on CPU it takes two to three
    times as long where A's rows are shorter than its columns.
    """
    return jax.lax.optimization_barrier(matrix.T)
