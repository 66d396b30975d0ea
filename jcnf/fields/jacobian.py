"""The Jacobian dv/dx of any field by forward mode: products with it, its trace, its norm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHUNK = 64


def products(
    field, t, x, context, tangents: Float[Array, "k dim"]
) -> tuple[Float[Array, " dim"], Float[Array, "k dim"]]:
    """v, and (dv/dx) e for each row e of `tangents`: one jvp a row, the velocity computed once."""

    def push(tangent):
        return jax.jvp(lambda x: field(t, x, context), (x,), (tangent,))

    return jax.vmap(push, out_axes=(None, 0))(tangents)


def trace_and_square(
    field, t, x, context, chunk: int = CHUNK
) -> tuple[Float[Array, " dim"], Float[Array, ""], Float[Array, ""]]:
    """v, tr(dv/dx) and |dv/dx|_F^2 of one sample, exactly, by `dim` products.

    Beyond `chunk` dimensions they are taken so many at a time and recomputed in reverse mode, so
    that memory does not grow with `dim`.
    """
    basis = jnp.eye(x.shape[0], dtype=x.dtype)
    if x.shape[0] <= chunk:
        v, columns = products(field, t, x, context, basis)
        return v, jnp.trace(columns), jnp.sum(columns**2)

    @jax.checkpoint
    def diagonal_and_square(direction):
        _, (column,) = products(field, t, x, context, direction[None])
        return direction @ column, column @ column

    diagonal, squares = jax.lax.map(diagonal_and_square, basis, batch_size=chunk)
    return field(t, x, context), jnp.sum(diagonal), jnp.sum(squares)


def velocity_and_divergence(
    field, t: Float[Array, ""], x: Float[Array, " dim"], context=None
) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
    """v (dim,) and tr(dv/dx) of one sample: the field's closed form, or else forward mode."""
    if hasattr(field, "velocity_and_divergence"):
        return field.velocity_and_divergence(t, x, context)
    return trace_and_square(field, t, x, context)[:2]
