"""The U-Net: a field of pictures that sees them whole, trained without being solved."""

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_ints, check_key, check_shape
from jcnf.fields._xla_cpu import KERNEL, convolve
from jcnf.fields.layers import Activation, Ignore, resolve

GROUPS = 8  # of channels, each normalised by itself


class ConvBlock(eqx.Module):
    """S h + K2 * s(n(K1 * s(n(h)) + U e)): two convolutions, told the time and the context by e."""

    inner: Ignore  # K1
    condition: Ignore  # U
    outer: Ignore  # K2, zeros at first
    skip: Ignore  # S

    def __init__(self, in_size: int, out_size: int, condition_size: int, *, key: Key[Array, ""]):
        inner_key, condition_key, outer_key, skip_key = jr.split(key, 4)
        self.inner = Ignore(KERNEL**2 * in_size, out_size, key=inner_key)
        self.condition = Ignore(condition_size, out_size, key=condition_key)
        self.outer = _silent(Ignore(KERNEL**2 * out_size, out_size, key=outer_key))
        self.skip = Ignore(in_size, out_size, key=skip_key)

    def __call__(self, t, h, condition, activation):
        """(height, width, out) of (height, width, in)."""
        a = convolve(activation(normalise(h))[0], *self.inner.affine(t))
        a = a + self.condition(t, condition)[None, None]
        a = convolve(activation(normalise(a))[0], *self.outer.affine(t))
        return h @ self.skip.weight.T + self.skip.bias[None, None] + a


class UNet(eqx.Module):
    """A U-Net of residual blocks (Ronneberger et al. 2015; Ho et al. 2020, without attention).

    Pictures are halved after each level but the last, doubled again on the way back, and joined
    there by what each level had. Blocks normalise in groups of channels (Wu & He 2018) and are told
    e(t, c) = (t, sin pi t, ..., sin F pi t, cos pi t, ..., cos F pi t, c). Every pixel sees all
    others, so that there is no closed form of its divergence: score it by Hutchinson's estimator.
    At first v = 0.

    **Arguments:**

    - `shape`: height, width and channels of the picture; components come in this order.
    - `channels`: of each level, the finest first; more than 8, of a level or of two neighbours
      together, must be a multiple of 8.
    - `blocks`: a level, on each way.
    - `activation`: as in `jcnf.fields.MLP`.
    - `frequencies`: F.
    - `context_dim`: size of the conditioning vector c; 0 for none.
    - `key`: consumed once, for the initial weights.

    **Raises:** `ValueError` for sizes below 1, and for pictures that cannot be halved so often.
    """

    entry: Ignore
    down: tuple[tuple[ConvBlock, ...], ...]
    up: tuple[tuple[ConvBlock, ...], ...]  # the coarsest level first
    readout: Ignore
    shape: tuple[int, int, int] = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    frequencies: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        *,
        activation: str | Callable = "silu",
        frequencies: int = 4,
        context_dim: int = 0,
        key: Key[Array, ""],
    ):
        check_shape("shape", shape)
        check_ints(channels=channels)
        if not channels:
            raise ValueError("channels must be those of one level or more; got ()")
        check_int(blocks=blocks)
        check_int(0, frequencies=frequencies, context_dim=context_dim)
        check_key(key)
        halvings = 2 ** (len(channels) - 1)
        if shape[0] % halvings or shape[1] % halvings:
            raise ValueError(
                f"{len(channels)} levels need pictures whose height and width can be halved "
                f"{len(channels) - 1} times; got {shape[0]} x {shape[1]}"
            )
        # On the way back a level gets what comes from below, and what it had itself.
        joined = [b + c for b, c in zip([*channels[1:], 0], channels, strict=True)]
        if odd := [c for c in (*channels, *joined) if c > GROUPS and c % GROUPS]:
            raise ValueError(
                f"channels above {GROUPS}, of a level or of two neighbours together, must be "
                f"multiples of it; got {odd[0]} of {tuple(channels)}"
            )
        self.shape, self.context_dim, self.frequencies = shape, context_dim, frequencies
        self.activation = resolve(activation)
        size = 1 + 2 * frequencies + context_dim
        keys = iter(jr.split(key, 2 + 2 * blocks * len(channels)))

        def level(first, then):
            sizes = [first, *[then] * blocks]
            return tuple(
                ConvBlock(i, o, size, key=next(keys)) for i, o in itertools.pairwise(sizes)
            )

        self.entry = Ignore(KERNEL**2 * shape[2], channels[0], key=next(keys))
        self.down = tuple(level(channels[max(i - 1, 0)], c) for i, c in enumerate(channels))
        self.up = tuple(level(i, o) for i, o in reversed([*zip(joined, channels, strict=True)]))
        self.readout = _silent(Ignore(KERNEL**2 * channels[0], shape[2], key=next(keys)))

    @property
    def dim(self) -> int:
        """height x width x channels."""
        return int(np.prod(self.shape))

    def __call__(
        self, t: Float[Array, ""], x: Float[Array, " dim"], context=None
    ) -> Float[Array, " dim"]:
        """The velocity dx/dt at time `t`, (dim,)."""
        angles = jnp.asarray(np.pi * np.arange(1, self.frequencies + 1), t.dtype) * t
        condition = jnp.concatenate([t[None], jnp.sin(angles), jnp.cos(angles)])
        if context is not None:
            condition = jnp.concatenate([condition, context])
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
        h, _ = self.activation(normalise(h))
        return convolve(h, *self.readout.affine(t)).reshape(x.shape)


def normalise(h: Float[Array, "height width channels"]) -> Float[Array, "height width channels"]:
    """Mean 0 and variance 1 in each of 8 groups of channels; of fewer channels, in each."""
    groups = h.reshape(-1, min(GROUPS, h.shape[-1]), max(1, h.shape[-1] // GROUPS))
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
