"""Planar energies U: densities exp(-U) / Z for a flow to match without samples.

Source: U1 to U4 are the test energies of Rezende & Mohamed (2015, table 1), which Chen et al.
(2018, fig. 4) match with continuous flows. The published U2 to U4 depend on z1 only through
periodic or bounded functions, so that exp(-U) has no finite integral and a KL divergence to it has
no meaning. Here they are as published on |z1| <= 4, and a wall confines them: beyond, the term
1/2 ((|z1| - 4) / 0.4)^2 is added, half a Gaussian as narrow as the bands themselves. The wall joins
with a continuous first derivative (its second derivative jumps), and 89 % of the mass stays within
|z1| <= 4.

To add an energy, write a function of one point (2,) and add a row to the table at the end. Energies
from other modules are functions of a batch and are named "module:function".
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import InputError, check_int, import_named, in_a_line

Extent = tuple[float, float, float, float]  # z1 min, z1 max, z2 min, z2 max
Function = Callable[[Float[Array, "batch 2"]], Float[Array, " batch"]]

HALF_WIDTH, WALL = 4.0, 0.4
PROBES_PER_AXIS = 64  # points along each axis of the grid on which a user's energy is tried


@dataclasses.dataclass(frozen=True)
class Energy:
    """An unnormalized density exp(-U) in the plane.

    - `function(x)` is U in nats, (batch, 2) -> (batch,), in the dtype of `x`, and differentiable.
    - `extent` (z1 min, z1 max, z2 min, z2 max) is the window of integrals and figures, which holds
      all but 1e-6 of the mass.
    """

    name: str
    function: Function
    extent: Extent


def energy(name: str, extent: Extent | None = None) -> Energy:
    """Return the energy called `name`: one of `ENERGIES`, or your own as "module:function".

    Your function must map x (batch, 2) to U in nats, (batch,), by operations of jax.numpy. It is
    imported as any module is (under `python -m`, also from the working directory) and tried on a
    grid over `extent`, which must hold its mass. Pass `extent` for your own energies only: those of
    `ENERGIES` have one.

    **Raises:** `InputError` for an unknown name; a module or function that is not found; an extent
    that is missing, not allowed, or not increasing; and a function that JAX cannot trace, that
    returns another shape, or whose values or gradients are not finite.
    """
    if name in ENERGIES:
        if extent is not None:
            raise InputError(f"{name} has its own extent; leave out extent")
        return ENERGIES[name]
    module_name, colon, function_name = str(name).partition(":")
    if not (module_name and colon and function_name):
        raise InputError(
            f"no energy is called {name!r}: use one of {', '.join(ENERGIES)}, or module:function"
        )
    if extent is None:
        raise InputError(
            f"{name} needs extent=(z1_min, z1_max, z2_min, z2_max), a window that holds its mass"
        )
    (a, b, c, d), finite = extent, np.all(np.isfinite(extent))
    if not (a < b and c < d and finite):
        raise InputError(f"extent must be finite and increase along z1 and z2; got {extent}")
    probes = cell_grid(extent, PROBES_PER_AXIS).astype(np.float32)
    if not (np.all(np.diff(probes[0, :, 0]) > 0) and np.all(np.diff(probes[:, 0, 1]) > 0)):
        raise InputError(
            f"extent {extent} is too narrow for float32 at these coordinates: shift or scale U"
        )
    own = Energy(name, _imported(module_name, function_name), extent)
    _try(own)
    return own


def _imported(module_name: str, function_name: str) -> Any:
    function = import_named(module_name, function_name)
    if not callable(function):
        raise InputError(
            f"module {module_name} needs a function, not a value, named {function_name!r}"
        )
    return function


def _try(own: Energy) -> None:
    """Evaluate a user's energy and its gradient on a grid over its extent; raise what is wrong."""
    x = jnp.asarray(cell_grid(own.extent, PROBES_PER_AXIS).reshape(-1, 2), float)
    try:
        jax.eval_shape(own.function, x[:3])  # any batch size must work
        u = jax.eval_shape(own.function, x)
        shape, dtype = jnp.shape(u), jnp.result_type(u)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{own.name} failed for x of shape {x.shape}; it must compute U by operations of "
            f"jax.numpy: {in_a_line(error)}"
        ) from error
    if shape != (len(x),) or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"{own.name} must map x of shape (batch, 2) to a floating U of shape (batch,); for "
            f"{len(x)} points it returned {dtype} of shape {shape}: jax.vmap turns a function of "
            "one point into a function of a batch"
        )
    values, gradients = jax.jit(lambda x: (own.function(x), _gradient(own.function, x)))(x)
    for what, bad in (
        ("", ~jnp.isfinite(values)),
        ("the gradient of ", ~jnp.all(jnp.isfinite(gradients), axis=1)),
    ):
        if jnp.any(bad):
            at = ", ".join(f"{z:.3g}" for z in x[jnp.argmax(bad)].tolist())
            raise InputError(
                f"{what}{own.name} is not finite at {int(bad.sum())} of {len(x)} points of the "
                f"extent (first: ({at})): it must be finite everywhere; use a steep wall instead "
                "of infinity"
            )


