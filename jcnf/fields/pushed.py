"""Vectors pushed through a layer: W diag(d) u, by whatever form suits what a batch shares.

Samples at one time share the weights W(t), and vectors u that are rows of them, but not the slopes
d. Then W diag(d) u = (W diag(u)) d: matrices of t alone, which are written, and kept for gradients,
once in place of d o u for each sample. Samples with times of their own, as under a `vmap` of
solves, share nothing, and have no room for a matrix each. Only a primitive is told which it is.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def push(
    vectors: Float[Array, "vectors in"], slope: Float[Array, " in"], weight: Float[Array, "out in"]
) -> Float[Array, "vectors out"]:
    """W diag(d) u of each row u of `vectors`, with d the `slope` and W the `weight`."""
    # A primitive is lowered where `jax.default_matmul_precision` holds no more: note it here.
    config: Any = jax.config
    return pushed.bind(vectors, slope, weight, precision=config.jax_default_matmul_precision)


def _by_vectors(vectors, slope, weight, precision):
    return jnp.matmul(slope[None] * vectors, weight.T, precision=precision)


def _by_matrices(vectors, slope, weight, precision):
    # Of the shape whose gradient is fast, as `jcnf.fields.turned` has it.
    matrices = (vectors.T[:, :, None] * weight.T[:, None]).reshape(len(slope), -1)
    return jnp.matmul(slope, matrices, precision=precision).reshape(len(vectors), len(weight))


def _batched(args, axes, **params):
    shared = axes[0] is None and axes[2] is None
    # The matrices have as many rows as W, the vectors as the batch.
    slope, weight = args[1:]
    fewer = shared and len(weight) <= slope.shape[axes[1]]
    form = partial(_by_matrices if fewer else _by_vectors, **params)
    return jax.vmap(form, in_axes=axes)(*args), 0


def _shaped(vectors, slope, weight, precision):
    return ShapedArray((vectors.shape[0], weight.shape[0]), vectors.dtype)


pushed = Primitive("pushed")
pushed.def_impl(jax.jit(_by_vectors, static_argnames="precision"))
pushed.def_abstract_eval(_shaped)
batching.primitive_batchers[pushed] = _batched
mlir.register_lowering(pushed, mlir.lower_fun(_by_vectors, multiple_results=False))
# It is linear in each.
ad.defjvp(
    pushed,
    lambda tangent, u, d, w, **params: _by_vectors(tangent, d, w, **params),
    lambda tangent, u, d, w, **params: _by_vectors(u, tangent, w, **params),
    lambda tangent, u, d, w, **params: _by_vectors(u, d, tangent, **params),
)
