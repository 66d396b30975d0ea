"""Norms of a step's error over its tolerance, by which steps are accepted: those below 1."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def batch_norm(error: Any) -> Float[Array, ""]:
    """The root mean square over all that `error`, a pytree of arrays, has."""
    leaves = jax.tree.leaves(error)
    return _root(sum(jnp.sum(leaf**2) for leaf in leaves) / sum(leaf.size for leaf in leaves))


def worst_norm(error: Any) -> Float[Array, ""]:
    """The largest over the batch, the first axis, of each sample's root mean square."""
    return _root(jnp.max(mean_square(error)))


def mean_square(error: Any) -> Float[Array, " batch"]:
    """Of each sample."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(error)]
    total: Any = sum(jnp.sum(leaf**2, axis=1) for leaf in flat)
    return total / sum(leaf.shape[1] for leaf in flat)


def _root(mean_square):
    # A NaN error would make the next step NaN; an infinite one rejects and shortens the step.
    return jnp.sqrt(jnp.where(jnp.isnan(mean_square), jnp.inf, mean_square))


NORMS: dict[str, Callable[[Any], Float[Array, ""]]] = {"batch": batch_norm, "worst": worst_norm}
