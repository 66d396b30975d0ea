"""The 3 x 3 convolution, with derivatives that stay fast inside a solve.

XLA's CPU compiler runs a convolution by a library only where its operands are laid out as batch,
height, width, channels, and outside loops alone does it bring others into that form (openxla's
ConvCanonicalization; jax issue 12868). Those that automatic differentiation makes of one are not
so laid out: inside an ODE solve they take some twenty times as long. So the convolution is a
primitive here, bilinear, whose transposes are such convolutions again.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

KERNEL = 3  # pixels a side
LAYOUT = ("NHWC", "HWIO", "NHWC")


def convolve(
    h: Float[Array, "height width in"],
    weight: Float[Array, "out patch"],
    bias: Float[Array, " out"],
) -> Float[Array, "height width out"]:
    """The linear layer of the 3 x 3 pixels around each pixel, zeros beyond the border."""
    kernel = weight.T.reshape(KERNEL, KERNEL, h.shape[-1], -1)
    return convolution.bind(h[None], kernel)[0] + bias[None, None]


def _convolution(h, kernel):
    """(n, height, width, out) of (n, height, width, in) and (3, 3, in, out)."""
    return jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


def _correlation(h, out):
    """(3, 3, in, out): what `out` (n, height, width, out) is to the kernel, where `h` went in."""
    # Channels in place of pictures, pictures in place of channels, and `out` for a kernel.
    images, kernel = jnp.transpose(h, (3, 1, 2, 0)), jnp.transpose(out, (1, 2, 0, 3))
    pads = [(KERNEL // 2, KERNEL // 2)] * 2
    shifts = jax.lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=LAYOUT)
    return jnp.transpose(shifts, (1, 2, 0, 3))


def _to_input(cotangent, h, kernel):
    return convolution.bind(cotangent, jnp.flip(jnp.swapaxes(kernel, 2, 3), (0, 1)))


def _to_kernel(cotangent, h, kernel):
    return correlation.bind(h, cotangent)


def _to_first(cotangent, h, out):
    return _to_input(out, None, cotangent)


def _to_second(cotangent, h, out):
    return convolution.bind(h, cotangent)


def _primitive(name, function, transposes):
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function))
    primitive.def_abstract_eval(lambda *args: jax.core.ShapedArray(**_shape(function, args)))
    ad.defbilinear(primitive, *transposes)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    return primitive


def _shape(function, args):
    out = jax.eval_shape(function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args))
    return {"shape": out.shape, "dtype": out.dtype}


convolution = _primitive("convolution3x3", _convolution, (_to_input, _to_kernel))
correlation = _primitive("correlation3x3", _correlation, (_to_first, _to_second))


def _batched_convolution(args, axes):
    (h, kernel), (axis, kernel_axis) = args, axes
    if kernel_axis is None:  # more pictures
        h = jnp.moveaxis(h, axis, 0)
        out = convolution.bind(h.reshape(-1, *h.shape[2:]), kernel)
        return out.reshape(*h.shape[:2], *out.shape[1:]), 0
    return jax.vmap(_convolution, in_axes=axes)(h, kernel), 0


def _batched_correlation(args, axes):
    return jax.vmap(_correlation, in_axes=axes)(*args), 0


batching.primitive_batchers[convolution] = _batched_convolution
batching.primitive_batchers[correlation] = _batched_correlation
