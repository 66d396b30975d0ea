"""The interface of a divergence strategy: noise drawn once per solve, and a call on one sample."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key


class FieldEvaluation(eqx.Module):
    """A field's velocity and divergence at one sample, for the log-det and the regularizers.

    `frobenius` is |dv/dx|_F^2, or an unbiased estimate of it, from the products that the divergence
    computes anyway; None if it computes none.
    """

    velocity: Float[Array, " dim"]
    divergence: Float[Array, ""]
    frobenius: Float[Array, ""] | None = None


class Divergence(eqx.Module):
    """A way to compute tr(dv/dx). Subclass it to add an estimator.

    `draw` draws the noise of each sample and probe once per solve: if it changed within a solve,
    the estimate would not be a function of (t, x), and there would be no ODE to solve (FFJORD,
    Grathwohl et al. 2019, section 3.1).
    """

    def draw(self, key: Key[Array, ""] | None, batch: int, dim: int, dtype) -> Array | None:
        """Return noise for a whole batch with leading axis `batch`, or None; consumes `key`."""
        return None

    def of_part(self, number: int) -> "Divergence":
        """Return the strategy for part `number` of a flow that has several parts."""
        return self

    @abstractmethod
    def __call__(self, field, t, x, context, noise) -> FieldEvaluation:
        """Return the velocity and the divergence of one sample at `x` (dim,) and time `t`."""


class FixedNoise(Divergence):
    """A `strategy` that reuses noise drawn before, (batch, ...), instead of drawing new noise.

    `noise` is what `jcnf.flows.Bijection.draw_noise` returns, a tuple with the noise of each part
    if the flow has several.
    """

    strategy: Divergence
    noise: Any

    def draw(self, key, batch, dim, dtype):
        """Return the stored noise in `dtype`; `key` is ignored."""
        return jax.tree.map(lambda noise: noise.astype(dtype), self.noise)

    def of_part(self, number):
        return FixedNoise(self.strategy, None if self.noise is None else self.noise[number])

    def __call__(self, field, t, x, context, noise):
        return self.strategy(field, t, x, context, noise)
