"""Regularizers: penalties on a flow's path, integrated along with it by the same solve.

A regularizer is a function of one sample, `(field, t, x, context, local) -> rate`, with rate >= 0.
`local` (`jcnf.divergence.FieldEvaluation`) holds the velocity and whatever else the divergence
computed at this sample, so that regularizers can reuse its Jacobian products. Results are reported
under the function's name. The solve integrates rate * |dt|, so that a penalty is positive in both
directions of time. To add a regularizer, write one function.

In the formulas, v is the velocity, J = dv/dx its Jacobian and Phi the potential.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.jet import jet
from jaxtyping import Array, Float

from jcnf._checks import check_int
from jcnf.divergence import FieldEvaluation
from jcnf.fields.base import trace_and_frobenius

Rate = Float[Array, ""]


def kinetic(field, t, x, context, local: FieldEvaluation) -> Rate:
    """Kinetic energy 1/2 |v|^2, which favors straight, slow paths.

    Used by RNODE (Finlay et al. 2020) and OT-Flow (Onken et al. 2021).
    """
    return jnp.sum(local.velocity**2) / 2


def jacobian(field, t, x, context, local: FieldEvaluation) -> Rate:
    """Squared Frobenius norm |J|_F^2, or its unbiased estimate |J e|^2 (RNODE).

    It reuses the products that the divergence computed.

    **Raises:** `ValueError` if the divergence computed none.
    """
    return _shared(local)


def jacobian_exact(field, t, x, context, local: FieldEvaluation) -> Rate:
    """|J|_F^2 by forward mode, for any divergence; costs about `dim` evaluations."""
    return trace_and_frobenius(field, t, x, context)[2]


def directional(field, t, x, context, local: FieldEvaluation) -> Rate:
    """1/2 |v'J|^2, where v'J is the gradient of `kinetic` in x (FFJORD's and RNODE's code)."""
    _, pull = jax.vjp(lambda x: field(t, x, context), x)
    (product,) = pull(local.velocity)
    return jnp.sum(product**2) / 2


def total_derivative(field, t, x, context, local: FieldEvaluation) -> Rate:
    """Squared acceleration 1/2 |d^2 x/dt^2|^2 = 1/2 |dv/dt + J v|^2 along the path, by one jvp."""
    direction = (jnp.ones_like(t), local.velocity)
    _, acceleration = jax.jvp(lambda t, x: field(t, x, context), (t, x), direction)
    return jnp.sum(acceleration**2) / 2


@functools.cache  # one function object per order, so that repeated calls do not recompile
def taylor(order: int) -> Callable:
    """Return the regularizer R_K = |d^K x/dt^K|^2 along the path, of order K >= 1.

    It is computed by Taylor mode (TayNODE, Kelly et al. 2020), at a cost that grows as K^2, and is
    named "taylorK"; `taylor(1)` is |v|^2.

    **Raises:** `ValueError` if `order` is not a whole number, at least 1.
    """
    check_int(order=order)

    def rate(field, t, x, context, local: FieldEvaluation) -> Rate:
        # For k >= 2, d^k(t, x)/dt^k = (0, d^{k-1}v/dt^{k-1}). The derivatives of v found so far
        # are therefore the series of the path that `jet` needs to find one order more.
        series = [local.velocity]
        for _ in range(order - 1):
            times = [jnp.ones_like(t), *[jnp.zeros_like(t)] * (len(series) - 1)]
            _, higher = jet(lambda t, x: field(t, x, context), (t, x), (times, series))
            series = [local.velocity, *higher]
        return jnp.sum(series[-1] ** 2)

    rate.__name__ = f"taylor{order}"
    return rate


def hjb(field, t, x, context, local: FieldEvaluation) -> Rate:
    """Hamilton-Jacobi-Bellman residual |dPhi/dt - 1/2 |grad Phi|^2| of v = -grad Phi.

    From OT-Flow (Onken et al. 2021). Where it is zero, paths are straight and their speed is
    constant. It takes the gradient of Phi from `field.gradient`.

    **Raises:** `ValueError` for a field without a known potential.
    """
    gradient = field.gradient(t, x)
    return jnp.abs(gradient[-1] - jnp.sum(gradient[:-1] ** 2) / 2)


def lambda1(field, t, x, context, local: FieldEvaluation) -> Rate:
    """|v|^2, twice the kinetic energy (DiffEqFlux's FFJORD)."""
    return jnp.sum(local.velocity**2)


def lambda2(field, t, x, context, local: FieldEvaluation) -> Rate:
    """|J e|, not squared.

    DiffEqFlux's FFJORD has |e'J|, whose distribution is the same for Gaussian e. With k probes it
    is the root of the mean square; with exact products it is |J|_F.

    **Raises:** `ValueError` if the divergence computed no products.
    """
    square = _shared(local)
    # The root has no derivative at 0, where a field with a last layer of zeros starts. The inner
    # `where` keeps the NaN of the branch not taken out of the gradient.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


_ALL = kinetic, jacobian, jacobian_exact, directional, total_derivative, hjb, lambda1, lambda2
REGULARIZERS: dict[str, Callable] = {r.__name__: r for r in _ALL}


def named(name: str) -> Callable:
    """Return the regularizer with this name: one of `REGULARIZERS`, or "taylorK" with a number K.

    **Raises:** `ValueError` for an unknown name, with a list of the known ones.
    """
    if name in REGULARIZERS:
        return REGULARIZERS[name]
    order = name.removeprefix("taylor")
    if name.startswith("taylor") and order.isascii() and order.isdecimal():
        return taylor(int(order))
    raise ValueError(
        f"unknown regularizer {name!r}: use one of {', '.join(REGULARIZERS)}, "
        "or taylorK as in taylor3"
    )


def _shared(local):
    if local.frobenius is None:
        raise ValueError(
            "this regularizer reuses the divergence's products, but jcnf.Exact() has none: use "
            "divergence=jcnf.Exact(probes=1), jcnf.ForwardMode() or jcnf.Hutchinson(), or "
            "jacobian_exact instead"
        )
    return local.frobenius
