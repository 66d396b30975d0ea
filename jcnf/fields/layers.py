"""Linear layers that depend on time, all of the form x -> W(t) x + b(t).

That time enters only through W and b is what makes the closed-form divergences of
`jcnf.fields.mlp` hold for every layer here: under `vmap` over a batch, `affine(t)` is computed
once per evaluation, not once per sample. The layers are FFJORD's (Grathwohl et al. 2019): ignore,
concat, squash, concatsquash, hyper and blend.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf.fields._xla_cpu import turned

Affine = tuple[Float[Array, "out in"], Float[Array, " out"]]


class TimeLinear(eqx.Module):
    """A linear layer whose weight and bias may depend on time."""

    @abstractmethod
    def affine(self, t: Float[Array, ""]) -> Affine:
        """The layer at time `t`: weight (out, in) and bias (out,)."""

    def __call__(self, t: Float[Array, ""], x: Float[Array, " in"]) -> Float[Array, " out"]:
        """W(t) x + b(t).

        Overridden where the product is had without W(t), which is another one for each sample where
        samples have times of their own, as in flow matching.
        """
        weight, bias = self.affine(t)
        # A widening layer's gradient is not of the shape that is fast.
        product = x @ turned(weight) if len(weight) > len(x) else weight @ x
        return product + bias


def uniform(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int) -> Array:
    """Initial weights: uniform with variance 1/(3 fan-in); consumes `key`."""
    bound = fan_in**-0.5
    return jr.uniform(key, shape, minval=-bound, maxval=bound)


class Ignore(TimeLinear):
    """W x + b, whatever the time."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        self.weight = uniform(key, (out_size, in_size), in_size)
        self.bias = jnp.zeros(out_size)

    def affine(self, t):
        """W, b."""
        return self.weight, self.bias


class Concat(TimeLinear):
    """W x + b + w t: time as one more input."""

    linear: Ignore
    time_weight: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        linear_key, time_key = jr.split(key)
        self.linear = Ignore(in_size, out_size, key=linear_key)
        self.time_weight = uniform(time_key, (out_size,), in_size + 1)

    def affine(self, t):
        """W, b + w t."""
        return self.linear.weight, self.linear.bias + self.time_weight * t


class Squash(TimeLinear):
    """(W x + b) * sigmoid(g t + c): time scales each output."""

    linear: Ignore
    gate_weight: Float[Array, " out"]
    gate_bias: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        linear_key, gate_key, bias_key = jr.split(key, 3)
        self.linear = Ignore(in_size, out_size, key=linear_key)
        self.gate_weight = uniform(gate_key, (out_size,), 1)
        self.gate_bias = uniform(bias_key, (out_size,), 1)

    def affine(self, t):
        """diag(s) W, s * b with s = sigmoid(g t + c)."""
        gate = self.gate(t)
        return gate[:, None] * self.linear.weight, gate * self.linear.bias

    def gate(self, t: Float[Array, ""]) -> Float[Array, " out"]:
        """s."""
        return jax.nn.sigmoid(self.gate_weight * t + self.gate_bias)

    def __call__(self, t, x):
        """s * (W x + b)."""
        return self.gate(t) * self.linear(t, x)


class ConcatSquash(TimeLinear):
    """(W x + b) * sigmoid(g t + c) + w t: time scales and shifts each output."""

    squash: Squash
    time_weight: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        squash_key, time_key = jr.split(key)
        self.squash = Squash(in_size, out_size, key=squash_key)
        self.time_weight = uniform(time_key, (out_size,), 1)

    def affine(self, t):
        """diag(s) W, s * b + w t with s = sigmoid(g t + c)."""
        weight, bias = self.squash.affine(t)
        return weight, bias + self.time_weight * t

    def __call__(self, t, x):
        """s * (W x + b) + w t."""
        return self.squash(t, x) + self.time_weight * t


class Hyper(TimeLinear):
    """W(t) x + b(t), both from a hypernetwork of time with one hidden layer of tanh units.

    The weights start as those of `Ignore` plus a term in t of no larger variance.
    """

    linear: Ignore
    hidden_weight: Float[Array, " hidden"]
    hidden_bias: Float[Array, " hidden"]
    weight_map: Float[Array, "out in hidden"]
    bias_map: Float[Array, "out hidden"]

    def __init__(self, in_size: int, out_size: int, *, hidden: int = 8, key: Key[Array, ""]):
        keys = jr.split(key, 5)
        self.linear = Ignore(in_size, out_size, key=keys[0])
        self.hidden_weight = uniform(keys[1], (hidden,), 1)
        self.hidden_bias = uniform(keys[2], (hidden,), 1)
        self.weight_map = uniform(keys[3], (out_size, in_size, hidden), in_size * hidden)
        self.bias_map = uniform(keys[4], (out_size, hidden), in_size * hidden)

    def affine(self, t):
        """W + V h, b + u h with h = tanh(p t + q)."""
        h = jnp.tanh(self.hidden_weight * t + self.hidden_bias)
        return self.linear.weight + self.weight_map @ h, self.linear.bias + self.bias_map @ h


class Blend(TimeLinear):
    """A linear layer at t=0 that turns into another by t=1."""

    start: Ignore
    end: Ignore

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        start_key, end_key = jr.split(key)
        self.start = Ignore(in_size, out_size, key=start_key)
        self.end = Ignore(in_size, out_size, key=end_key)

    def affine(self, t):
        """W0 + (W1 - W0) t, b0 + (b1 - b0) t."""
        return jax.tree.map(lambda a, b: a + (b - a) * t, self.start.affine(t), self.end.affine(t))


LAYERS: dict[str, Callable[..., TimeLinear]] = {
    "ignore": Ignore,
    "concat": Concat,
    "squash": Squash,
    "concatsquash": ConcatSquash,
    "hyper": Hyper,
    "blend": Blend,
}


# Activations as one function each: pre-activation -> (value, derivative).
#
# A closed-form divergence needs s(a) and s'(a) together. Computed together they share their
# exponential, which is most of their price; where only the value is asked for, XLA drops the rest.


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
