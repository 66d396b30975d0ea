"""Norms of a step's error over its tolerance, by which steps are accepted: those below 1."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jcnf.ode import mean_square

# From the mean squares of the rows to the square of the norm.
OVER_ROWS: dict[str, Callable[[Array], Array]] = {"batch": jnp.mean, "worst": jnp.max}


def batch_norm(error: Any) -> Float[Array, ""]:
    """Return the root mean square over all components of a pytree of arrays."""
    leaves = jax.tree.leaves(error)
    return _root(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def worst_norm(error: Any) -> Float[Array, ""]:
    """Return the largest root mean square of a row, the first axis of each array."""
    return _root(jnp.max(mean_square(error)))


def _root(square):
    # A NaN error would make the next step NaN; an infinite one rejects and shortens the step.
    return jnp.sqrt(jnp.where(jnp.isnan(square), jnp.inf, square))


NORMS: dict[str, Callable[[Any], Float[Array, ""]]] = {"batch": batch_norm, "worst": worst_norm}
