"""Linear layers that depend on time, all of the form x -> W(t) x + b(t).

Time enters only through W and b, so that the closed-form divergences of `jcnf.fields.mlp` hold for
every layer here, and `affine(t)` is computed once per evaluation, not once per sample, under `vmap`
over a batch. The layers are FFJORD's (Grathwohl et al. 2019): ignore, concat, squash, concatsquash,
hyper and blend.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf.fields._xla_cpu import turned

Affine = tuple[Float[Array, "out in"], Float[Array, " out"]]


class TimeLinear(eqx.Module):
    """A linear layer whose weight and bias may depend on time."""

    @abstractmethod
    def affine(self, t: Float[Array, ""]) -> Affine:
        """Return the weight (out, in) and the bias (out,) at time `t`."""

    def __call__(self, t: Float[Array, ""], x: Float[Array, " in"]) -> Float[Array, " out"]:
        """Return W(t) x + b(t).

        Layers that can compute the product without W(t) override this. If samples have different
        times, as in flow matching, W(t) is one matrix per sample.
        """
        weight, bias = self.affine(t)
        # The weight of a widening layer has short rows, which make its gradient slow.
        product = x @ turned(weight) if len(weight) > len(x) else weight @ x
        return product + bias


def uniform(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int) -> Array:
    """Draw initial weights, uniform with variance 1/(3 fan-in); consumes `key`."""
    bound = fan_in**-0.5
    return jr.uniform(key, shape, minval=-bound, maxval=bound)


def encode_time(
    t: Float[Array, ""], frequencies: int, context: Float[Array, " context"] | None
) -> Float[Array, " features"]:
    """Return (t, sin pi t, ..., sin F pi t, cos pi t, ..., cos F pi t, c), F the `frequencies`."""
    angles = jnp.asarray(np.pi * np.arange(1, frequencies + 1), t.dtype) * t
    given = [] if context is None else [context]
    return jnp.concatenate([t[None], jnp.sin(angles), jnp.cos(angles), *given])


class Linear(TimeLinear):
    """The layer W x + b, which ignores time."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        self.weight = uniform(key, (out_size, in_size), in_size)
        self.bias = jnp.zeros(out_size)

    def affine(self, t):
        return self.weight, self.bias


class Concat(TimeLinear):
    """The layer W x + b + w t: time is one more input."""

    linear: Linear
    time_weight: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        linear_key, time_key = jr.split(key)
        self.linear = Linear(in_size, out_size, key=linear_key)
        self.time_weight = uniform(time_key, (out_size,), in_size + 1)

    def affine(self, t):
        return self.linear.weight, self.linear.bias + self.time_weight * t


class Squash(TimeLinear):
    """The layer (W x + b) * sigmoid(g t + c): time scales each output."""

    linear: Linear
    gate_weight: Float[Array, " out"]
    gate_bias: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        linear_key, gate_key, bias_key = jr.split(key, 3)
        self.linear = Linear(in_size, out_size, key=linear_key)
        self.gate_weight = uniform(gate_key, (out_size,), 1)
        self.gate_bias = uniform(bias_key, (out_size,), 1)

    def affine(self, t):
        gate = self.gate(t)
        return gate[:, None] * self.linear.weight, gate * self.linear.bias

    def gate(self, t: Float[Array, ""]) -> Float[Array, " out"]:
        """Return the scale sigmoid(g t + c) of each output at time `t`."""
        return jax.nn.sigmoid(self.gate_weight * t + self.gate_bias)

    def __call__(self, t, x):
        return self.gate(t) * self.linear(t, x)


class ConcatSquash(TimeLinear):
    """The layer (W x + b) * sigmoid(g t + c) + w t: time scales and shifts each output."""

    squash: Squash
    time_weight: Float[Array, " out"]

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        squash_key, time_key = jr.split(key)
        self.squash = Squash(in_size, out_size, key=squash_key)
        self.time_weight = uniform(time_key, (out_size,), 1)

    def affine(self, t):
        weight, bias = self.squash.affine(t)
        return weight, bias + self.time_weight * t

    def __call__(self, t, x):
        return self.squash(t, x) + self.time_weight * t


class Hyper(TimeLinear):
    """The layer (W + V h) x + b + U h, where h = tanh(p t + q) is a hypernetwork of time.

    The weights start as those of `Linear` plus a term in t of no larger variance.
    """

    linear: Linear
    hidden_weight: Float[Array, " hidden"]
    hidden_bias: Float[Array, " hidden"]
    weight_map: Float[Array, "out in hidden"]
    bias_map: Float[Array, "out hidden"]

    def __init__(self, in_size: int, out_size: int, *, hidden: int = 8, key: Key[Array, ""]):
        keys = jr.split(key, 5)
        self.linear = Linear(in_size, out_size, key=keys[0])
        self.hidden_weight = uniform(keys[1], (hidden,), 1)
        self.hidden_bias = uniform(keys[2], (hidden,), 1)
        self.weight_map = uniform(keys[3], (out_size, in_size, hidden), in_size * hidden)
        self.bias_map = uniform(keys[4], (out_size, hidden), in_size * hidden)

    def affine(self, t):
        h = jnp.tanh(self.hidden_weight * t + self.hidden_bias)
        return self.linear.weight + self.weight_map @ h, self.linear.bias + self.bias_map @ h


class Blend(TimeLinear):
    """The layer (W0 + (W1 - W0) t) x + b0 + (b1 - b0) t, from one at t=0 to another at t=1."""

    start: Linear
    end: Linear

    def __init__(self, in_size: int, out_size: int, *, key: Key[Array, ""]):
        start_key, end_key = jr.split(key)
        self.start = Linear(in_size, out_size, key=start_key)
        self.end = Linear(in_size, out_size, key=end_key)

    def affine(self, t):
        return jax.tree.map(lambda a, b: a + (b - a) * t, self.start.affine(t), self.end.affine(t))


LAYERS: dict[str, Callable[..., TimeLinear]] = {
    "ignore": Linear,
    "concat": Concat,
    "squash": Squash,
    "concatsquash": ConcatSquash,
    "hyper": Hyper,
    "blend": Blend,
}


# Each activation is one function, pre-activation -> (value, derivative).
#
# A closed-form divergence needs both s(a) and s'(a). Computed together, they share their
# exponential, which is most of their cost; if only the value is used, XLA drops the rest.


Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]
Activation = Callable[[Float[Array, "*shape"]], Pair]


def tanh(a):
    """s = tanh a, s' = 1 - s^2."""
    s = jnp.tanh(a)
    return s, 1 - s * s


def softplus(a):
    """s = log(1 + e^a), s' = sigmoid(a), both from e^{-|a|}, which cannot overflow."""
    # Branches instead of abs and maximum, whose derivatives at 0 would be wrong here.
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


@functools.cache  # one object per function, so that equal flows do not recompile
def _by_jvp(function):
    return lambda a: jax.jvp(function, (a,), (jnp.ones_like(a),))


def resolve(activation: str | Callable) -> Activation:
    """Return the (value, derivative) form of a named activation, or of any elementwise function.

    A function is differentiated by `jax.jvp`. Pass the same object every time: a new lambda
    recompiles.

    **Raises:** `ValueError` for an unknown name, with a list of the known ones.
    """
    if callable(activation):
        return _by_jvp(activation)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}, "
            "or pass an elementwise function"
        )
    return ACTIVATIONS[activation]
