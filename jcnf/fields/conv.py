"""The convolutional field of images, with an exact divergence by few products."""

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from jcnf._checks import check_int, check_ints, check_key, check_shape
from jcnf.fields._xla_cpu import KERNEL_SIZE, convolve
from jcnf.fields.base import Field, trace_and_frobenius
from jcnf.fields.layers import LAYERS, Activation, Linear, TimeLinear, resolve


class Conv(Field):
    """Convolutional field of images.

    v(t, x) = K_{L+1}(t) * s(... s(K_1(t) * x + b_1(t)) ...) + b_{L+1}(t).

    This is FFJORD's field of images (Grathwohl et al. 2019, appendix B.1), with 3 x 3 kernels and
    zeros beyond the border. A kernel is a linear layer of the 3 x 3 pixels around each pixel, so
    that time enters as in `jcnf.fields.layers`. The components of x (dim,) are in the order height,
    width, channels.

    The exact divergence takes few products. A pixel's velocity depends only on pixels at most
    r = L + 1 away, so that one product serves all pixels of a channel that are r + 1 apart: the
    diagonal of a banded Jacobian (Curtis, Powell & Reid 1974). This takes (r + 1)^2 products per
    channel instead of height x width: 25 for three hidden layers, whatever the size of the image.

    **Arguments:**

    - `shape`: height, width and channels of the image.
    - `channels`: number of channels of each hidden layer, input side first.
    - `time`: how time enters: a name in `jcnf.fields.layers.LAYERS`.
    - `activation`: as in `jcnf.fields.MLP`.
    - `context_dim`: size of the conditioning vector c, which shifts every hidden channel by an
      affine function of c; 0 for none.
    - `key`: consumed once, for the initial weights: uniform with variance 1/(3 fan-in).

    **Raises:** `ValueError` for unknown names and for sizes below 1.
    """

    layers: tuple[TimeLinear, ...]
    conditions: tuple[Linear, ...] | None  # c -> shift of each hidden layer
    shape: tuple[int, int, int] = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int] = (64, 64, 64),
        *,
        time: str = "concat",
        activation: str | Callable = "softplus",
        context_dim: int = 0,
        key: Key[Array, ""],
    ):
        if time not in LAYERS:
            raise ValueError(f"unknown time layer {time!r}: use one of {', '.join(LAYERS)}")
        check_shape("shape", shape)
        check_ints(channels=channels)
        check_int(0, context_dim=context_dim)
        check_key(key)
        self.shape, self.context_dim = shape, context_dim
        self.activation = resolve(activation)
        sizes = (shape[2], *channels, shape[2])
        keys = iter(jr.split(key, 2 * len(sizes)))
        self.layers = tuple(
            LAYERS[time](KERNEL_SIZE**2 * i, o, key=next(keys))
            for i, o in itertools.pairwise(sizes)
        )
        shifts = channels if context_dim else ()
        # None, not (): diffrax fails if the state of a continuous adjoint has an empty tuple.
        self.conditions = tuple(Linear(context_dim, c, key=next(keys)) for c in shifts) or None

    @property
    def dim(self) -> int:
        """Dimension of x, height x width x channels."""
        return int(np.prod(self.shape))

    def __call__(self, t, x, context=None):
        h = x.reshape(self.shape)
        *hidden, last = self.layers
        for i, layer in enumerate(hidden):
            a = convolve(h, *layer.affine(t))
            if self.conditions is not None and context is not None:
                a = a + self.conditions[i](t, context)[None, None]
            h, _ = self.activation(a)
        return convolve(h, *last.affine(t)).reshape(x.shape)

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and tr(dv/dx), exactly, by at most (r + 1)^2 products per channel."""
        reach = len(self.layers) * (KERNEL_SIZE // 2)
        directions = jnp.asarray(_far_apart(self.shape, reach), x.dtype)
        return trace_and_frobenius(self, t, x, context, directions)[:2]


def _far_apart(shape, reach):
    """Return directions (k, dim) of zeros and ones that sum to a row of ones.

    The ones of a direction e are pixels of one channel that are more than `reach` apart, so that
    e' (dv/dx) e has no off-diagonal terms.
    """
    height, width, channels = shape
    rows, columns = min(reach + 1, height), min(reach + 1, width)
    row, column, channel = np.indices(shape)
    group = (row % rows * columns + column % columns) * channels + channel
    return group.ravel()[None] == np.arange(rows * columns * channels)[:, None]
