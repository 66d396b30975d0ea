"""OT-Flow's gradient field of a potential, with its exact Laplacian."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, check_key
from jcnf.fields.base import Field
from jcnf.fields.layers import Linear, logcosh, uniform


class Potential(Field):
    """Gradient field v(t, x) = -grad_x Phi(t, x) of a potential (OT-Flow, Onken et al. 2021).

    With s = (x, t) and r(a) = |a| + log(1 + e^{-2|a|}) elementwise, whose derivative is tanh,

        Phi = w' N(s) + 1/2 |A s|^2 + b' s + c,    N(s) = h + r(K1 h + b1),    h = r(K0 s + b0).

    Its gradient and Laplacian have closed forms. The constant c does not change v, and is not
    trained.

    **Arguments:**

    - `dim`: dimension of x.
    - `width`: width m of the two layers of N.
    - `rank`: number of rows of A, reduced to dim + 1 if larger, because A'A has no higher rank.
    - `key`: consumed once, for the initial weights: uniform with variance 1/(3 fan-in), and for A
      with variance 1/(3 rank), so that A'A is close to I/3.

    **Raises:** `ValueError` for sizes below 1.
    """

    opening: Linear
    inner: Linear
    weight: Float[Array, " width"]
    factor: Float[Array, "rank inputs"]
    slope: Float[Array, " inputs"]
    constant: Float[Array, ""]
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, width: int = 32, rank: int = 10, *, key: Key[Array, ""]):
        check_int(dim=dim, width=width, rank=rank)
        check_key(key)
        rank = min(rank, dim + 1)
        opening_key, inner_key, weight_key, factor_key = jr.split(key, 4)
        self.opening = Linear(dim + 1, width, key=opening_key)
        self.inner = Linear(width, width, key=inner_key)
        self.weight = uniform(weight_key, (width,), width)
        self.factor = uniform(factor_key, (rank, dim + 1), rank)
        self.slope = jnp.zeros(dim + 1)
        self.constant = jnp.zeros(())
        self.dim = dim

    def potential(self, t: Float[Array, ""], x: Float[Array, " dim"]) -> Float[Array, ""]:
        """Return Phi(t, x), a scalar."""
        s = jnp.append(x, t)
        h, _ = logcosh(self.opening.weight @ s + self.opening.bias)
        residual, _ = logcosh(self.inner.weight @ h + self.inner.bias)
        quadratic = jnp.sum((self.factor @ s) ** 2) / 2
        return self.weight @ (h + residual) + quadratic + self.slope @ s + self.constant

    def gradient(self, t: Float[Array, ""], x: Float[Array, " dim"]) -> Float[Array, " dim+1"]:
        """Return (grad_x Phi, dPhi/dt) = K0'(d0 * z) + A'A s + b, (dim+1,)."""
        return self._gradient(t, x)[0]

    def _gradient(self, t, x):
        """Return the gradient, d0 = tanh(K0 s + b0), d1 = tanh(K1 h + b1), z = w + K1'(d1 * w)."""
        s = jnp.append(x, t)
        h, d0 = logcosh(self.opening.weight @ s + self.opening.bias)
        d1 = jnp.tanh(self.inner.weight @ h + self.inner.bias)
        z = self.weight + (d1 * self.weight) @ self.inner.weight
        gradient = (d0 * z) @ self.opening.weight + (self.factor @ s) @ self.factor + self.slope
        return gradient, d0, d1, z

    def __call__(self, t, x, context=None):
        """Return the velocity dx/dt = -grad_x Phi at time `t`, (dim,)."""
        return -self.gradient(t, x)[: self.dim]

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and div v = -lap Phi.

        With K and A the columns of K0 and A that multiply x, and sums over rows i,

            lap Phi = sum_i z_i (1 - d0_i^2) |K_i|^2 + sum_i w_i (1 - d1_i^2) |(K1 diag(d0) K)_i|^2
            + |A|^2,

        which takes one product of K1 with dim vectors per sample.
        """
        gradient, d0, d1, z = self._gradient(t, x)
        opening, factor = self.opening.weight[:, : self.dim], self.factor[:, : self.dim]
        # The columns are stored as rows, (dim, width), so that under vmap the batch folds into one
        # matrix product.
        columns = (d0[None] * opening.T) @ self.inner.weight.T
        laplacian = (
            (z * (1 - d0 * d0)) @ jnp.sum(opening**2, axis=1)
            + (self.weight * (1 - d1 * d1)) @ jnp.sum(columns**2, axis=0)
            + jnp.sum(factor**2)
        )
        return -gradient[: self.dim], -laplacian
