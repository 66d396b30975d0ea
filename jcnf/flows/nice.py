"""NICE: additive couplings and one scaling (Dinh et al. 2014, arXiv:1410.8516)."""

import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_finite, check_int, check_ints, check_key
from jcnf.distributions import BaseDistribution, Logistic
from jcnf.flows.base import Flow, check_batch
from jcnf.flows.bijective import DistraxBijection
from jcnf.ode import Solve

SPLITS = ("halves", "odd_even")
LAST_LAYER_SCALE = 0.01  # of initial weights, relative to those of hidden layers


def NICE(
    dim: int,
    widths: Sequence[int] = (64, 64),
    couplings: int = 4,
    *,
    split: str = "halves",
    base: BaseDistribution | None = None,
    key: Key[Array, ""],
) -> Flow["AdditiveCouplings"]:
    """Return a flow by non-linear independent components estimation (NICE).

    Its density is log p(x) = sum_i [log p_H(h_i) + s_i].

    The paper's forward direction goes from data x to latents h. Each coupling shifts one part of
    the components by a function of the other part, y1 = x1, y2 = x2 + m(x1) (section 3.2). The
    parts take turns, and every component keeps its position. The last step is h = exp(s) * y
    (section 3.3). Shifts preserve volume, so log|det dh/dx| = sum_i s_i at every x. The inverse
    uses the same networks: it divides by exp(s), then subtracts the shifts, last first. Its error
    in floating point is the rounding of the sums, amplified by the slopes of m: a few units in the
    last place of x.

    **Arguments:**

    - `dim`: dimension of x, at least 2.
    - `widths`: hidden widths of every m, a ReLU network; `()` makes it affine.
    - `couplings`: number of couplings. In 4 or more dimensions, some latents do not depend on all
      of x if there are fewer than 3.
    - `split`: the two parts of the components. "halves": the first half and the rest; "odd_even":
      the 1st, 3rd, ... and the 2nd, 4th, ..., for images. If `dim` is odd, the first part has one
      more. The first coupling leaves the first part unchanged.
    - `base`: the prior p_H, one of `jcnf.distributions`; by default the standard logistic.
    - `key`: consumed once, for the initial weights. They are normal with variance 2/fan-in, which
      preserves the scale through ReLUs (He et al. 2015), and the last layers start at a hundredth
      of such weights. Biases and s are 0. Training therefore starts near the identity, but not at
      it: there the networks have no gradient if the data are symmetric,
      E[x2 | x1] = E[x1 | x2] = 0.

    **Raises:** `ValueError` for smaller sizes, an unknown split or a base of another dimension.
    """
    check_int(2, dim=dim)
    check_int(couplings=couplings)
    check_ints(widths=widths)
    check_key(key)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    base = Logistic(dim) if base is None else base
    sizes = [len(part) for part in _parts(dim, split)]
    networks = tuple(
        ReLUNetwork(sizes[i % 2], sizes[(i + 1) % 2], widths, key=k)
        for i, k in enumerate(jr.split(key, couplings))
    )
    flow = Flow(AdditiveCouplings(networks, jnp.zeros(dim), split), base)
    if base.dim != dim:
        raise ValueError(f"base must have the dim of the flow; got {base.dim} and {dim}")
    return flow


