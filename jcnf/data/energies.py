"""Planar energies U: densities exp(-U) / Z for a flow to match, without a sample of them.

Source: U1 to U4 are the test energies of Rezende & Mohamed (2015, table 1), which Chen et al.
(2018, fig. 4) match by continuous flows. There U2 to U4 do not depend on z1 but through periodic or
bounded functions, so that exp(-U) has no finite integral, and a KL to it no meaning. Here they are
as published on |z1| <= 4, and a wall confines them: beyond, 1/2 ((|z1| - 4) / 0.4)^2 is added,
half a Gaussian as narrow as the bands themselves. It joins with two continuous derivatives but for
a jump of the second, and keeps 89 % of the mass within |z1| <= 4.

A new energy is a function of one point (2,) and a row of the table at the end. A person's own, of a
batch, is named "module:function".
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import InputError, check_int

Extent = tuple[float, float, float, float]  # lowest and highest z1, lowest and highest z2
Function = Callable[[Float[Array, "batch 2"]], Float[Array, " batch"]]

HALF_WIDTH, WALL = 4.0, 0.4
PROBES = 64  # points an axis, at which a person's energy is tried


@dataclasses.dataclass(frozen=True)
class Energy:
    """An unnormalised density exp(-U) in the plane.

    - `function(x)` is U in nats, (batch, 2) -> (batch,), in the dtype of `x`, and differentiable.
    - `extent` (z1 min, z1 max, z2 min, z2 max) holds all mass but 1e-6: the window of integrals
      and figures.
    """

    name: str
    function: Function
    extent: Extent


def energy(name: str, extent: Extent | None = None) -> Energy:
    """The energy called `name`: one of `ENERGIES`, or a person's, "module:function".

    The function of a module maps x (batch, 2) to U in nats, (batch,), by operations of jax.numpy.
    It is imported, as from the working directory under `python -m`, and tried at points all over
    `extent`, which must hold its mass. `extent` is for these alone: others have their own.

    **Raises:** `InputError` for an unknown name, a module or function that is not found, an
    extent that is missing, given in vain or does not rise, and a function that JAX cannot trace,
    that gives another shape, or values or gradients that are not finite.
    """
    if name in ENERGIES:
        if extent is not None:
            raise InputError(f"{name} has an extent of its own: leave out --extent")
        return ENERGIES[name]
    module_name, colon, function_name = str(name).partition(":")
    if not (module_name and colon and function_name):
        raise InputError(
            f"no energy is called {name!r}: use one of {', '.join(ENERGIES)}, or module:function"
        )
    if extent is None:
        raise InputError(
            f"{name} needs --extent Z1_MIN Z1_MAX Z2_MIN Z2_MAX: a window that holds its mass"
        )
    (a, b, c, d), finite = extent, np.all(np.isfinite(extent))
    if not (a < b and c < d and finite):
        raise InputError(f"--extent must be finite, and rise along z1 and z2; got {extent}")
    probes = cell_grid(extent, PROBES).astype(np.float32)
    if not (np.all(np.diff(probes[0, :, 0]) > 0) and np.all(np.diff(probes[:, 0, 1]) > 0)):
        raise InputError(f"--extent {extent} is too small for its numbers: shift or scale U")
    own = Energy(name, _imported(module_name, function_name), extent)
    _try(own)
    return own


def _imported(module_name: str, function_name: str) -> Any:
    try:
        module: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = "" if error.name == module_name else f" (it imports {error.name}, which is missing)"
        raise InputError(
            f"no module {module_name!r} to import{hint}: give module:function, with the module's "
            "file in the working directory or on PYTHONPATH"
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(f"importing {module_name} failed: {_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no" if function is None else "has something that is no function by the name of"
        raise InputError(f"module {module_name} {what} {function_name!r}")
    return function


def _try(own: Energy) -> None:
    """A person's energy, and its gradient, at points all over its extent."""
    x = jnp.asarray(cell_grid(own.extent, PROBES).reshape(-1, 2), float)
    try:
        jax.eval_shape(own.function, x[:3])  # of any batch
        u = jax.eval_shape(own.function, x)
        shape, dtype = jnp.shape(u), jnp.result_type(u)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{own.name} failed for x of shape {x.shape}, of which it must make U by operations of "
            f"jax.numpy: {_line(error)}"
        ) from error
    if shape != (len(x),) or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"{own.name} must map x of shape (batch, 2) to a floating U of shape (batch,); for "
            f"{len(x)} points it gave {dtype} of shape {shape}: jax.vmap makes a function of one "
            "point one of a batch"
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
                f"extent, at ({at}) for one: it must be finite everywhere, with a steep wall in "
                "place of infinity"
            )


def _gradient(function, x):
    return jax.grad(lambda x: jnp.sum(function(x)))(x)


def _line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


class Integral(NamedTuple):
    """The integral of exp(-U) over a window."""

    log: float  # its logarithm, log Z, nats
    border: float  # the share of it within 1 % of the window's sides: of much, some is outside


def integrate(energy: Energy, cells: int = 1000) -> Integral:
    """log Z of an energy, by the midpoint rule in float64 on `cells` x `cells` cells of its extent.

    For densities that are smooth and vanish at the extent's border the rule's error falls faster
    than any power of the cells' width; what is left for U1 to U4 is the mass outside, 1e-6.
    """
    points = cell_grid(energy.extent, cells)
    with jax.enable_x64(True):
        # A row at a time: its memory stays small.
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
    """Midpoints of equal cells of a window, [i, j] for the i-th value of z2 and j-th of z1."""
    check_int(cells=cells)
    a, b, c, d = extent
    middle = (np.arange(cells) + 0.5) / cells
    return np.stack(np.meshgrid(a + (b - a) * middle, c + (d - c) * middle), axis=-1)


# Energies of one point


def _bump(distance: Array, width: float) -> Array:
    """The logarithm of a Gaussian bump."""
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
    """A ring of radius 2 with a mode at each side."""
    # Not hypot, whose gradient at the origin is NaN; that of this is zero there.
    radius = jnp.sqrt(jnp.maximum(z[0] ** 2 + z[1] ** 2, jnp.finfo(z.dtype).tiny))
    return -_bump(radius - 2, 0.4) - jnp.logaddexp(_bump(z[0] - 2, 0.6), _bump(z[0] + 2, 0.6))


def u2(z: Float[Array, "2"]) -> Float[Array, ""]:
    """A band along a sine."""
    return _wall(z[0]) - _bump(z[1] - _wave(z[0]), 0.4)


def u3(z: Float[Array, "2"]) -> Float[Array, ""]:
    """A band along a sine, and one that leaves it for a while around z1 = 1."""
    return _two_bands(z, 0.35, 3 * jnp.exp(_bump(z[0] - 1, 0.6)), 0.35)


def u4(z: Float[Array, "2"]) -> Float[Array, ""]:
    """A band along a sine that splits into two around z1 = 1."""
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
