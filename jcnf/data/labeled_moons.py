"""Two moons by class, with a known conditional density p(x | label).

The moons are those of `jcnf.data.toys`, each a reflection of the other: the upper moon is class 0,
the lower one class 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jcnf._checks import check_key
from jcnf.data import toys

CLASSES = 2
EXTENT = toys.toy("moons").extent
# Entropy of either class in nats, computed like those of the toys: no model can have a lower mean
# of -log p(x | label).
ENTROPY = 1.70257015
_sample, _density = toys.curve(**toys.MOON)
_log_prob = toys.batched(_density)


def sample(key: Key[Array, ""], labels: Int[Array, " num"]) -> Float[Array, "num 2"]:
    """Draw one point from the class of each label, (num, 2); consumes `key`."""
    check_key(key)
    _check(labels)
    return _turned(_sample(key, len(labels)), labels)


def log_prob(x: Float[Array, "batch 2"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    """Return log p(x | label) in nats, (batch,)."""
    _check(labels)
    if jnp.ndim(x) != 2:
        raise ValueError(f"expected x of shape (batch, 2); got {jnp.shape(x)}: use x[None]")
    return _log_prob(_turned(x, labels))


def one_hot(labels: Int[Array, " num"]) -> Float[Array, "num 2"]:
    """Return labels as contexts, (num, 2); any label but 0 and 1 gives zeros, the null context."""
    return jnp.asarray(labels[:, None] == jnp.arange(CLASSES)[None], float)


def _check(labels):
    if jnp.ndim(labels) != 1 or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f"expected integer labels of shape (batch,); got {jnp.result_type(labels)} of shape "
            f"{jnp.shape(labels)}"
        )


def _turned(x, labels):
    """Reflect the points of class 1 in the center of the two moons."""
    sign = jnp.where(labels == 1, -1, 1).astype(x.dtype)[:, None]
    center = jnp.asarray(toys.MOON["center"], x.dtype)[None]
    return center + sign * (x - center)
