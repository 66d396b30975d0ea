"""Compositions of bijections, and flows made of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf._checks import check_instance
from jcnf.distributions import BaseDistribution
from jcnf.divergence import Divergence
from jcnf.flows.base import Bijection, Direction, Flow, Transformed
from jcnf.ode import Solve, Stats


class Composition(Bijection):
    """Bijections applied one after another: log-dets, regularizers and costs add up.

    A row whose solve fails in one part still goes through the next parts, and `stats.failed` flags
    it at the end.

    **Arguments:**

    - `parts`: `jcnf.flows.Bijection`s of one dimension, starting at the base side. If a part is a
      flow, its base is ignored.

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
                raise ValueError(
                    f"each part must be a jcnf.flows.Bijection; got a {type(part).__name__}: "
                    "wrap a field in jcnf.flows.ODE(field)"
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
        """Size of the context that the parts share, 0 for none; None if a part's is unknown."""
        sizes = [part.context_dim for part in self.parts]
        known = [size for size in sizes if size is not None]
        return max(known) if len(known) == len(sizes) else None

    def _in_order(self, direction):
        order = list(enumerate(self.parts))
        return order if direction == "to_data" else order[::-1]

    def transform(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
    ) -> tuple[Float[Array, "batch dim"], Stats]:
        total = Stats.unsolved(x)
        for _, part in self._in_order(direction):
            x, stats = part.transform(x, direction, _given(part, context), solve)
            total += stats
        return x, total

    def transform_and_log_det(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        key: Key[Array, ""] | None,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
        divergence: Divergence,
        regularizers: tuple[Callable, ...],
    ) -> Transformed:
        """Carry the batch through each part in turn; each gets its own share of `key`."""
        keys = self._keys(key)
        logdet = jnp.zeros(len(x), x.dtype)
        costs = {r.__name__: logdet for r in regularizers}
        total = Stats.unsolved(x)
        for i, part in self._in_order(direction):
            own, given = divergence.of_part(i), _given(part, context)
            end = part.transform_and_log_det(x, direction, keys[i], given, solve, own, regularizers)
            x, logdet, total = end.x, logdet + end.logdet, total + end.stats
            costs = {n: value + end.regularizers.get(n, 0) for n, value in costs.items()}
        return Transformed(x, logdet, costs, total)

    def draw_noise(
        self, divergence: Divergence, key: Key[Array, ""] | None, batch: int, dim: int, dtype
    ) -> tuple:
        """Return the noise of each part, as a tuple."""
        parts = enumerate(zip(self.parts, self._keys(key), strict=True))
        return tuple(
            part.draw_noise(divergence.of_part(i), k, batch, dim, dtype) for i, (part, k) in parts
        )

    def _keys(self, key) -> Any:
        return [None] * len(self.parts) if key is None else jax.random.split(key, len(self.parts))


class Chain(Composition, Flow):
    """A base distribution carried to data by bijections applied one after another.

    **Arguments:**

    - `parts`: the parts of a `Composition`, starting at the base side.
    - `base`: a `jcnf.distributions.BaseDistribution` of the same dimension.

    **Raises:** the errors of `Composition`, and `ValueError` for another kind of `base`.
    """

    base: BaseDistribution

    def __init__(self, parts: Sequence[Bijection], base: BaseDistribution):
        super().__init__(parts)
        check_instance(
            BaseDistribution, "one of jcnf.distributions, such as StandardNormal(dim)", base=base
        )
        self.base = base


def _given(part, context):
    return None if part.context_dim == 0 else context
