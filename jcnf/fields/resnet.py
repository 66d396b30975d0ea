"""The residual network: wide and deep fields, for training without an ODE solve."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key
from jcnf.fields.base import Field
from jcnf.fields.layers import Activation, Linear, encode_time, resolve

FOURIER_FREQUENCY_STD = 2.0


class Block(eqx.Module):
    """Residual block h + V s(W s(h) + U e), where e encodes the time and the context."""

    inner: Linear  # W
    condition: Linear  # U
    outer: Linear  # V

    def __init__(self, width: int, condition_size: int, *, key: Key[Array, ""]):
        inner_key, condition_key, outer_key = jr.split(key, 3)
        self.inner = Linear(width, width, key=inner_key)
        self.condition = Linear(condition_size, width, key=condition_key)
        self.outer = Linear(width, width, key=outer_key)


class ResNet(Field):
    """Residual network of B blocks.

    v(t, x) = R s(h_B), h_{b+1} = h_b + V_b s(W_b s(h_b) + U_b e(t, c)), h_0 = W (x, w(x)).

    Residual connections allow many blocks, and e(t, c) = (t, sin pi t, ..., sin F pi t, cos pi t,
    ..., cos F pi t, c) resolves time finely. Sharp edges need the random Fourier features
    w(x) = (sin S x, cos S x) beside x, with S drawn from N(0, 2^2) (Tancik et al. 2020; here S is
    trained too). The divergence takes one product with each layer per dimension, which suits a
    field that is trained by flow matching and scored only occasionally.

    **Arguments:**

    - `dim`: dimension of x.
    - `width`: width of the hidden layers.
    - `blocks`: number of blocks B, each of two layers.
    - `activation`: as in `jcnf.fields.MLP`.
    - `time_frequencies`: F; 0 for t alone.
    - `fourier_features`: number of rows of S; 0 for x alone.
    - `context_dim`: size of the conditioning vector c; 0 for none.
    - `key`: consumed once, for the initial weights. Those of R are 0, so that at first v = 0.

    **Raises:** `ValueError` for an unknown activation, and for sizes that are too small.
    """

    fourier_frequencies: Float[Array, "features dim"] | None  # S
    entry: Linear
    blocks: tuple[Block, ...]
    readout: Linear
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    time_frequencies: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        width: int = 128,
        blocks: int = 2,
        *,
        activation: str | Callable = "silu",
        time_frequencies: int = 0,
        fourier_features: int = 0,
        context_dim: int = 0,
        key: Key[Array, ""],
    ):
        check_int(dim=dim, width=width, blocks=blocks)
        check_int(0, time_frequencies=time_frequencies, fourier_features=fourier_features)
        check_int(0, context_dim=context_dim)
        check_key(key)
        self.dim = dim
        self.context_dim = context_dim
        self.time_frequencies = time_frequencies
        self.activation = resolve(activation)
        entry_key, readout_key, *keys = jr.split(key, 2 + blocks)
        conditions = 1 + 2 * time_frequencies + context_dim
        self.fourier_frequencies = None
        if fourier_features:
            entry_key, feature_key = jr.split(entry_key)
            directions = jr.normal(feature_key, (fourier_features, dim))
            self.fourier_frequencies = FOURIER_FREQUENCY_STD * directions
        self.entry = Linear(dim + 2 * fourier_features, width, key=entry_key)
        self.blocks = tuple(Block(width, conditions, key=k) for k in keys)
        readout = Linear(width, dim, key=readout_key)
        self.readout = eqx.tree_at(lambda r: r.weight, readout, jnp.zeros_like(readout.weight))

    def _push(self, t, x, context, columns):
        """Return the velocity, and the Jacobian's product with each row of `columns` (k, dim)."""
        condition = encode_time(t, self.time_frequencies, context)
        x, columns = self._with_fourier_features(x, columns)
        h, pushed = self.entry(t, x), columns @ self.entry.weight.T
        for block in self.blocks:
            a, slope = self.activation(h)
            b, inner_slope = self.activation(block.inner(t, a) + block.condition(t, condition))
            h = h + block.outer(t, b)
            inner = inner_slope[None] * ((slope[None] * pushed) @ block.inner.weight.T)
            pushed = pushed + inner @ block.outer.weight.T
        a, slope = self.activation(h)
        return self.readout(t, a), (slope[None] * pushed) @ self.readout.weight.T

    def _with_fourier_features(self, x, columns):
        """Return (x, w(x)), and the product of its Jacobian with each row of `columns`."""
        if self.fourier_frequencies is None:
            return x, columns
        angles, turned = self.fourier_frequencies @ x, columns @ self.fourier_frequencies.T
        s, c = jnp.sin(angles), jnp.cos(angles)
        return (
            jnp.concatenate([x, s, c]),
            jnp.concatenate([columns, c[None] * turned, -s[None] * turned], axis=1),
        )

    def __call__(self, t, x, context=None):
        return self._push(t, x, context, jnp.zeros((0, self.dim), x.dtype))[0]

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and tr(dv/dx), exactly, by `dim` products with each layer.

        This is faster than forward mode, because the slopes are computed with the activations, and
        once for all columns.
        """
        v, jacobian = self._push(t, x, context, jnp.eye(self.dim, dtype=x.dtype))
        return v, jnp.trace(jacobian)

    def velocity_divergence_and_product(self, t, x, vector, context=None):
        """Return v (dim,), div v, and the Jacobian's product with `vector`, at no further cost."""
        v, jacobian = self._push(t, x, context, jnp.eye(self.dim, dtype=x.dtype))
        return v, jnp.trace(jacobian), vector @ jacobian
