"""An identity that refuses forward mode with an error that names the adjoints that have it."""

from typing import Any

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

MESSAGE = (
    "jax.jvp, jax.jacfwd, jax.linearize and jax.hessian need forward-mode differentiation, which a "
    "solve with adjoint={adjoint!r} does not have: use Solve(adjoint='forward'), or "
    "Solve(adjoint='direct') for second derivatives"
)


def reverse_only(tree: Any, adjoint: str) -> Any:
    """Return `tree` unchanged, for a function whose derivative has reverse mode only.

    JAX's own error for this speaks of a custom_vjp function that the caller has never seen.

    **Raises:** `ValueError` in forward mode, when the tangent is computed or compiled.
    """

    def mark(leaf):
        return _identity.bind(leaf, adjoint=adjoint) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree.map(mark, tree)


def _refuse(*args, adjoint):
    raise ValueError(MESSAGE.format(adjoint=adjoint))


def _same(x, *, adjoint):
    return x


def _jvp(primals, tangents, *, adjoint):
    (tangent,) = tangents
    if type(tangent) is not ad.Zero:
        tangent = _tangent.bind(tangent, adjoint=adjoint)
    return _identity.bind(*primals, adjoint=adjoint), tangent


_identity = Primitive("reverse_only")
_identity.def_impl(_same)
_identity.def_abstract_eval(_same)
mlir.register_lowering(_identity, lambda context, x, *, adjoint: [x])
batching.defvectorized(_identity)
ad.primitive_jvps[_identity] = _jvp

# Reverse mode only transposes this one, and never evaluates, batches or lowers it.
_tangent = Primitive("reverse_only_tangent")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(_same)
mlir.register_lowering(_tangent, _refuse)
batching.primitive_batchers[_tangent] = _refuse
ad.deflinear2(_tangent, lambda cotangent, x, *, adjoint: [cotangent])
