"""Compositions of bijections, and flows made of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcnf.distributions import BaseDistribution
from jcnf.flows.base import Bijection, Flow, Transformed
from jcnf.manifolds import Manifold
from jcnf.ode import Stats


class Composition(Bijection):
    """Bijections applied one after another: log-dets, regularizers and costs add up.

    A row whose solve fails in one part still goes through the next parts, and `stats.failed` flags
    it at the end.

    **Arguments:**

    - `parts`: `jcnf.flows.Bijection`s of one dimension, starting at the base side.

    **Raises:** `ValueError` if there are no parts, if a part is not a bijection, or if parts take
    contexts of different sizes.
    """

    parts: tuple[Bijection, ...]

    def __init__(self, parts: Sequence[Bijection]):
        if not isinstance(parts, Sequence):
            raise ValueError(
                f"parts must be a sequence of bijections; got a {type(parts).__name__}"
            )
        for part in parts:
            if not isinstance(part, Bijection):
                advice = "flow.bijection" if isinstance(part, Flow) else "jcnf.flows.ODE(field)"
                raise ValueError(
                    f"each part must be a jcnf.flows.Bijection; got a {type(part).__name__}: "
                    f"use {advice}"
                )
        sizes = {size for part in parts if (size := part.context_dim)}
        if not parts or len(sizes) > 1:
            raise ValueError(
                "expected at least one part, and contexts of one size if any; "
                f"got {len(parts)} parts with contexts of sizes {sorted(sizes)}"
            )
        self.parts = tuple(parts)

    @property
    def context_dim(self) -> int | None:
        """Size of the context that the parts share, 0 for none; None if any size will do."""
        sizes = [part.context_dim for part in self.parts]
        known = [size for size in sizes if size is not None]
        return max(known) if len(known) == len(sizes) else None

    @property
    def manifold(self) -> Manifold | None:
        """The manifold of the last part, whose result is the data; None for R^dim."""
        return self.parts[-1].manifold

    def forward(self, x, context, solve):
        total = Stats.unsolved(x)
        for part in self.parts:
            x, stats = part.forward(x, context, solve)
            total += stats
        return x, total

    def inverse(self, x, context, solve):
        total = Stats.unsolved(x)
        for part in reversed(self.parts):
            x, stats = part.inverse(x, context, solve)
            total += stats
        return x, total

    def forward_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        done = Transformed.unsolved(x, jnp.zeros(len(x), x.dtype), regularizers)
        for part, own in self._with(noise):
            done = done.then(
                part.forward_and_log_det(done.value, context, solve, divergence, own, regularizers)
            )
        return done

    def inverse_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        done = Transformed.unsolved(x, jnp.zeros(len(x), x.dtype), regularizers)
        for part, own in reversed(self._with(noise)):
            done = done.then(
                part.inverse_and_log_det(done.value, context, solve, divergence, own, regularizers)
            )
        return done

    def _with(self, noise):
        """Return pairs of each part and its noise."""
        noises = [None] * len(self.parts) if noise is None else noise
        return list(zip(self.parts, noises, strict=True))

    def draw_noise(self, divergence, key, batch, dim, dtype):
        """Return the noise of each part, as a tuple; each gets its own share of `key`."""
        keys: Any = [None] * len(self.parts)
        if key is not None:
            keys = jax.random.split(key, len(self.parts))
        return tuple(
            part.draw_noise(divergence, k, batch, dim, dtype)
            for part, k in zip(self.parts, keys, strict=True)
        )


def Chain(parts: Sequence[Bijection], base: BaseDistribution) -> Flow[Composition]:
    """Return the flow of a base distribution that `Composition(parts)` carries to data.

    **Raises:** the errors of `Composition` and of `jcnf.flows.Flow`.
    """
    return Flow(Composition(parts), base)
