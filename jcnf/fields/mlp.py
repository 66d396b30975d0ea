"""The multilayer perceptron in x with time-dependent layers, and its exact divergence."""

import itertools
from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from jcnf._checks import check_int, check_ints, check_key
from jcnf.fields._xla_cpu import push
from jcnf.fields.base import Field
from jcnf.fields.layers import LAYERS, Activation, Linear, TimeLinear, resolve


class MLP(Field):
    """Multilayer perceptron in x with time-dependent layers.

    v(t, x) = W_{L+1}(t) s(... s(W_1(t) [x, c] + b_1(t)) ...) + b_{L+1}(t).

    It has L hidden layers of any widths, an activation s, and layers from `jcnf.fields.layers`. It
    takes one sample; callers `vmap` it over the batch with `in_axes=(None, 0)`, so that whatever
    depends only on time is computed once per evaluation.

    **Arguments:**

    - `dim`: dimension of x.
    - `widths`: hidden widths, input side first; `()` is an affine field.
    - `time`: how time enters: a name in `jcnf.fields.layers.LAYERS`.
    - `activation`: a name in `jcnf.fields.layers.ACTIVATIONS`, or an elementwise function.
    - `output`: activation after the last layer; None for none. "tanh" bounds each component by 1.
    - `context_dim`: size of the conditioning vector c; 0 for none.
    - `conditioning`: how c enters. "concat" joins it to x; "modulate" turns the pre-activation a of
      each hidden layer into (1 + gain(c)) * a + shift(c), with a gain and a shift for each unit,
      affine in c (FiLM, Perez et al. 2018).
    - `key`: consumed once, for the initial weights: uniform with variance 1/(3 fan-in).

    **Raises:** `ValueError` for unknown names, for sizes below 1, and for "modulate" without a
    context or without a hidden layer.
    """

    layers: tuple[TimeLinear, ...]
    modulations: tuple[Linear, ...] | None  # c -> (gain, shift) of each hidden layer
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True)
    output: Activation | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        widths: Sequence[int] = (64, 64, 64),
        *,
        time: str = "concatsquash",
        activation: str | Callable = "tanh",
        output: str | Callable | None = None,
        context_dim: int = 0,
        conditioning: str = "concat",
        key: Key[Array, ""],
    ):
        if time not in LAYERS:
            raise ValueError(f"unknown time layer {time!r}: use one of {', '.join(LAYERS)}")
        if conditioning not in ("concat", "modulate"):
            raise ValueError(f"unknown conditioning {conditioning!r}: use 'concat' or 'modulate'")
        check_int(dim=dim)
        check_ints(widths=widths)
        check_int(0, context_dim=context_dim)
        check_key(key)
        modulated = tuple(widths) if conditioning == "modulate" else ()
        sizes = (dim if modulated else dim + context_dim, *widths, dim)
        if conditioning == "modulate" and not (modulated and context_dim):
            raise ValueError(
                "conditioning='modulate' needs a context and hidden layers: give context_dim and "
                f"widths; got context_dim={context_dim}, widths={tuple(widths)}"
            )
        self.dim = dim
        self.context_dim = context_dim
        self.activation = resolve(activation)
        self.output = None if output is None else resolve(output)
        keys = iter(jr.split(key, len(sizes) - 1 + len(modulated)))
        self.layers = tuple(
            LAYERS[time](i, o, key=next(keys)) for i, o in itertools.pairwise(sizes)
        )
        # None, not (): diffrax fails if the state of a continuous adjoint has an empty tuple.
        self.modulations = (
            tuple(Linear(context_dim, 2 * w, key=next(keys)) for w in modulated) or None
        )

    def _forward(self, t, x, context):
        """Return the velocity, each hidden layer's slope d_l, and the output's slope or None."""
        h = x if context is None or self.modulations else jnp.concatenate([x, context])
        slopes = []
        for i, layer in enumerate(self.layers):
            h = layer(t, h)
            if i < len(self.layers) - 1:
                h, slope = self._activate(i, h, context)
                slopes.append(slope)
        v, scale = (h, None) if self.output is None else self.output(h)
        return v, slopes, scale

    def _activate(self, i, a, context):
        """Return the units of hidden layer `i` from its pre-activation a, and their slope in a."""
        if self.modulations is None:
            return self.activation(a)
        modulation = self.modulations[i]
        gain, shift = jnp.split(modulation.weight @ context + modulation.bias, 2)
        h, slope = self.activation((1 + gain) * a + shift)
        return h, (1 + gain) * slope

    def __call__(self, t, x, context=None):
        return self._forward(t, x, context)[0]

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and tr(dv/dx), exactly.

        Here d_l = s'(a_l), o is the elementwise product, and W_1 has only its columns for x. With
        modulation, d_l = (1 + gain_l) * s'((1 + gain_l) * a_l + shift_l). The trace is, by the
        number of hidden layers:

        - none: tr W_1.
        - one: d_1' diag(W_1 W_2), a dot product per sample.
        - two: d_2' (W_2 o (W_1 W_3)') d_1, where the matrix depends only on t, so that a sample
          costs one h x h product whatever the dimension.
        - more: r = min(dim, first width) vectors are pushed through the inner layers from both
          ends, the columns of W_1 upwards and the rows of W_{L+1} downwards, and meet below the
          last inner layer. If the first width is less than dim, the rows of the identity and of
          W_1 W_{L+1} take their place.

        An `output` activation scales the rows of W_{L+1} by its slopes, which differ between
        samples.
        """
        v, slopes, scale = self._forward(t, x, context)
        weights = [layer.affine(t)[0] for layer in self.layers]
        if scale is not None:
            weights[-1] = scale[:, None] * weights[-1]
        first, last = weights[0][:, : self.dim], weights[-1]
        match slopes:
            case []:
                return v, jnp.trace(first)
            case [d1]:
                return v, jnp.sum(first * last.T, axis=1) @ d1
            case [d1, d2]:
                return v, d2 @ ((weights[1] * (first @ last).T) @ d1)
        if self.dim > len(first):
            up, readout = slopes[0][:, None] * weights[1].T, first @ last
        else:
            up, readout = push(first.T, slopes[0], weights[1]), last
        for slope, weight in zip(slopes[1:-2], weights[2:-2], strict=True):
            up = push(up, slope, weight)
        down = push(readout, slopes[-1], weights[-2].T)
        return v, jnp.sum(up * down, axis=0) @ slopes[-2]
