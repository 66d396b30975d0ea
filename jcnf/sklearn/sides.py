"""The two sides of a density of tables, rows and their context, and the precision of each part.

The maps of columns compute in float64, because a column may have values that float32 cannot tell
apart, such as times in seconds. The flows compute in float32, on whitened rows.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jcnf.flows import Columns
from jcnf.sklearn._table_checks import refuse_nan, refuse_text
from jcnf.sklearn.columns import Column, fit_columns, resolve

MAX_ENTRIES = 100_000  # that determine a map which many places share


class Side:
    """The columns of one side of the density, modeled or given, and their map."""

    def __init__(self, supports: list[Column], fitted: Columns):
        self.supports, self.map = supports, fitted

    @classmethod
    def fit(cls, rows, supports, seed):
        side = cls(supports, None)  # pyright: ignore[reportArgumentType]
        with jax.enable_x64(True):
            side.map = fit_columns(side.noisy(rows, seed), supports, seed)
        return side

    @classmethod
    def fit_alike(cls, rows, size, seed):
        """Fit flattened arrays (n, ..., size), with one map for each place of the last axis."""
        entries = rows.reshape(-1, size)
        if len(entries) > MAX_ENTRIES:
            entries = np.random.default_rng(seed).choice(entries, MAX_ENTRIES, replace=False)
        supports = resolve([str(i) for i in range(size)], entries, None)
        one, copies = cls.fit(entries, supports, seed).map, rows.shape[1] // size
        with jax.enable_x64(True):
            tiled = jax.tree.map(lambda a: jnp.tile(a, (copies,) + (1,) * (a.ndim - 1)), one)
        return cls(supports * copies, tiled)

    def noisy(self, rows, seed):
        """Return the rows with uniform noise as wide as the steps."""
        steps = np.array([support.step for support in self.supports])
        return rows + (np.random.default_rng(seed).random(rows.shape) - 0.5) * steps

    def clipped(self, rows):
        """Return rows that are inside the support."""
        bounds = [support.cells for support in self.supports]
        lower = np.nextafter([b.lower for b in bounds], np.inf)
        return np.clip(rows, lower, np.nextafter([b.upper for b in bounds], -np.inf))

    def to_base(self, rows):
        return apply(self.map, rows, "to_base")

    def __getstate__(self):
        return to_pickle(self.__dict__, "map")

    def __setstate__(self, state):
        self.__dict__.update(from_pickle(state, "map"))


class ContextRows:
    """The rows and names of a context."""

    def __init__(self, context):
        refuse_text(context, "the context")
        try:
            self.rows = np.asarray(context, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"context must be numbers: {error}") from error
        if self.rows.ndim == 1:
            self.rows = self.rows[:, None]
        if self.rows.ndim != 2:
            raise ValueError(
                f"context must be of shape (n, context); got an array of shape {self.rows.shape}"
            )
        self.named = hasattr(context, "columns")
        names = context.columns if self.named else range(self.rows.shape[1])
        self.names = [str(name) for name in names]
        refuse_nan(self.rows, self.names, "the context")


def to_pickle(state, name):
    """Return a state to pickle: jax would unpickle its arrays of float64 as float32."""
    return state | {name: jax.tree.map(np.asarray, state[name])} if name in state else state


def from_pickle(state, name):
    """Return the state that `to_pickle` returned."""
    with jax.enable_x64(True):
        return state | {name: jax.tree.map(jnp.asarray, state[name])} if name in state else state


@eqx.filter_jit
def _compiled(part, x, direction, context):
    return part.both(x, direction, context)


def apply(part, x, direction, context=None):
    """Return what a fixed bijection makes of rows, and the log-dets, both computed in float64."""
    with jax.enable_x64(True):
        context = None if context is None else jnp.asarray(context, jnp.float64)
        value, logdet = _compiled(part, jnp.asarray(x, jnp.float64), direction, context)
    return np.asarray(value), np.asarray(logdet)


def single(x) -> Array:
    """Return an array of float32."""
    return jnp.asarray(x, jnp.float32)


def cast(part, dtype):
    """Return a bijection with its floating-point arrays in another dtype."""
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, part)


def blank_columns(dim, knots):
    """Return columns of the right shapes, to be filled with saved arrays."""
    vectors = dict.fromkeys(("lower", "upper", "turn", "loc", "scale"), jnp.zeros(dim))
    tables = dict.fromkeys(("u", "z", "slope"), jnp.zeros((dim, knots)))
    tails = dict.fromkeys(("log_mass", "tail_scale", "tail_index"), jnp.zeros((dim, 2)))
    return Columns(knots=jnp.zeros(dim, jnp.int32), **vectors, **tables, **tails)
