"""What every divergence strategy is: noise drawn once a solve, and a call on one sample."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key


class Local(eqx.Module):
    """What a strategy finds out about a field at one sample, for the log-det and the penalties.

    `frobenius` is |dv/dx|_F^2 or an unbiased estimate of it, from the products that the divergence
    took anyway; None where it took none.
    """

    velocity: Float[Array, " dim"]
    divergence: Float[Array, ""]
    frobenius: Float[Array, ""] | None = None


class Divergence(eqx.Module):
    """How tr(dv/dx) is found. Subclass it to add an estimator.

    The noise is drawn by `draw` once per solve, per sample and probe: an estimate that changed
    within a solve would not be a field at all (FFJORD, Grathwohl et al. 2019, section 3.1).
    """

    def draw(self, key: Key[Array, ""] | None, batch: int, dim: int, dtype) -> Array | None:
        """Noise for a whole batch with leading axis `batch`, or None; consumes `key`."""
        return None

    def of_part(self, number: int) -> "Divergence":
        """The strategy for the solve of this number, where a flow takes several."""
        return self

    @abstractmethod
    def __call__(self, field, t, x, context, noise) -> Local:
        """The velocity at `x` (dim,) and `t`, with its divergence, for one sample."""


class Drawn(Divergence):
    """`strategy` with the noise it drew before, (batch, ...), in place of new noise.

    `noise` is what `jcnf.flows.Bijection.draw_noise` gives: of a flow in several parts, each one's.
    """

    strategy: Divergence
    noise: Any

    def draw(self, key, batch, dim, dtype):
        """The noise it holds, in `dtype`."""
        return jax.tree.map(lambda noise: noise.astype(dtype), self.noise)

    def of_part(self, number):
        """With that part's noise."""
        return Drawn(self.strategy, None if self.noise is None else self.noise[number])

    def __call__(self, field, t, x, context, noise):
        """As `strategy`."""
        return self.strategy(field, t, x, context, noise)
