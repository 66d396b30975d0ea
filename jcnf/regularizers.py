"""Penalties on a flow's path, each the rate of one integral carried by the same solve.

A regularizer is a function of one sample, `(field, t, x, context, local) -> rate >= 0`, where
`local` (`jcnf.divergence.Local`) has the velocity and what else the divergence found out, so that
their products are shared. Its name is the name of the penalty. The solve integrates rate * |dt|, so
that penalties are positive whichever way time runs. A new one is one function.

Velocity, Jacobian and potential are v, J = dv/dx and Phi.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.jet import jet
from jaxtyping import Array, Float

from jcnf._checks import check_int
from jcnf.divergence import Local
from jcnf.fields.base import trace_and_square

Rate = Float[Array, ""]


def kinetic(field, t, x, context, local: Local) -> Rate:
    """1/2 |v|^2: straight, slow paths (RNODE, Finlay et al. 2020; OT-Flow, Onken et al. 2021)."""
    return jnp.sum(local.velocity**2) / 2


def jacobian(field, t, x, context, local: Local) -> Rate:
    """|J|_F^2, or its unbiased estimate |J e|^2, by the products that the divergence took (RNODE).

    **Raises:** `ValueError` where it took none.
    """
    return _shared(local)


def jacobian_exact(field, t, x, context, local: Local) -> Rate:
    """|J|_F^2 by forward mode, whatever the divergence: about `dim` evaluations."""
    return trace_and_square(field, t, x, context)[2]


def directional(field, t, x, context, local: Local) -> Rate:
    """1/2 |v'J|^2, the squared gradient of the kinetic rate in x (FFJORD's and RNODE's code)."""
    _, pull = jax.vjp(lambda x: field(t, x, context), x)
    (product,) = pull(local.velocity)
    return jnp.sum(product**2) / 2


def total_derivative(field, t, x, context, local: Local) -> Rate:
    """1/2 |d^2 x/dt^2|^2 = 1/2 |dv/dt + J v|^2 along the path: acceleration, by one jvp."""
    direction = (jnp.ones_like(t), local.velocity)
    _, acceleration = jax.jvp(lambda t, x: field(t, x, context), (t, x), direction)
    return jnp.sum(acceleration**2) / 2


@functools.cache  # one function per order, or every call would compile anew
def taylor(order: int) -> Callable:
    """R_K: |d^K x/dt^K|^2 along the path, by Taylor mode (TayNODE, Kelly et al. 2020).

    The regularizer of order K >= 1, named "taylorK"; `taylor(1)` is |v|^2. Its cost grows as K^2.
    """
    check_int(order=order)

    def rate(field, t, x, context, local: Local) -> Rate:
        # d^k(t, x)/dt^k is (0, d^{k-1}v/dt^{k-1}) from k = 2 on: each pass finds one order more.
        series = [local.velocity]
        for _ in range(order - 1):
            times = [jnp.ones_like(t), *[jnp.zeros_like(t)] * (len(series) - 1)]
            _, higher = jet(lambda t, x: field(t, x, context), (t, x), (times, series))
            series = [local.velocity, *higher]
        return jnp.sum(series[-1] ** 2)

    rate.__name__ = f"taylor{order}"
    return rate


def hjb(field, t, x, context, local: Local) -> Rate:
    """|dPhi/dt - 1/2 |grad Phi|^2| for a field v = -grad Phi (OT-Flow, Onken et al. 2021).

    Where it is zero, paths are straight and their speed is constant. `field` gives
    `gradient(t, x)` (dim + 1,), that of Phi in (x, t).

    **Raises:** `ValueError` for a field without.
    """
    if not hasattr(field, "gradient"):
        raise ValueError("the hjb penalty needs a field with a potential: jcnf.fields.Potential")
    gradient = field.gradient(t, x)
    return jnp.abs(gradient[-1] - jnp.sum(gradient[:-1] ** 2) / 2)


def lambda1(field, t, x, context, local: Local) -> Rate:
    """|v|^2, without the half (DiffEqFlux's FFJORD)."""
    return jnp.sum(local.velocity**2)


def lambda2(field, t, x, context, local: Local) -> Rate:
    """|J e|, not squared (DiffEqFlux's FFJORD, whose |e'J| has the same law for Gaussian e).

    With k probes it is the root of the mean square; with exact products it is |J|_F.

    **Raises:** `ValueError` where the divergence took no products.
    """
    square = _shared(local)
    # The root has no derivative at 0, where a last layer of zeros begins.
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


REGULARIZERS: dict[str, Callable] = {
    r.__name__: r
    for r in (
        kinetic,
        jacobian,
        jacobian_exact,
        directional,
        total_derivative,
        hjb,
        lambda1,
        lambda2,
    )
}


def named(name: str) -> Callable:
    """The regularizer of a name: one of `REGULARIZERS`, or "taylorK" with a number K.

    **Raises:** `ValueError` for an unknown name, listing the known.
    """
    if name in REGULARIZERS:
        return REGULARIZERS[name]
    order = name.removeprefix("taylor")
    if name.startswith("taylor") and order.isascii() and order.isdecimal():
        return taylor(int(order))
    raise ValueError(
        f"unknown penalty {name!r}: use one of {', '.join(REGULARIZERS)}, or taylorK as in taylor3"
    )


def _shared(local):
    if local.frobenius is None:
        raise ValueError(
            "this penalty shares the divergence's products, and a closed form takes none: use "
            "divergence=jcnf.Exact(probes=1) or jcnf.Hutchinson(), or the jacobian_exact penalty"
        )
    return local.frobenius
