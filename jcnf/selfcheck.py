"""Check jcnf against known answers on this machine: `python -m jcnf.selfcheck`.

Compilers and devices are sometimes silently wrong, and only for some shapes. Each check computes
something whose value is known, with the compile options of this process, and prints one line. The
exit code is 1 if any check fails.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from jcnf import evaluate, objectives
from jcnf._checks import list_rows
from jcnf.distributions import StandardNormal
from jcnf.divergence import ForwardMode
from jcnf.fields import Field
from jcnf.flows import CNF, log_prob, sample
from jcnf.ode import Solve

BATCH_SHAPES = (10_000, 2), (20_000, 3), (8192, 8)  # jaxlib 0.10.2 is wrong for each of them
ROWS = max(batch for batch, _ in BATCH_SHAPES)
MATRIX = np.array([[0.7, -0.9], [0.0, -0.3]])  # upper triangular: its exponential is elementary


class Linear(Field):
    """Field v = A x with div v = tr A, which carries the standard normal to N(0, e^A e^A')."""

    matrix: Float[Array, "dim dim"]
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        return self.matrix.astype(x.dtype) @ x


class Normalizing(Field):
    """Field v = x / r with r = sqrt(1 + |x|^2), whose divergence is d / r - |x|^2 / r^3."""

    dim: int = eqx.field(static=True)

    def __call__(self, t, x, context=None):
        return x / jnp.sqrt(1 + jnp.sum(x**2))


class Outcome(NamedTuple):
    """Result of a check."""

    error: float
    bound: float  # largest error on a sound machine
    what: str

    @property
    def passed(self) -> bool:
        """Return whether the error is within its bound; NaN is not."""
        return self.error <= self.bound


def rows_of_a_divergence() -> Outcome:
    """Compare the divergence of a normalizing field with its closed form, in float32."""
    bound, worst, wrong, rng = 1e-4, [], "", np.random.default_rng(0)
    program = jax.jit(jax.vmap(_divergence, in_axes=(None, 0)), static_argnums=0)
    for batch, dim in BATCH_SHAPES:
        x = rng.normal(size=(batch, dim)).astype(np.float32)
        square = np.sum(x.astype(float) ** 2, axis=1)
        known = dim / np.sqrt(1 + square) - square / (1 + square) ** 1.5
        errors = np.abs(np.asarray(program(dim, x)) - known)
        worst.append(np.max(errors))  # NaN if any is
        bad = np.flatnonzero(~(errors <= bound))
        if len(bad):
            wrong += f"; wrong in {dim} dimensions: {list_rows(bad, batch)}"
    return Outcome(float(np.max(worst)), bound, f"divergences of large batches, float32{wrong}")


def _divergence(dim, x):
    return ForwardMode()(Normalizing(dim), jnp.zeros((), x.dtype), x, None, None).divergence


def rows_of_a_density() -> Outcome:
    """Compare the log-densities of the same rows at every place of a large batch, in float32."""
    flow = CNF(Normalizing(2), StandardNormal(2))
    x = jr.normal(jr.key(0), (100, 2), jnp.float32)
    rows = evaluate.row_independence(flow, x)
    batch, bad = len(rows.log_prob), rows.wrong_rows
    wrong = f"; wrong: {list_rows(bad, batch)}" if len(bad) else ""
    what = f"log-densities of identical rows in a batch of {batch}, float32{wrong}"
    return Outcome(rows.difference, 1e-3, what)


def density_in_float32() -> Outcome:
    """Compare log-densities under a linear field with the Gaussian's, in float32."""
    return Outcome(_density_error(np.float32, 1e-5), 1e-3, "log-densities of a Gaussian, float32")


def density_in_float64() -> Outcome:
    """Compare log-densities under a linear field with the Gaussian's, in float64."""
    with jax.enable_x64(True):
        error = _density_error(np.float64, 1e-10)
    return Outcome(error, 1e-7, "log-densities of a Gaussian, float64")


@jax.default_matmul_precision("highest")
def _density_error(dtype, tolerance):
    flow = CNF(Linear(jnp.asarray(MATRIX, dtype)), StandardNormal(2))
    x = np.random.default_rng(1).normal(size=(1000, 2)).astype(dtype)
    z = x.astype(float) @ np.linalg.inv(_exponential()).T
    known = -np.sum(z**2, axis=1) / 2 - np.log(2 * np.pi) - np.trace(MATRIX)
    found = log_prob(flow, jnp.asarray(x), solve=Solve(rtol=tolerance, atol=tolerance))
    return float(np.max(np.abs(np.asarray(found) - known)))


def _exponential():
    (a, b), (_, d) = MATRIX
    return np.array([[np.exp(a), b * (np.exp(a) - np.exp(d)) / (a - d)], [0, np.exp(d)]])


@jax.default_matmul_precision("highest")
def samples() -> Outcome:
    """Compare samples under a linear field with the base's, transformed by its exponential."""
    flow = CNF(Linear(jnp.asarray(MATRIX, jnp.float32)), StandardNormal(2))
    key = jr.key(2)
    z, x = flow.base.sample(key, ROWS), sample(flow, key, ROWS)
    error = np.max(np.abs(np.asarray(x) - np.asarray(z, float) @ _exponential().T))
    return Outcome(float(error), 1e-3, f"{ROWS} samples of a Gaussian")


def gradient() -> Outcome:
    """Compare a gradient of the mean log-density with finite differences, in float64."""
    with jax.enable_x64(True):
        x = np.random.default_rng(3).normal(size=(50, 2))
        solve = Solve(rtol=1e-10, atol=1e-10)

        @jax.jit
        @jax.value_and_grad
        def nll(matrix):
            flow = CNF(Linear(matrix), StandardNormal(2))
            return objectives.likelihood(flow, jnp.asarray(x), None, solve=solve)[0]

        found, h = np.asarray(nll(jnp.asarray(MATRIX))[1]), 1e-4
        expected = np.zeros((2, 2))
        for i in np.ndindex(2, 2):
            shift = np.zeros((2, 2))
            shift[i] = h
            up, down = (float(nll(jnp.asarray(MATRIX + s * shift))[0]) for s in (1, -1))
            expected[i] = (up - down) / (2 * h)
        error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
    return Outcome(float(error), 1e-5, "gradient of a log-density, float64 (relative)")


CHECKS: tuple[Callable[[], Outcome], ...] = (
    rows_of_a_divergence,
    rows_of_a_density,
    density_in_float32,
    density_in_float64,
    samples,
    gradient,
)


def run() -> bool:
    """Print a line as each check ends; return whether all passed."""
    [device, *_] = devices = jax.devices()
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "jaxlib", "equinox", "diffrax")
    )
    print(f"{versions}; {len(devices)} x {device.device_kind}, {platform.machine()}", flush=True)
    passed = []
    for check in CHECKS:
        try:
            found = check()
            passed.append(found.passed)
            text = f"{found.what}: error {found.error:.1e}, at most {found.bound:.0e} expected"
        except Exception as error:  # whatever the error is, the other checks are still useful
            passed.append(False)
            reason = (str(error).splitlines() or [""])[0]
            text = f"{check.__name__}: {type(error).__name__}: {reason}"
        print(f"{'ok  ' if passed[-1] else 'FAIL'}  {text}", flush=True)
    if not all(passed):
        print("Do not trust results from this machine, device and versions: try another jaxlib.")
    return all(passed)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.exit(0 if run() else 1)