def calibrated(
    flow: Flow["AdditiveCouplings"], x: Float[Array, "batch dim"]
) -> Flow["AdditiveCouplings"]:
    """Return a NICE flow with s, and the shifts of the last two couplings, set from data `x`.

    The latents of `x` then have mean 0 (with a single coupling, only those that it shifts) and the
    spread of the prior (data-dependent initialization, Salimans & Kingma 2016). Without it,
    training needs thousands of steps to get there if components differ in scale, as pixels do. A
    component that never varies keeps its scale.

    **Raises:** `ValueError` if `x` is not a batch for this flow, or not finite.
    """
    check_batch(flow, x, None)
    check_finite(x=x)
    old = flow.bijection
    new: Any = eqx.tree_at(lambda new: new.log_scale, old, jnp.zeros_like(old.log_scale))
    parts, count = _parts(flow.dim, old.split), len(old.networks)
    # The last two couplings shift one part each, and no later shift undoes the centering.
    for i in range(max(0, count - 2), count):
        latents, _ = new.inverse(x, None, Solve())
        mean = jnp.mean(latents, axis=0)[parts[(i + 1) % 2]]
        new = eqx.tree_at(
            lambda new, i=i: new.networks[i].biases[-1], new, replace_fn=lambda b, m=mean: b - m
        )
    h, _ = new.inverse(x, None, Solve())
    log_scale = jnp.log(flow.base.distribution(x.dtype).stddev() / jnp.std(h, axis=0))
    # The standard deviation of equal numbers may be a rounding error instead of 0.
    log_scale = jnp.where(jnp.ptp(h, axis=0) > 0, log_scale, old.log_scale)
    return Flow(eqx.tree_at(lambda new: new.log_scale, new, log_scale), flow.base)


class AdditiveCouplings(DistraxBijection):
    """The bijection of `NICE`, forward from latents to data."""

    networks: tuple["ReLUNetwork", ...]  # m of each coupling, the data's side first
    log_scale: Float[Array, " dim"]  # s
    split: str = eqx.field(static=True)

    def bijector(self) -> Any:
        """Return the inverse of the paper's forward direction: from latents to data."""
        import distrax

        networks: Any = self.networks
        parts = _parts(len(self.log_scale), self.split)
        # distrax couples the components before an index with those after it, so sort them by part,
        # couple, and put them back.
        order = np.concatenate(parts)
        sort, put_back = _permutation(order), _permutation(np.argsort(order))
        couplings = [
            distrax.SplitCoupling(len(parts[0]), 1, m, _shift, swap=i % 2 == 1)
            for i, m in enumerate(networks)
        ]
        scale = distrax.Block(distrax.ScalarAffine(0.0, log_scale=self.log_scale), 1)
        # distrax.Chain applies its last bijector first.
        return distrax.Inverse(distrax.Chain([scale, put_back, *reversed(couplings), sort]))


class ReLUNetwork(eqx.Module):
    """m(x) = W_{L+1} relu(... relu(W_1 x + b_1) ...) + b_{L+1}, over any leading dimensions."""

    weights: tuple[Float[Array, "out in"], ...]
    biases: tuple[Float[Array, " out"], ...]

    def __init__(self, in_size: int, out_size: int, widths: Sequence[int], *, key: Key[Array, ""]):
        sizes = (in_size, *widths, out_size)
        *hidden, last = (
            jr.normal(k, (o, i)) * (2 / i) ** 0.5
            for k, (i, o) in zip(
                jr.split(key, len(sizes) - 1), itertools.pairwise(sizes), strict=True
            )
        )
        self.weights = (*hidden, LAST_LAYER_SCALE * last)
        self.biases = tuple(jnp.zeros(len(weight)) for weight in self.weights)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return the shift (..., out) for x (..., in)."""
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden:
            x = jax.nn.relu(x @ weight.T + bias)
        weight, bias = last
        return x @ weight.T + bias


def _parts(dim, split):
    """Return the indices of each part."""
    index = np.arange(dim)
    return (index[::2], index[1::2]) if split == "odd_even" else np.array_split(index, 2)


def _shift(shift):
    import distrax

    return distrax.Block(distrax.ScalarAffine(shift), 1)


def _permutation(order):
    """Return the bijector y_i = x_{order_i}, whose log-det is 0."""
    import distrax

    back = np.argsort(order)

    def log_det(x: Any):
        return jnp.zeros(x.shape[:-1], x.dtype)

    return distrax.Lambda(
        lambda x: jnp.take(x, order, axis=-1),
        lambda y: jnp.take(y, back, axis=-1),
        log_det,
        log_det,
        event_ndims_in=1,
        is_constant_jacobian=True,
    )
