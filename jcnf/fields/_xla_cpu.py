"""Workarounds for XLA's CPU compiler: convolutions, products and transposes that stay fast."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

# The 3 x 3 convolution, with derivatives that stay fast inside a solve.
#
# XLA's CPU compiler calls a library for a convolution only if its operands are laid out as batch,
# height, width, channels, and it converts other layouts to this one only outside of loops
# (openxla's ConvCanonicalization; jax issue 12868). The convolutions that automatic differentiation
# derives from one have other layouts: inside an ODE solve they take about twenty times as long. The
# convolution is therefore a bilinear primitive here, and its transposes are convolutions in the
# fast layout again.

KERNEL_SIZE = 3
LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    h: Float[Array, "height width in"],
    weight: Float[Array, "out patch"],
    bias: Float[Array, " out"],
) -> Float[Array, "height width out"]:
    """Apply a linear layer to the 3 x 3 pixels around each pixel, with zeros beyond the border."""
    kernel = weight.T.reshape(KERNEL_SIZE, KERNEL_SIZE, h.shape[-1], -1)
    # A primitive is lowered after a `jax.default_matmul_precision` context has ended: read it now.
    config: Any = jax.config
    precision = config.jax_default_matmul_precision
    return convolution.bind(h[None], kernel, precision=precision)[0] + bias[None, None]


def _convolution(h, kernel, precision):
    """Map h (n, height, width, in) and kernel (3, 3, in, out) to (n, height, width, out)."""
    return jax.lax.conv_general_dilated(
        h, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, precision=precision
    )


def _correlation(h, out, precision):
    """Return the cotangent of the kernel (3, 3, in, out), from that of the output `out` and `h`."""
    # A convolution too: images and channels swap their roles, and `out` is the kernel.
    images, kernel = jnp.transpose(h, (3, 1, 2, 0)), jnp.transpose(out, (1, 2, 0, 3))
    pads = [(KERNEL_SIZE // 2, KERNEL_SIZE // 2)] * 2
    shifts = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), pads, dimension_numbers=LAYOUT, precision=precision
    )
    return jnp.transpose(shifts, (1, 2, 0, 3))


# Transpose rules: the cotangent of either argument of the convolution (input, kernel) and of the
# correlation (first, second) is again a convolution or a correlation.


def _to_input(cotangent, h, kernel, **params):
    return convolution.bind(cotangent, jnp.flip(jnp.swapaxes(kernel, 2, 3), (0, 1)), **params)


def _to_kernel(cotangent, h, kernel, **params):
    return correlation.bind(h, cotangent, **params)


def _to_first(cotangent, h, out, **params):
    return _to_input(out, None, cotangent, **params)


def _to_second(cotangent, h, out, **params):
    return convolution.bind(h, cotangent, **params)


def _primitive(name, function, transposes):
    def shaped(*args, **params):
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
        out = jax.eval_shape(partial(function, **params), *args)
        return ShapedArray(out.shape, out.dtype)

    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function, static_argnames="precision"))
    primitive.def_abstract_eval(shaped)
    ad.defbilinear(primitive, *transposes)
    jet.jet_rules[primitive] = partial(jet._bilinear_taylor_rule, primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


convolution = _primitive("convolution3x3", _convolution, (_to_input, _to_kernel))
correlation = _primitive("correlation3x3", _correlation, (_to_first, _to_second))


def _batched_convolution(args, axes, **params):
    (h, kernel), (axis, kernel_axis) = args, axes
    if kernel_axis is None:  # with a shared kernel, a batch is just more images
        h = jnp.moveaxis(h, axis, 0)
        out = convolution.bind(h.reshape(-1, *h.shape[2:]), kernel, **params)
        return out.reshape(*h.shape[:2], *out.shape[1:]), 0
    return jax.vmap(partial(_convolution, **params), in_axes=axes)(h, kernel), 0


def _batched_correlation(args, axes, **params):
    return jax.vmap(partial(_correlation, **params), in_axes=axes)(*args), 0


batching.primitive_batchers[convolution] = _batched_convolution
batching.primitive_batchers[correlation] = _batched_correlation


# Vectors pushed through a layer, W diag(d) u, in the form that suits what the batch shares.
#
# Samples at the same time share the weights W(t) and the vectors u, which are rows of weights, but
# not the slopes d. Then W diag(d) u = (W diag(u)) d, where the matrices W diag(u) depend only on t:
# they are written, and kept for gradients, once for the batch instead of d o u for each sample.
# Samples with different times, as under a `vmap` of solves, share nothing, and a matrix for each
# would take too much memory. Only the batching rule of a primitive sees which case it is.


def push(
    vectors: Float[Array, "vectors in"], slope: Float[Array, " in"], weight: Float[Array, "out in"]
) -> Float[Array, "vectors out"]:
    """Return W diag(d) u for each row u of `vectors`, with d the `slope` and W the `weight`."""
    # A primitive is lowered after a `jax.default_matmul_precision` context has ended: read it now.
    config: Any = jax.config
    return pushed.bind(vectors, slope, weight, precision=config.jax_default_matmul_precision)


def _by_vectors(vectors, slope, weight, precision):
    return jnp.matmul(slope[None] * vectors, weight.T, precision=precision)


def _by_matrices(vectors, slope, weight, precision):
    # The product is written as slope @ A, with A (in, vectors * out), because the gradient in an A
    # with long rows is fast (see `turned`).
    matrices = (vectors.T[:, :, None] * weight.T[:, None]).reshape(len(slope), -1)
    return jnp.matmul(slope, matrices, precision=precision).reshape(len(vectors), len(weight))


def _batched(args, axes, **params):
    shared = axes[0] is None and axes[2] is None
    # For each u, W diag(u) has len(weight) rows, and d o u one row per sample: write the fewer.
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
# The product is linear in each argument.
ad.defjvp(
    pushed,
    lambda tangent, u, d, w, **params: _by_vectors(tangent, d, w, **params),
    lambda tangent, u, d, w, **params: _by_vectors(u, tangent, w, **params),
    lambda tangent, u, d, w, **params: _by_vectors(u, d, tangent, **params),
)


# Matrices laid out so that XLA's CPU compiler computes their gradients fast.


jet.deflinear(jax.lax.optimization_barrier_p)  # jax defines no `jet` rule for the barrier


def turned(matrix: Float[Array, "out in"]) -> Float[Array, "in out"]:
    """Return the transpose of a matrix, and keep XLA from transposing it back.

    The gradient of x @ A in A is a product over the batch and has the shape of A. On CPU it takes
    two to three times as long if A's rows are shorter than its columns.
    """
    return jax.lax.optimization_barrier(matrix.T)
