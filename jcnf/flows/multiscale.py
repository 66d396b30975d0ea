"""Bijections of images: the logit of pixels, squeezing, and multiple scales.

An image is a vector whose components are in the order height, width, channels.
"""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from jcnf._checks import check_int, check_number, check_shape
from jcnf.flows.base import Bijection
from jcnf.flows.chain import Composition
from jcnf.flows.fixed import Fixed

Shape = tuple[int, int, int]  # height, width, channels


class Identity(Fixed):
    """The map that changes nothing."""

    def both(self, x, direction, context=None):
        """Return `x`, with log-det 0."""
        return x, jnp.zeros(len(x), x.dtype)


class Logit(Fixed):
    """The map from data x in (-a', 1 + a') to y = logit(alpha + (1 - 2 alpha) x) at the base side.

    It takes pixels in [0, 1] to R^dim, where the rest of the flow has its density (Dinh et al.
    2017, section 4.1; FFJORD uses alpha 1e-6 for MNIST and 0.05 for CIFAR-10). The margin is
    a' = alpha/(1 - 2 alpha); rows with values outside it fail.

    **Raises:** `ValueError` for an `alpha` not in [1e-7, 1/2): at white pixels, float32 cannot
    distinguish anything smaller from 0.
    """

    alpha: float = eqx.field(static=True)

    def __check_init__(self):
        check_number("[1e-7, 0.5)", alpha=self.alpha)

    def both(self, x, direction, context=None):
        """Return the end and logdet = +-sum_i [log(1 - 2 alpha) - log s_i - log(1 - s_i)].

        Here s = sigmoid(y), and the sign is + toward the base.
        """
        width = 1 - 2 * self.alpha
        if direction == "to_base":
            # Compute 1 - s from 1 - x: at white pixels s rounds to 1, and 1 - s would lose digits.
            end = y = jnp.log(self.alpha + width * x) - jnp.log(self.alpha + width * (1 - x))
        else:
            y = x
            end = (jax.nn.sigmoid(y) - self.alpha) / width
        slopes = math.log(width) + jax.nn.softplus(y) + jax.nn.softplus(-y)
        logdet = jnp.sum(slopes, axis=1)
        return end, logdet if direction == "to_base" else -logdet


class Squeeze(Fixed):
    """Squeezing of each 2 x 2 pixels into one: data (h, w, c) to (h/2, w/2, 4c) at the base side.

    It is a permutation (Dinh et al. 2017, section 3.6).

    **Raises:** `ValueError` if the height or width of `shape` is odd.
    """

    shape: Shape = eqx.field(static=True)

    def __check_init__(self):
        check_shape("shape", self.shape)
        if self.shape[0] % 2 or self.shape[1] % 2:
            raise ValueError(f"shape must have an even height and width; got {self.shape}")

    def both(self, x, direction, context=None):
        """Return the permuted batch, with log-det 0."""
        h, w, c = self.shape
        _require(x, self.shape)
        # Swapping axes 2 and 3 turns one layout into the other, in either direction.
        inside, outside = (len(x), h // 2, 2, w // 2, 2, c), (len(x), h // 2, w // 2, 2, 2, c)
        pairs = x.reshape(inside if direction == "to_base" else outside)
        end = jnp.swapaxes(pairs, 2, 3).reshape(x.shape)
        return end, jnp.zeros(len(x), x.dtype)


class ChannelSplit(Bijection):
    """A bijection of the first `channels` channels of images of `shape`; the others pass through.

    The others have already reached the base side (Dinh et al. 2017, eq. 14).

    **Raises:** `ValueError` unless `channels` is at least 1 and less than the channels of `shape`.
    """

    inner: Bijection
    shape: Shape = eqx.field(static=True)
    channels: int = eqx.field(static=True)

    def __check_init__(self):
        check_shape("shape", self.shape)
        check_int(channels=self.channels)
        if self.channels >= self.shape[2]:
            raise ValueError(
                f"channels must be less than {self.shape[2]}, the channels of shape; "
                f"got {self.channels}"
            )

    @property
    def context_dim(self) -> int | None:
        """Size of the inner bijection's context."""
        return self.inner.context_dim

    def _split(self, x):
        _require(x, self.shape)
        pixels = x.reshape(len(x), -1, self.shape[2])
        first, rest = pixels[..., : self.channels], pixels[..., self.channels :]
        return first.reshape(len(x), -1), rest

    def _join(self, first, rest):
        pixels = first.reshape(*rest.shape[:2], -1)
        return jnp.concatenate([pixels, rest], axis=2).reshape(len(first), -1)

    def forward(self, x, context, solve):
        first, rest = self._split(x)
        end, stats = self.inner.forward(first, context, solve)
        return self._join(end, rest), stats

    def inverse(self, x, context, solve):
        first, rest = self._split(x)
        end, stats = self.inner.inverse(first, context, solve)
        return self._join(end, rest), stats

    def forward_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        first, rest = self._split(x)
        end = self.inner.forward_and_log_det(first, context, solve, divergence, noise, regularizers)
        return end._replace(value=self._join(end.value, rest))

    def inverse_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        first, rest = self._split(x)
        end = self.inner.inverse_and_log_det(first, context, solve, divergence, noise, regularizers)
        return end._replace(value=self._join(end.value, rest))

    def draw_noise(self, divergence, key, batch, dim, dtype):
        """Return the noise of the inner bijection."""
        dim = dim // self.shape[2] * self.channels
        return self.inner.draw_noise(divergence, key, batch, dim, dtype)


def multiscale(shape: Shape, scales: int, blocks: Callable[[Shape], Sequence[Bijection]]):
    """Build FFJORD's multiscale bijection of images (Grathwohl et al. 2019, after RealNVP).

    From data to base, each scale but the last applies blocks, squeezes the image, applies blocks
    again, and then half of the channels leave for the base. The last scale has only blocks.
    `blocks(shape)` returns the bijections of one place, the base side first; it is called place by
    place, starting at the data side.

    **Raises:** `ValueError` for fewer than 1 scale, or if `shape` cannot be halved often enough.
    """
    check_shape("shape", shape)
    height, width, channels = shape
    check_int(scales=scales)
    halvings = 2 ** (scales - 1)
    if height % halvings or width % halvings:
        raise ValueError(
            f"{scales} scales need images whose height and width can be halved {scales - 1} "
            f"times; got {height} x {width}"
        )
    fine = list(blocks(shape))
    if scales == 1:
        return Composition(fine)
    squeezed = height // 2, width // 2, 4 * channels
    coarse = list(blocks(squeezed))
    rest = multiscale((*squeezed[:2], 2 * channels), scales - 1, blocks)
    return Composition([ChannelSplit(rest, squeezed, 2 * channels), *coarse, Squeeze(shape), *fine])


def _require(x, shape):
    if x.shape[1] != math.prod(shape):
        raise ValueError(f"expected images of shape {shape}; got vectors of length {x.shape[1]}")
