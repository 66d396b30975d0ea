"""The interface of a divergence strategy: noise drawn once per solve, and a call on one sample."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from jcnf.fields import Field


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

    `draw_noise` draws the noise of each sample and probe once per solve: if it changed within a
    solve, the estimate would not be a function of (t, x), and there would be no ODE to solve
    (FFJORD, Grathwohl et al. 2019, section 3.1).
    """

    def draw_noise(
        self, key: Key[Array, ""] | None, batch: int, dim: int, dtype: Any
    ) -> Array | None:
        """Return noise for a whole batch with leading axis `batch`, or None; consumes `key`."""
        return None

    @abstractmethod
    def __call__(
        self,
        field: Field,
        t: Float[Array, ""],
        x: Float[Array, " dim"],
        context: Float[Array, " context"] | None,
        noise: Any,
    ) -> FieldEvaluation:
        """Return the velocity and the divergence of one sample; `noise` is its own row."""


class FixedNoise(Divergence):
    """A `strategy` that reuses noise drawn before, (batch, ...), instead of drawing new noise.

    `noise` is what `jcnf.flows.Bijection.draw_noise` returns, a tuple with the noise of each part
    if the flow has several.
    """

    strategy: Divergence
    noise: Any

    def draw_noise(self, key, batch, dim, dtype) -> Any:
        """Return the stored noise in `dtype`; `key` is ignored."""
        return jax.tree.map(lambda noise: noise.astype(dtype), self.noise)

    def __call__(self, field, t, x, context, noise):
        return self.strategy(field, t, x, context, noise)
