"""Bijections one after another, and flows of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jcnf._checks import check_instance
from jcnf.distributions import Base
from jcnf.divergence import Divergence
from jcnf.flows.base import Bijection, Direction, Flow, Transformed
from jcnf.ode import Solve, Stats


class Composition(Bijection):
    """Bijections one after another: log-dets, penalties and costs add up.

    A solve that fails leaves its last state to the next part, and the flag to the whole.

    **Arguments:**

    - `parts`: `jcnf.flows.Bijection`s of one dimension, the base's side first. The base of one that
      is a flow plays no role.

    **Raises:** `ValueError` for no parts, for others than bijections, and for parts that take
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
                    f"a part must be a jcnf.flows.Bijection; got a {type(part).__name__}: "
                    "of a field make jcnf.flows.ODE(field)"
                )
        sizes = {size for part in parts if (size := part.context_dim)}
        if not parts or len(sizes) > 1:
            raise ValueError(
                "a composition needs parts, with contexts of one size if any; "
                f"got {len(parts)} with contexts of sizes {sorted(sizes)}"
            )
        self.parts = tuple(parts)

    @property
    def context_dim(self) -> int | None:
        """That of the parts that take a context; None where one of them does not say."""
        sizes = [part.context_dim for part in self.parts]
        known = [size for size in sizes if size is not None]
        return max(known) if len(known) == len(sizes) else None

    def _in_order(self, direction):
        order = list(enumerate(self.parts))
        return order if direction == "to_data" else order[::-1]

    def carry(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
    ) -> tuple[Float[Array, "batch dim"], Stats]:
        """Through one part after the other."""
        total = Stats.unsolved(x)
        for _, part in self._in_order(direction):
            x, stats = part.carry(x, direction, _given(part, context), solve)
            total += stats
        return x, total

    def carry_with_logdet(
        self,
        x: Float[Array, "batch dim"],
        direction: Direction,
        key: Key[Array, ""] | None,
        context: Float[Array, "batch context"] | None,
        solve: Solve,
        divergence: Divergence,
        regularizers: tuple[Callable, ...],
    ) -> Transformed:
        """Through one part after the other, each with noise of its own."""
        keys = self._keys(key)
        logdet = jnp.zeros(len(x), x.dtype)
        penalties = {r.__name__: logdet for r in regularizers}
        total = Stats.unsolved(x)
        for i, part in self._in_order(direction):
            own, given = divergence.of_part(i), _given(part, context)
            end = part.carry_with_logdet(x, direction, keys[i], given, solve, own, regularizers)
            x, logdet, total = end.x, logdet + end.logdet, total + end.stats
            penalties = {n: value + end.penalties.get(n, 0) for n, value in penalties.items()}
        return Transformed(x, logdet, penalties, total)

    def draw_noise(
        self, divergence: Divergence, key: Key[Array, ""] | None, batch: int, dim: int, dtype
    ) -> tuple:
        """That of each part."""
        parts = enumerate(zip(self.parts, self._keys(key), strict=True))
        return tuple(
            part.draw_noise(divergence.of_part(i), k, batch, dim, dtype) for i, (part, k) in parts
        )

    def _keys(self, key) -> Any:
        return [None] * len(self.parts) if key is None else jax.random.split(key, len(self.parts))


class Chain(Composition, Flow):
    """A base distribution carried to data by bijections, one after another.

    **Arguments:**

    - `parts`: as of `Composition`, the base's side first.
    - `base`: a `jcnf.distributions.Base` of their dimension.

    **Raises:** `ValueError` as `Composition` does.
    """

    base: Base

    def __init__(self, parts: Sequence[Bijection], base: Base):
        super().__init__(parts)
        check_instance(Base, "one of jcnf.distributions, as StandardNormal(dim) is", base=base)
        self.base = base


def _given(part, context):
    return None if part.context_dim == 0 else context
