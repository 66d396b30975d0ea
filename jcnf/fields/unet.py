"""The U-Net: a field of images, for training without an ODE solve."""

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_ints, check_key, check_shape
from jcnf.fields._xla_cpu import KERNEL_SIZE, convolve
from jcnf.fields.base import Field
from jcnf.fields.layers import Activation, Linear, encode_time, resolve

NORM_GROUPS = 8


class ConvBlock(eqx.Module):
    """Residual block of two convolutions, S h + K2 * s(n(K1 * s(n(h)) + U e)).

    e encodes the time and the context, and n is `normalize`.
    """

    inner: Linear  # K1
    condition: Linear  # U
    outer: Linear  # K2, initially 0
    skip: Linear  # S

    def __init__(self, in_size: int, out_size: int, condition_size: int, *, key: Key[Array, ""]):
        inner_key, condition_key, outer_key, skip_key = jr.split(key, 4)
        self.inner = Linear(KERNEL_SIZE**2 * in_size, out_size, key=inner_key)
        self.condition = Linear(condition_size, out_size, key=condition_key)
        self.outer = _silent(Linear(KERNEL_SIZE**2 * out_size, out_size, key=outer_key))
        self.skip = Linear(in_size, out_size, key=skip_key)

    def __call__(self, t, h, condition, activation):
        """Map h (height, width, in) to (height, width, out)."""
        a = convolve(activation(normalize(h))[0], *self.inner.affine(t))
        a = a + self.condition(t, condition)[None, None]
        a = convolve(activation(normalize(a))[0], *self.outer.affine(t))
        return h @ self.skip.weight.T + self.skip.bias[None, None] + a


class UNet(Field):
    """U-Net of residual blocks (Ronneberger et al. 2015; Ho et al. 2020, without attention).

    The resolution is halved after each level but the last, and doubled again on the way back, where
    each level is joined by its own output on the way down. Blocks normalize in groups of channels
    (Wu & He 2018) and take e(t, c) = (t, sin pi t, ..., sin F pi t, cos pi t, ..., cos F pi t, c).
    Every pixel sees all others, so that the divergence has no closed form: use Hutchinson's
    estimator. At first v = 0.

    **Arguments:**

    - `shape`: height, width and channels of the image; the components of x come in this order.
    - `channels`: number of channels of each level, finest first. Numbers above 8, of one level or
      of two neighboring levels together, must be multiples of 8.
    - `blocks`: number of blocks per level, on each way.
    - `activation`: as in `jcnf.fields.MLP`.
    - `time_frequencies`: F; 0 for t alone.
    - `context_dim`: size of the conditioning vector c; 0 for none.
    - `key`: consumed once, for the initial weights.

    **Raises:** `ValueError` for sizes below 1, for channels that are not such multiples, and for a
    height or width that cannot be halved between all levels.
    """

    entry: Linear
    down: tuple[tuple[ConvBlock, ...], ...]
    up: tuple[tuple[ConvBlock, ...], ...]  # the coarsest level first
    readout: Linear
    shape: tuple[int, int, int] = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    time_frequencies: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        *,
        activation: str | Callable = "silu",
        time_frequencies: int = 4,
        context_dim: int = 0,
        key: Key[Array, ""],
    ):
        check_shape("shape", shape)
        check_ints(channels=channels)
        if not channels:
            raise ValueError("channels must be those of at least one level; got ()")
        check_int(blocks=blocks)
        check_int(0, time_frequencies=time_frequencies, context_dim=context_dim)
        check_key(key)
        halvings = 2 ** (len(channels) - 1)
        if shape[0] % halvings or shape[1] % halvings:
            raise ValueError(
                f"shape must have a height and width that can be halved {len(channels) - 1} times "
                f"for {len(channels)} levels of channels; got {shape[0]} x {shape[1]}"
            )
        # On the way back, a level takes the output of the next coarser level, joined by its own.
        joined = [b + c for b, c in zip([*channels[1:], 0], channels, strict=True)]
        if odd := [c for c in (*channels, *joined) if c > NORM_GROUPS and c % NORM_GROUPS]:
            raise ValueError(
                f"channels above {NORM_GROUPS}, of one level or of two neighboring levels "
                f"together, must be multiples of {NORM_GROUPS}; got {odd[0]} from "
                f"channels={tuple(channels)}"
            )
        self.shape, self.context_dim, self.time_frequencies = shape, context_dim, time_frequencies
        self.activation = resolve(activation)
        size = 1 + 2 * time_frequencies + context_dim
        keys = iter(jr.split(key, 2 + 2 * blocks * len(channels)))

        def level(first, then):
            sizes = [first, *[then] * blocks]
            return tuple(
                ConvBlock(i, o, size, key=next(keys)) for i, o in itertools.pairwise(sizes)
            )

        self.entry = Linear(KERNEL_SIZE**2 * shape[2], channels[0], key=next(keys))
        self.down = tuple(level(channels[max(i - 1, 0)], c) for i, c in enumerate(channels))
        self.up = tuple(level(i, o) for i, o in reversed([*zip(joined, channels, strict=True)]))
        self.readout = _silent(Linear(KERNEL_SIZE**2 * channels[0], shape[2], key=next(keys)))

    @property
    def dim(self) -> int:
        """Dimension of x, height x width x channels."""
        return int(np.prod(self.shape))

    def __call__(self, t, x, context=None):
        condition = encode_time(t, self.time_frequencies, context)
        h = convolve(x.reshape(self.shape), *self.entry.affine(t))
        levels = []
        for i, blocks in enumerate(self.down):
            h = _halved(h) if i else h
            for block in blocks:
                h = block(t, h, condition, self.activation)
            levels.append(h)
        for i, blocks in enumerate(self.up):
            own = levels.pop()
            h = own if i == 0 else jnp.concatenate([_doubled(h), own], axis=-1)
            for block in blocks:
                h = block(t, h, condition, self.activation)
        h, _ = self.activation(normalize(h))
        return convolve(h, *self.readout.affine(t)).reshape(x.shape)


def normalize(h: Float[Array, "height width channels"]) -> Float[Array, "height width channels"]:
    """Normalize 8 groups of channels, or each of fewer channels, to mean 0 and variance 1."""
    groups = h.reshape(-1, min(NORM_GROUPS, h.shape[-1]), max(1, h.shape[-1] // NORM_GROUPS))
    mean = jnp.mean(groups, axis=(0, 2), keepdims=True)
    variance = jnp.mean((groups - mean) ** 2, axis=(0, 2), keepdims=True)
    return ((groups - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(h.shape)


def _silent(layer):
    return eqx.tree_at(lambda layer: layer.weight, layer, jnp.zeros_like(layer.weight))


def _halved(h):
    height, width, channels = h.shape
    return jnp.mean(h.reshape(height // 2, 2, width // 2, 2, channels), axis=(1, 3))


def _doubled(h):
    return jnp.repeat(jnp.repeat(h, 2, axis=0), 2, axis=1)
