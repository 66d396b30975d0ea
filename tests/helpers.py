"""Fields with known solutions, and helpers that several test files share."""

from contextlib import contextmanager
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float
from scipy import linalg, stats

from jcnf import CNF, Flow, Solve, divergence
from jcnf.distributions import StandardNormal
from jcnf.fields import MLP, Field
from jcnf.flows import DistraxBijection

TIGHT = Solve(rtol=1e-10, atol=1e-10)
T = 0.8  # not 1, so that a forgotten end time shows
MATRIX = np.array([[0.5, -1.2, 0.3], [0.8, -0.1, 0.4], [-0.6, 0.2, 0.7]])  # trace 1.1
CONTEXT_MATRIX = np.array([[1.0, 0.4], [-0.3, 0.8], [0.5, -0.9]])
SHIFT = np.array([0.3, -0.5, 1.0])


def strategies():
    """Return the classes of all divergence strategies of the library."""
    kinds = {kind for kind in vars(divergence).values() if isinstance(kind, type)}
    strategies = {kind for kind in kinds if issubclass(kind, divergence.Divergence)}
    return strategies - {divergence.Divergence, divergence.Estimator, divergence.FixedNoise}


class Linear(Field):
    """v = A x, so that x(t) = expm(A t) x(0) and div v = tr A, with no closed-form divergence."""

    matrix: Float[Array, "dim dim"]
    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        return self.matrix @ x


class NotANumber(Field):
    """v = x, but NaN once any component exceeds 1."""

    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        return jnp.where(jnp.any(x > 1), jnp.nan, x)


class Tally:
    """A counter that modules can hold as a static field."""

    count = 0


class Traced(Field):
    """A field that counts how often it is traced."""

    field: MLP
    tally: Tally = eqx.field(static=True)

    @property
    def dim(self):
        return self.field.dim

    @property
    def context_dim(self):
        return self.field.context_dim

    def __call__(self, t, x, context=None):
        self.tally.count += 1
        return self.field(t, x, context)


def linear() -> Flow:
    """Return the flow x(T) = expm(A T) z."""
    return CNF(Linear(jnp.asarray(MATRIX)), StandardNormal(3), t1=T)


def affine() -> Flow:
    """Return the flow of v = A x + C c + b, an MLP with context but no hidden layers or time."""
    field = mlp(3, (), time="ignore", context_dim=2)
    weight = jnp.asarray(np.concatenate([MATRIX, CONTEXT_MATRIX], axis=1))
    layer = eqx.tree_at(lambda m: (m.weight, m.bias), field.layers[0], (weight, jnp.asarray(SHIFT)))
    return CNF(eqx.tree_at(lambda f: f.layers, field, (layer,)), StandardNormal(3), t1=T)


def carried(z, t=T, context=None):
    """Map z (batch, 3) from time 0 to t by `linear`, or by `affine` if there is a context."""
    propagator = linalg.expm(t * MATRIX)
    drift = np.zeros(3) if context is None else np.asarray(context) @ CONTEXT_MATRIX.T + SHIFT
    return np.asarray(z) @ propagator.T + drift @ np.linalg.solve(MATRIX, propagator - np.eye(3)).T


def log_density(x, context=None):
    """Log-density of `linear`, or of `affine` if there is a context, over the standard normal."""
    covariance = linalg.expm(T * MATRIX) @ linalg.expm(T * MATRIX).T
    centered = np.asarray(x) - carried(np.zeros((1, 3)), context=context)
    return stats.multivariate_normal(np.zeros(3), covariance).logpdf(centered)


def mlp(dim, widths, *, scale=2.0, seed=0, **settings) -> MLP:
    """Return a nonlinear field with weights drawn by NumPy: compiling initializers is slow."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = leaf.shape[1] if leaf.ndim == 2 else 4
        return jnp.asarray(rng.normal(0, scale / np.sqrt(fan_in), leaf.shape))

    make = partial(MLP, dim, widths, **settings)
    return jax.tree.map(draw, eqx.filter_eval_shape(make, key=jr.key(0)))


def astype(tree, dtype):
    """Cast the floating arrays of a pytree to another dtype."""
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, tree)


def tolerance(solve, value):
    """Return a Solve with array tolerances, so that one compiled program serves all values."""
    value = jnp.asarray(value)
    return eqx.tree_at(lambda s: (s.rtol, s.atol), solve, (value, value))


def slope(function, h=1e-3):
    """Return f'(0) by central differences of order 4."""
    return (8 * (function(h) - function(-h)) - function(2 * h) + function(-2 * h)) / (12 * h)


@contextmanager
def compilations():
    """Collect the names of the programs that are compiled inside."""
    names = []

    def note(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


OUTSIDE = ["blows up", "stiff", "NaN"]


class Outside(Field):
    """A tame field inside a circle, which fails outside of it in the way that `kind` selects."""

    net: eqx.Module
    kind: Float[Array, " kinds"]  # one-hot over `OUTSIDE`; an array, so that one program serves all
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        v, square = self.net(t, x), jnp.sum(x**2)
        there = [v + 3 * square * x, v + 1e5 * jnp.sin(1e3 * x), jnp.full_like(x, jnp.nan)]
        kind = jnp.argmax(jax.lax.stop_gradient(self.kind))
        return jnp.where(square > 16, jnp.stack(there)[kind], v)


def outside(kind):
    """Return a flow whose rows outside of the circle fail in the way `kind`, one of `OUTSIDE`."""
    chosen = jnp.asarray([float(kind == name) for name in OUTSIDE])
    return CNF(Outside(mlp(2, (16, 16), scale=1.0), chosen), StandardNormal(2))


COVARIANCE = linalg.expm(T * MATRIX) @ linalg.expm(T * MATRIX).T


class Affine(DistraxBijection):
    """The bijection x = expm(A T) z."""

    def bijector(self):
        import distrax

        return distrax.UnconstrainedAffine(jnp.asarray(linalg.expm(T * MATRIX)), jnp.zeros(3))


def exact() -> Flow:
    """Return the flow of N(0, COVARIANCE)."""
    return Flow(Affine(), StandardNormal(3))
