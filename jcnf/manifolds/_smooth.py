"""Functions of lengths and angles whose values and derivatives are finite at 0.

Sums of products are written out in this room: by default, accelerators multiply float32 matrices at
lower precision, which would take points off their manifold.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def dot(a: Float[Array, " k"], b: Float[Array, " k"]) -> Float[Array, ""]:
    """Return the inner product."""
    return jnp.sum(a * b)


def norm(v: Float[Array, " k"]) -> Float[Array, ""]:
    """Return |v|, with the gradient 0 at v = 0."""
    square = dot(v, v)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def sinc(square: Float[Array, ""]) -> Float[Array, ""]:
    """Return sin(a) / a from a^2."""
    small, s = square < 1e-2, square
    a = jnp.sqrt(jnp.where(small, 1, square))
    series = 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72)))
    return jnp.where(small, series, jnp.sin(a) / a)


def cos(square: Float[Array, ""]) -> Float[Array, ""]:
    """Return cos(a) = 1 - 2 sin(a/2)^2 from a^2."""
    return 1 - square / 2 * sinc(square / 4) ** 2


def angle_over_sine(square: Float[Array, ""], cosine: Float[Array, ""]) -> Float[Array, ""]:
    """Return a / sin(a) from sin(a)^2 and cos(a), for a in [0, pi)."""
    small, s = (square < 1e-3) & (cosine > 0), square
    sine = jnp.sqrt(jnp.where(small, 1, square))
    series = 1 + s * (1 / 6 + s * (3 / 40 + s * (5 / 112 + s * (35 / 1152))))
    return jnp.where(small, series, jnp.arctan2(sine, cosine) / sine)
