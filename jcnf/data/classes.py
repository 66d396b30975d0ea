"""Two moons by class: a conditional density p(x | label) that is known.

The moons are those of `jcnf.data.toys`, which are each other's reflection: the upper is class 0,
the lower class 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jcnf._checks import check_key
from jcnf.data import toys

CLASSES = 2
EXTENT = toys.toy("moons").extent
# Of a class, in nats, as the toys': the least mean of -log p(x | label) that a model can have.
ENTROPY = 1.70257015
_sample, _density = toys._curve(**toys.MOON)
_log_prob = toys.batched(_density)


def sample(key: Key[Array, ""], labels: Int[Array, " num"]) -> Float[Array, "num 2"]:
    """A point of each label's class, (num, 2); consumes `key`."""
    check_key(key)
    _check(labels)
    return _turned(_sample(key, len(labels)), labels)


def log_prob(x: Float[Array, "batch 2"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """log p(x | label) in nats, (batch,)."""
    _check(labels)
    if jnp.ndim(x) != 2:
        raise ValueError(f"expected x of shape (batch, 2); got {jnp.shape(x)}: add x[None]")
    return _log_prob(_turned(x, labels))


def one_hot(labels: Int[Array, " num"]) -> Float[Array, "num 2"]:
    """Labels as contexts, (num, 2); other labels than 0 and 1 give zeros, the null context."""
    return jnp.asarray(labels[:, None] == jnp.arange(CLASSES)[None], float)


def _check(labels):
    if jnp.ndim(labels) != 1 or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f"expected labels that are whole numbers, of shape (batch,); got "
            f"{jnp.result_type(labels)} of shape {jnp.shape(labels)}"
        )


def _turned(x, labels):
    """The reflection in the centre of the points of class 1."""
    sign = jnp.where(labels == 1, -1, 1).astype(x.dtype)[:, None]
    centre = jnp.asarray(toys.MOON["centre"], x.dtype)[None]
    return centre + sign * (x - centre)
