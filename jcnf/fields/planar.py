"""The planar continuous flow, whose units come from a gated hypernetwork of time."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_instance, check_int, check_key
from jcnf.fields._xla_cpu import turned
from jcnf.fields.base import Field


class Planar(Field):
    """Planar field v(t, x) = mean_m u_m tanh(w_m . x + b_m) (Chen et al. 2018, section 4).

    A hypernetwork of t, 1 -> H -> H -> 3 M dim + M with tanh hidden layers, returns w, u, the gates
    g and b of the M units, in this order. The gates scale u: u <- u * sigmoid(g).

    **Arguments:**

    - `dim`: dimension of x.
    - `width`: number of units M.
    - `hidden`: hidden width H of the hypernetwork.
    - `average`: True for the mean over units; False for their sum, as in the paper.
    - `key`: consumed once, for the initial weights: uniform with variance 1/(3 fan-in).

    **Raises:** `ValueError` for sizes below 1.
    """

    hypernet: tuple[eqx.nn.Linear, ...]
    dim: int = eqx.field(static=True)
    average: bool = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        width: int = 64,
        hidden: int = 32,
        *,
        average: bool = True,
        key: Key[Array, ""],
    ):
        check_int(dim=dim, width=width, hidden=hidden)
        check_instance(bool, "True for the mean, False for the sum", average=average)
        check_key(key)
        sizes = (1, hidden, hidden, 3 * width * dim + width)
        keys = jr.split(key, 3)
        self.hypernet = tuple(
            eqx.nn.Linear(i, o, key=k)
            for (i, o), k in zip(itertools.pairwise(sizes), keys, strict=True)
        )
        self.dim = dim
        self.average = average

    def units(
        self, t: Float[Array, ""]
    ) -> tuple[Float[Array, "width dim"], Float[Array, "width dim"], Float[Array, " width"]]:
        """Return w (width, dim), the gated u (width, dim) and b (width,) at time `t`."""
        *hidden, last = self.hypernet
        h = t[None]
        for layer in hidden:
            h = jnp.tanh(layer(h))
        h = last(h)
        width = h.size // (3 * self.dim + 1)
        w, u, gate = h[:-width].reshape(3, width, self.dim)
        return w, u * jax.nn.sigmoid(gate), h[-width:]

    def __call__(self, t, x, context=None):
        return self.velocity_and_divergence(t, x)[0]

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v = mean_m (u_m . w_m) (1 - tanh(w_m . x + b_m)^2)."""
        w, u, b = self.units(t)
        if self.average:
            u = u / len(u)
        h = jnp.tanh(x @ turned(w) + b)
        return turned(u) @ h, (1 - h * h) @ jnp.sum(u * w, axis=1)