def _gradient(function, x):
    return jax.grad(lambda x: jnp.sum(function(x)))(x)


class Integral(NamedTuple):
    """The integral of exp(-U) over a window."""

    log: float  # log Z, nats
    border: float  # share of Z within 1 % of the window's sides; if large, mass lies outside


def integrate(energy: Energy, cells: int = 1000) -> Integral:
    """Compute log Z by the midpoint rule in float64, on `cells` x `cells` cells of the extent.

    For densities that are smooth and vanish at the extent's border, the error of the rule falls
    faster than any power of the cells' width; for U1 to U4 only the mass outside remains, 1e-6.
    """
    points = cell_grid(energy.extent, cells)
    with jax.enable_x64(True):
        # One row at a time keeps the memory small.
        rows = jax.jit(lambda points: jax.lax.map(energy.function, points))
        log_p = -np.asarray(rows(jnp.asarray(points)), np.float64)
    a, b, c, d = energy.extent
    top = log_p.max()
    p = np.exp(log_p - top)
    edge = -(-cells // 100)
    inner = p[edge:-edge, edge:-edge].sum()
    log_area = math.log(b - a) + math.log(d - c) - 2 * math.log(cells)
    return Integral(float(top + math.log(p.sum()) + log_area), float(1 - inner / p.sum()))


def cell_grid(extent: Extent, cells: int) -> Float[np.ndarray, "cells cells 2"]:
    """Midpoints of equal cells of a window; [i, j] has the i-th value of z2 and the j-th of z1."""
    check_int(cells=cells)
    a, b, c, d = extent
    middle = (np.arange(cells) + 0.5) / cells
    return np.stack(np.meshgrid(a + (b - a) * middle, c + (d - c) * middle), axis=-1)


# Energies of one point


def _bump(distance: Array, width: float) -> Array:
    """Return the logarithm of a Gaussian bump."""
    return -0.5 * (distance / width) ** 2


def _wall(z1: Array) -> Array:
    return -_bump(jax.nn.relu(jnp.abs(z1) - HALF_WIDTH), WALL)


def _wave(z1: Array) -> Array:
    return jnp.sin(2 * math.pi / 4 * z1)


def _two_bands(z: Array, width: float, gap: Array, other_width: float) -> Array:
    offset = z[1] - _wave(z[0])
    bands = jnp.logaddexp(_bump(offset, width), _bump(offset + gap, other_width))
    return _wall(z[0]) - bands


def u1(z: Float[Array, "2"]) -> Float[Array, ""]:
    """Energy of a ring of radius 2 with a mode on the left and one on the right."""
    # The gradient of hypot is NaN at the origin; the gradient of this is zero there.
    radius = jnp.sqrt(jnp.maximum(z[0] ** 2 + z[1] ** 2, jnp.finfo(z.dtype).tiny))
    return -_bump(radius - 2, 0.4) - jnp.logaddexp(_bump(z[0] - 2, 0.6), _bump(z[0] + 2, 0.6))


def u2(z: Float[Array, "2"]) -> Float[Array, ""]:
    """Energy of a band along a sine."""
    return _wall(z[0]) - _bump(z[1] - _wave(z[0]), 0.4)


def u3(z: Float[Array, "2"]) -> Float[Array, ""]:
    """Energy of a band along a sine, and a second band that departs from it around z1 = 1."""
    return _two_bands(z, 0.35, 3 * jnp.exp(_bump(z[0] - 1, 0.6)), 0.35)


def u4(z: Float[Array, "2"]) -> Float[Array, ""]:
    """Energy of a band along a sine that splits into two around z1 = 1."""
    return _two_bands(z, 0.4, 3 * jax.nn.sigmoid((z[0] - 1) / 0.3), 0.35)


_TABLE: tuple[tuple[Callable[[Array], Array], Extent], ...] = (
    (u1, (-4.5, 4.5, -4.5, 4.5)),
    (u2, (-6.5, 6.5, -3.5, 3.5)),
    (u3, (-6.5, 6.5, -4.5, 3.5)),
    (u4, (-6.5, 6.5, -6.5, 3.5)),
)

ENERGIES: dict[str, Energy] = {
    one.__name__: Energy(one.__name__, jax.vmap(one), extent) for one, extent in _TABLE
}
