"""Activations as one function each: pre-activation -> (value, derivative).

A closed-form divergence needs s(a) and s'(a) together. Computed together they share their
exponential, which is most of their price; where only the value is asked for, XLA drops the rest.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]
Activation = Callable[[Float[Array, "*shape"]], Pair]


def tanh(a):
    """s = tanh a, s' = 1 - s^2."""
    s = jnp.tanh(a)
    return s, 1 - s * s


def softplus(a):
    """s = log(1 + e^a), s' = sigmoid(a), both from e^{-|a|}, which cannot overflow."""
    # Branches in place of abs and maximum, whose derivatives at 0 are not those of s.
    positive = a > 0
    e = jnp.exp(jnp.where(positive, -a, a))
    return jnp.where(positive, a, 0) + jnp.log1p(e), jnp.where(positive, 1, e) / (1 + e)


def silu(a):
    """s = a sigmoid(a), s' = sigmoid(a) (1 + a - s)."""
    gate = jax.nn.sigmoid(a)
    s = a * gate
    return s, gate * (1 + a - s)


def elu(a):
    """s = a for a > 0 and e^a - 1 below, s' = 1 for a > 0 and e^a below."""
    negative = jnp.expm1(jnp.where(a > 0, 0, a))
    return jnp.where(a > 0, a, negative), jnp.where(a > 0, 1, negative + 1)


def sine(a):
    """s = sin a, s' = cos a."""
    return jnp.sin(a), jnp.cos(a)


def logcosh(a):
    """s = log(e^a + e^{-a}) = |a| + log(1 + e^{-2|a|}), s' = tanh a."""
    return softplus(2 * a)[0] - a, jnp.tanh(a)


def identity(a):
    """s = a, s' = 1: a linear field."""
    return a, jnp.ones_like(a)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": tanh,
    "softplus": softplus,
    "silu": silu,
    "elu": elu,
    "sine": sine,
    "logcosh": logcosh,
    "identity": identity,
}


@functools.cache  # the same function must give the same activation, or flows would compile anew
def _by_jvp(function):
    return lambda a: jax.jvp(function, (a,), (jnp.ones_like(a),))


def resolve(activation: str | Callable) -> Activation:
    """The (value, derivative) form of a named activation, or of any elementwise function.

    A function of one's own is differentiated by `jax.jvp`; pass the same object every time, for a
    fresh lambda compiles anew.

    **Raises:** `ValueError` for an unknown name, listing the known.
    """
    if callable(activation):
        return _by_jvp(activation)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}, "
            "or pass an elementwise function"
        )
    return ACTIVATIONS[activation]
