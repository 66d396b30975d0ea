"""Bijections of pictures: the logit of their pixels, squeezing, and scales that end early.

A picture is a vector, its components in the order height, width, channels.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jcnf._checks import check_int, check_number, check_shape
from jcnf.divergence import Divergence
from jcnf.flows.base import Bijection, Direction, Transformed
from jcnf.flows.chain import Composition
from jcnf.ode import Stats

Shape = tuple[int, int, int]  # height, width, channels


class Fixed(Bijection):
    """A bijection without parameters or solve. Subclass it and give `both`."""

    @property
    def context_dim(self) -> int:
        """0: it takes no context."""
        return 0

    @abstractmethod
    def both(
        self, x: Float[Array, "batch dim"], direction: Direction
    ) -> tuple[Float[Array, "batch dim"], Float[Array, " batch"]]:
        """The batch at the other end and its log-det."""

    def carry(self, x, direction, context, solve):
        """The batch at the other end."""
        end, _ = self.both(x, direction)
        return end, Stats.unsolved(end)

    def carry_with_logdet(self, x, direction, key, context, solve, divergence, regularizers):
        """The batch at the other end and its log-det; there is no path to penalise."""
        end, logdet = self.both(x, direction)
        return Transformed(end, logdet, {}, Stats.unsolved(end))


class Logit(Fixed):
    """From y in R^dim at the base's side to x in (-a', 1 + a'), y = logit(alpha + (1 - 2 alpha) x).

    It takes pixels in [0, 1] to where a density on all of R^dim is at home (Dinh et al. 2017,
    section 4.1; FFJORD has alpha 1e-6 for MNIST and 0.05 for CIFAR-10), a' = alpha/(1 - 2 alpha).
    What lies outside fails.

    **Raises:** `ValueError` for an `alpha` not in [1e-7, 1/2): float32 cannot tell less from 0
    where pixels are white.
    """

    alpha: float = eqx.field(static=True)

    def __check_init__(self):
        check_number("[1e-7, 0.5)", alpha=self.alpha)

    def both(self, x, direction):
        """logdet = +-sum_i [log(1 - 2 alpha) - log s_i - log(1 - s_i)] with s = sigmoid(y)."""
        width = 1 - 2 * self.alpha
        if direction == "to_base":
            # 1 - s from 1 - x: s itself is rounded where white pixels need it.
            end = y = jnp.log(self.alpha + width * x) - jnp.log(self.alpha + width * (1 - x))
        else:
            y = x
            end = (jax.nn.sigmoid(y) - self.alpha) / width
        slopes = math.log(width) + jax.nn.softplus(y) + jax.nn.softplus(-y)
        logdet = jnp.sum(slopes, axis=1)
        return end, logdet if direction == "to_base" else -logdet


class Squeeze(Fixed):
    """From data of `shape` (h, w, c) to (h/2, w/2, 4c) at the base's side: 2 x 2 pixels a pixel.

    A permutation (Dinh et al. 2017, section 3.6).

    **Raises:** `ValueError` for an odd height or width.
    """

    shape: Shape = eqx.field(static=True)

    def __check_init__(self):
        check_shape("shape", self.shape)
        if self.shape[0] % 2 or self.shape[1] % 2:
            raise ValueError(f"only an even height and width can be squeezed; got {self.shape}")

    def both(self, x, direction):
        """Of volume 1."""
        h, w, c = self.shape
        _require(x, self.shape)
        # Rows and columns change places with the pairs inside them, in either direction.
        inside, outside = (len(x), h // 2, 2, w // 2, 2, c), (len(x), h // 2, w // 2, 2, 2, c)
        pairs = x.reshape(inside if direction == "to_base" else outside)
        end = jnp.swapaxes(pairs, 2, 3).reshape(x.shape)
        return end, jnp.zeros(len(x), x.dtype)


class OnChannels(Bijection):
    """A bijection of the first `channels` channels of pictures of `shape`; the others pass through.

    Those have come to their end on the base's side (Dinh et al. 2017, eq. 14).

    **Raises:** `ValueError` where `channels` is not from 1 to one less than there are.
    """

    inner: Bijection
    shape: Shape = eqx.field(static=True)
    channels: int = eqx.field(static=True)

    def __check_init__(self):
        check_shape("shape", self.shape)
        check_int(channels=self.channels)
        if self.channels >= self.shape[2]:
            raise ValueError(
                f"channels must be fewer than those of {self.shape}; got {self.channels}"
            )

    @property
    def context_dim(self) -> int | None:
        """That of the bijection inside."""
        return self.inner.context_dim

    def _split(self, x):
        _require(x, self.shape)
        pixels = x.reshape(len(x), -1, self.shape[2])
        first, rest = pixels[..., : self.channels], pixels[..., self.channels :]
        return first.reshape(len(x), -1), rest

    def _join(self, first, rest):
        pixels = first.reshape(*rest.shape[:2], -1)
        return jnp.concatenate([pixels, rest], axis=2).reshape(len(first), -1)

    def carry(self, x, direction, context, solve):
        """The first channels at the other end, beside the rest."""
        first, rest = self._split(x)
        end, stats = self.inner.carry(first, direction, context, solve)
        return self._join(end, rest), stats

    def carry_with_logdet(self, x, direction, key, context, solve, divergence, regularizers):
        """As `carry`, with the log-det and the penalties of the bijection inside."""
        first, rest = self._split(x)
        end = self.inner.carry_with_logdet(
            first, direction, key, context, solve, divergence, regularizers
        )
        return end._replace(x=self._join(end.x, rest))

    def draw_noise(self, divergence: Divergence, key, batch, dim, dtype):
        """That of the bijection inside."""
        dim = dim // self.shape[2] * self.channels
        return self.inner.draw_noise(divergence, key, batch, dim, dtype)


def multiscale(shape: Shape, scales: int, blocks: Callable[[Shape], Sequence[Bijection]]):
    """FFJORD's multiscale bijection of pictures of `shape` (Grathwohl et al. 2019; RealNVP's plan).

    From data to base, each scale but the last has blocks, is squeezed, has blocks again, and there
    half of its channels end; the last has blocks alone. `blocks(shape)` gives those of one place,
    the base's side first, and is called from the data's side on.

    **Raises:** `ValueError` for fewer than 1 scale, and for what cannot be halved so often.
    """
    check_shape("shape", shape)
    height, width, channels = shape
    if not isinstance(scales, int):
        raise ValueError(f"scales must be a whole number; got {scales!r}")
    halvings = 2 ** (scales - 1) if scales >= 1 else 0
    if not halvings or height % halvings or width % halvings:
        raise ValueError(
            f"{scales} scales need pictures whose height and width can be halved {scales - 1} "
            f"times; got {height} x {width}"
        )
    fine = list(blocks(shape))
    if scales == 1:
        return Composition(fine)
    squeezed = height // 2, width // 2, 4 * channels
    coarse = list(blocks(squeezed))
    rest = multiscale((*squeezed[:2], 2 * channels), scales - 1, blocks)
    return Composition([OnChannels(rest, squeezed, 2 * channels), *coarse, Squeeze(shape), *fine])


def _require(x, shape):
    if x.shape[1] != math.prod(shape):
        raise ValueError(f"expected pictures of shape {shape}; got vectors of {x.shape[1]}")
