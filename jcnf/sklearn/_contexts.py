"""The networks that a context goes through before a flow is given it."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, Key

from jcnf.fields import Embedded
from jcnf.flows import Flow

Embedding = Callable[[Key[Array, ""]], Callable[[Array], Array]]


def network_of(
    embedding: Embedding | None, shape: tuple[int, ...]
) -> Callable[[Key[Array, ""]], "Flattened"] | None:
    """Return an embedding of contexts of a shape as one of flat contexts; None without one."""
    return None if embedding is None else partial(Flattened.of, embedding, shape)


class Flattened(eqx.Module):
    """An embedding of contexts of any shape, as a function of flat ones."""

    network: Callable[[Array], Array]
    shape: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, embedding: Embedding, shape: tuple[int, ...], key: Key[Array, ""]) -> "Flattened":
        """Return the network that the key makes."""
        return cls(embedding(key), shape)

    def __call__(self, x: Float[Array, " context"]) -> Float[Array, " features"]:
        return self.network(x.reshape(self.shape))


class Encoder(eqx.Module):
    """A residual network from a context to as many features as a flow is wide.

    Weight decay applies to it as to the flow.
    """

    layers: list[eqx.nn.Linear]

    def __init__(self, context_dim: int, width: int, depth: int, key: Key[Array, ""]):
        sizes = [context_dim] + [width] * (depth - 1)
        keys = jr.split(key, depth)
        self.layers = [
            eqx.nn.Linear(size, width, key=k) for size, k in zip(sizes, keys, strict=True)
        ]

    def __call__(self, context: Float[Array, " context"]) -> Float[Array, " width"]:
        entry, *others = self.layers
        h = entry(context)
        for layer in others:
            h = h + layer(jax.nn.silu(h))
        return jax.nn.silu(h)


def unembedded(flow: Flow, context: Array | None) -> tuple[Flow, Array | None]:
    """Return the flow that takes features, and the features of each context, computed once."""

    def is_embedded(node):
        return isinstance(node, Embedded)

    nodes = [n for n in jax.tree.leaves(flow, is_leaf=is_embedded) if is_embedded(n)]
    if not nodes:
        return flow, context if flow.context_dim else None
    (node,) = nodes
    inner = jax.tree.map(lambda n: n.field if is_embedded(n) else n, flow, is_leaf=is_embedded)
    return inner, jax.vmap(node.embedding)(context)
