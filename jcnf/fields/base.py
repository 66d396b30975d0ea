"""The Jacobian dv/dx of any field by forward mode: its products, trace and Frobenius norm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK = 64


def jvps(
    field, t, x, context, tangents: Float[Array, "k dim"]
) -> tuple[Float[Array, " dim"], Float[Array, "k dim"]]:
    """Return v, and (dv/dx) e for each row e of `tangents`.

    This takes one jvp per row, and computes the velocity once.

    **Raises:** `ValueError` if the velocity does not have the shape of `x`.
    """

    def push(tangent):
        return jax.jvp(lambda x: field(t, x, context), (x,), (tangent,))

    v, images = jax.vmap(push, out_axes=(None, 0))(tangents)
    if v.shape != x.shape:
        raise ValueError(f"the field must give an array of shape {x.shape}; got {v.shape}")
    return v, images


def trace_and_frobenius(
    field, t, x, context, chunk: int = CHUNK
) -> tuple[Float[Array, " dim"], Float[Array, ""], Float[Array, ""]]:
    """Return v, tr(dv/dx) and |dv/dx|_F^2 of one sample, exactly, by `dim` products.

    In more than `chunk` dimensions, the products are computed `chunk` at a time and recomputed in
    reverse mode, so that memory does not grow with `dim`.
    """
    return summed_jvps(field, t, x, context, jnp.eye(x.shape[0], dtype=x.dtype), chunk)


def summed_jvps(
    field, t, x, context, directions: Float[Array, "k dim"], chunk: int = CHUNK
) -> tuple[Float[Array, " dim"], Float[Array, ""], Float[Array, ""]]:
    """Return v, and the sums over k of e_k' (dv/dx) e_k and |(dv/dx) e_k|^2.

    With more than `chunk` directions e_k, the products are computed `chunk` at a time and
    recomputed in reverse mode.
    """
    if len(directions) <= chunk:
        v, images = jvps(field, t, x, context, directions)
        return v, jnp.sum(directions * images), jnp.sum(images**2)

    @jax.checkpoint
    def one(direction):
        _, (image,) = jvps(field, t, x, context, direction[None])
        return direction @ image, image @ image

    diagonal, squares = jax.lax.map(one, directions, batch_size=chunk)
    return field(t, x, context), jnp.sum(diagonal), jnp.sum(squares)


def velocity_and_divergence(
    field, t: Float[Array, ""], x: Float[Array, " dim"], context=None
) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
    """Return v (dim,) and tr(dv/dx) of one sample, by the closed form if any, or forward mode."""
    if hasattr(field, "velocity_and_divergence"):
        return field.velocity_and_divergence(t, x, context)
    return trace_and_frobenius(field, t, x, context)[:2]
