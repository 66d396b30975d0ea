"""The coefficients of explicit Runge-Kutta methods, and sums over their slopes."""

from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Of two stages, for diffrax knows no tableau of one.
_EULER = diffrax.ButcherTableau(
    c=np.array([1.0]),
    a_lower=(np.array([1.0]),),
    b_sol=np.array([1.0, 0.0]),
    b_error=np.array([0.0, 0.0]),
)


def is_explicit(solver: diffrax.AbstractSolver) -> bool:
    """Whether `tableau_of` knows the method."""
    return isinstance(solver, diffrax.Euler) or (
        isinstance(solver, diffrax.AbstractERK)
        and isinstance(getattr(solver, "tableau", None), diffrax.ButcherTableau)
    )


def tableau_of(solver: diffrax.AbstractSolver) -> diffrax.ButcherTableau:
    """The method's coefficients.

    **Raises:** `ValueError` for what is no explicit Runge-Kutta method.
    """
    if not is_explicit(solver):
        raise ValueError(f"this adjoint needs an explicit Runge-Kutta method; got {solver}")
    return _EULER if isinstance(solver, diffrax.Euler) else solver.tableau  # pyright: ignore


def stages(weights: np.ndarray) -> int:
    """How many of the slopes these weights need."""
    return int(np.max(np.flatnonzero(weights), initial=-1)) + 1


def weighted(h: Float[Array, ""], weights: np.ndarray, slopes: Sequence[Any]) -> Any:
    """h sum_i w_i k_i over the slopes k_i that are there; past the last, weights are zero."""
    used = [(float(w), k) for w, k in zip(weights, slopes, strict=False) if w != 0]
    if not used:  # the error of a solver that estimates none
        return jax.tree.map(jnp.zeros_like, slopes[0])
    factors, slopes = zip(*used, strict=True)

    def leaf(*ks):
        return h.astype(ks[0].dtype) * sum(w * k for w, k in zip(factors, ks, strict=True))

    return jax.tree.map(leaf, *slopes)


def slopes_of(vector_field, tableau, t, h, y, args, number: int, first: Any = None) -> list[Any]:
    """The first `number` slopes k_i of a step of size h from y at t, k_1 given or not."""
    slopes = [vector_field(t, y, args) if first is None else first]
    for row, node in zip(tableau.a_lower[: number - 1], tableau.c, strict=False):
        stage = jax.tree.map(jnp.add, y, weighted(h, row, slopes))
        slopes.append(vector_field(t + float(node) * h, stage, args))
    return slopes
