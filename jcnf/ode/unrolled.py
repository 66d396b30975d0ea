"""Explicit Runge-Kutta steps with their stages written out.

diffrax runs the stages of a step as a loop over a buffer of slopes. For a field of a few matrix
products, that loop costs as much as the field. XLA also cannot fuse across its iterations, and it
cannot drop results that nobody reads, such as the error estimate of a step that the backward pass
takes again.
"""

# diffrax declares these members as class variables, and its own wrappers override them likewise.
# pyright: reportIncompatibleVariableOverride=false, reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Unrolled(diffrax.AbstractWrappedSolver):
    """An explicit Runge-Kutta method of diffrax, for ODEs, with the stages of a step unrolled.

    It has the coefficients and the dense output of `solver`. For "first same as last" methods, the
    solver state is the slope at the start of the step, which the last step has computed; otherwise
    it is None.
    """

    solver: Any  # a diffrax.AbstractERK
    # diffrax counts a wrapper as an instance of what it wraps, and some of its adjoints set
    # `scan_kind` of a Runge-Kutta method where it is None. Here it has no effect.
    scan_kind: ClassVar[str] = "lax"

    @property
    def term_structure(self):
        return diffrax.AbstractTerm

    @property
    def interpolation_cls(self):
        return self.solver.interpolation_cls

    def order(self, terms):
        return self.solver.order(terms)

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def init(self, terms, t0, t1, y0, args):
        return terms.vf(t0, y0, args) if self.solver.tableau.fsal else None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        tableau = self.solver.tableau
        if not (tableau.fsal and made_jump is False):
            solver_state = terms.vf(t0, y0, args)
        h = terms.contr(t0, t1)
        slopes, stage = slopes_of_step(tableau, terms, t0, t1, y0, args, solver_state)
        if tableau.ssal:  # the last stage is the solution
            y1 = stage
        else:
            y1 = jax.tree.map(jnp.add, y0, weighted_sum(h, tableau.b_sol, slopes))
        error = weighted_sum(h, tableau.b_error, slopes)
        k = jax.tree.map(lambda *rows: h.astype(rows[0].dtype) * jnp.stack(rows), *slopes)
        last = slopes[-1] if tableau.fsal else None
        return y1, error, {"y0": y0, "y1": y1, "k": k}, last, diffrax.RESULTS.successful


def is_explicit(solver: diffrax.AbstractSolver) -> bool:
    """Return whether a solver is an explicit Runge-Kutta method with a tableau."""
    return isinstance(solver, diffrax.AbstractERK) and isinstance(
        getattr(solver, "tableau", None), diffrax.ButcherTableau
    )


def needed(weights: np.ndarray) -> int:
    """Return the number of leading slopes that these weights use."""
    return int(np.max(np.flatnonzero(weights), initial=-1)) + 1


def slopes_of_step(
    tableau, terms, t0, t1, y0, args, first, number: int | None = None
) -> tuple[list[Any], Any]:
    """Return the slopes of a step and the state of its last stage.

    `first` is the first slope. With `number`, only this many slopes are computed.
    """
    last = None if number is None else number - 1
    h, slopes, stage = terms.contr(t0, t1), [first], y0
    for row, node in zip(tableau.a_lower[:last], tableau.c[:last], strict=True):
        stage = jax.tree.map(jnp.add, y0, weighted_sum(h, row, slopes))
        slopes.append(terms.vf(t0 + float(node) * (t1 - t0), stage, args))
    return slopes, stage


def weighted_sum(h: Float[Array, ""], weights: np.ndarray, slopes: Sequence[Any]) -> Any:
    """Return h sum_i w_i k_i over the given slopes k_i; zeros if all weights are zero."""
    used = [(float(w), k) for w, k in zip(weights, slopes, strict=False) if w != 0]
    if not used:
        return jax.tree.map(jnp.zeros_like, slopes[0])
    factors, slopes = zip(*used, strict=True)

    def leaf(*ks):
        return h.astype(ks[0].dtype) * sum(w * k for w, k in zip(factors, ks, strict=True))

    return jax.tree.map(leaf, *slopes)
