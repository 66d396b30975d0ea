"""Orthonormal bases by elementary operations, for use under `vmap` inside a solve.

Not LAPACK's: on CPUs jaxlib (0.10.2) gives each batch of factorisations to the thread pool that
runs it, and two at a time can wait for each other for ever.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def orthonormalise(
    rows: Float[Array, "k dim"],
) -> tuple[Float[Array, "k dim"], Float[Array, "k k"]]:
    """An orthonormal basis Q of the span of independent rows Y, and the upper R with Y' = Q' R.

    Gram-Schmidt, each row twice, which leaves Q orthonormal up to rounding (Giraud et al. 2005).
    """
    basis, columns = rows[:0], []
    for row in rows:
        first = basis @ row
        row = row - first @ basis
        second = basis @ row
        row = row - second @ basis
        length = jnp.sqrt(row @ row)
        basis = jnp.concatenate([basis, (row / length)[None]])
        rest = jnp.zeros(len(rows) - len(basis), row.dtype)
        columns.append(jnp.concatenate([first + second, length[None], rest]))
    return basis, jnp.stack(columns, axis=1)


def inverse_transposed(upper: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The inverse of the transpose of an upper triangular matrix, by forward substitution."""
    found = upper[:0]
    for i, unit in enumerate(jnp.eye(len(upper), dtype=upper.dtype)):
        row = (unit - upper[:i, i] @ found) / upper[i, i]
        found = jnp.concatenate([found, row[None]])
    return found
