"""A row's results do not depend on the batch it is in, with the compile options of users.

Compilers are sometimes wrong for large batches only: jaxlib 0.10.2 on CPUs gives wrong values from
row 8192 on, in 2 dimensions, if a field normalizes its input.
"""

import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import FIELDS
from helpers import T, astype, compilations

from jcnf import (
    CNF,
    Exact,
    ForwardMode,
    Hutchinson,
    HutchPlusPlus,
    Solve,
    XTrace,
    evaluate,
    selfcheck,
    transform,
)
from jcnf.distributions import StandardNormal
from jcnf.divergence import FixedNoise
from jcnf.flows import ODE, Flow

pytestmark = pytest.mark.optimized

ROWS, FEW = 20_000, 500
DIVERGENCES = {
    "exact": Exact(),
    "forward": ForwardMode(),
    "hutchinson": Hutchinson(),
    "hutch++": HutchPlusPlus(),
    "xtrace": XTrace(),
}
# Steps that do not depend on the rows, so that only rounding may differ.
STEPS = Solve(solver="heun", step=T / 2)
QUICK = [("normalizing", "exact", "to_base")]
TABLE = [
    pytest.param(
        field,
        divergence,
        direction,
        marks=() if (field, divergence, direction) in QUICK else pytest.mark.slow,
    )
    for field in FIELDS
    for divergence in DIVERGENCES
    for direction in ("to_base", "to_data")
]


def normalized(x):
    return x / jnp.sqrt(1 + jnp.sum(x**2))


@pytest.mark.parametrize(("batch", "dim"), [(10_000, 2), (10_000, 3), (8192, 8)])
def test_trace_of_a_jacobian_is_right_in_every_row_of_a_large_batch(batch, dim):
    x = np.random.default_rng(0).normal(size=(batch, dim)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda x: jnp.trace(jax.jacfwd(normalized)(x))))(x)
    square = np.sum(x.astype(float) ** 2, axis=1)
    expected = dim / np.sqrt(1 + square) - square / (1 + square) ** 1.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@eqx.filter_jit
def everything(flow, x, context, divergence, weights, direction):
    """Return the ends, log-dets and gradients of each row, and the gradient in the parameters."""

    def total(flow, x):
        found = transform(
            flow, x, direction=direction, context=context, solve=STEPS, divergence=divergence
        )
        value = jnp.sum(weights * jnp.concatenate([found.value, found.logdet[:, None]], axis=1))
        return value, (found.value, found.logdet)

    params, static = eqx.partition(flow, eqx.is_inexact_array)
    gradient = jax.grad(
        lambda params, x: total(eqx.combine(params, static), x), argnums=(0, 1), has_aux=True
    )
    (by_params, by_rows), (end, logdet) = gradient(params, x)
    return {"end": end, "logdet": logdet[:, None], "gradient": by_rows}, by_params


@pytest.fixture
def forgotten_programs():
    """Drop compiled programs after a test: a process that keeps hundreds runs out of mappings."""
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("forgotten_programs")
@pytest.mark.parametrize(("name", "divergence", "direction"), TABLE)
def test_rows_of_a_large_batch_are_those_of_small_ones(name, divergence, direction):
    flow, strategy = CNF(FIELDS[name](), StandardNormal(3), t1=T), DIVERGENCES[divergence]
    rng = np.random.default_rng(1)
    x, context, weights = (rng.normal(size=(ROWS, size)) for size in (3, 2, 4))
    flow, rows = astype((flow, tuple(map(jnp.asarray, (x, context, weights)))), jnp.float32)
    noise = strategy.draw_noise(jr.key(0), ROWS, 3, jnp.float32)

    def run(some, dtype=jnp.float32):
        given, (x, context, weights) = astype((flow, tuple(a[some] for a in rows)), dtype)
        drawn = FixedNoise(strategy, None if noise is None else noise[some])
        context = context if flow.context_dim else None
        return everything(given, x, context, drawn, weights, direction)

    whole, by_params = run(slice(None))
    few = [slice(start, start + FEW) for start in range(0, ROWS, FEW)]
    parts = [run(some) for some in few]
    for quantity, values in whole.items():
        expected = np.concatenate([part[quantity] for part, _ in parts])
        assert np.all(np.isfinite(expected))
        difference = np.max(np.abs(values - expected), axis=1)
        size = np.max(np.abs(expected), axis=1)
        wrong = np.flatnonzero(~(difference <= 1e-3 * (size + np.median(size))))
        assert wrong.size <= ROWS / 1000, f"{quantity}: {wrong.size} rows, first {wrong[:3]}"
        if wrong.size:
            # In a few ill-conditioned rows, float32 is as far from float64 in any batch.
            exact = run(wrong, jnp.float64)[0][quantity]
            error = np.max(np.abs(expected[wrong] - exact), axis=1)
            assert np.all(difference[wrong] <= 10 * error), f"{quantity}: of {wrong}"
    summed = total(of_parameters for _, of_parameters in parts)
    differences = distances(by_params, summed)
    if np.any(differences > 1e-3):
        # One ill-conditioned row can dominate a gradient, and so can its rounding.
        exact = total(run(some, jnp.float64)[1] for some in few)
        assert np.all(differences <= np.maximum(1e-3, 10 * distances(summed, exact)))


def total(trees):
    """Sum pytrees leaf by leaf."""
    return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *trees)


def distances(tree, expected):
    """Largest difference of each leaf from `expected`, relative to its largest entry."""
    pairs = zip(*map(jax.tree.leaves, (tree, expected)), strict=True)
    return np.array([np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in pairs])


class WrongLate(ODE):
    """A bijection whose log-dets are wrong from row 60 of a batch on."""

    def inverse_and_log_det(self, x, *args):
        found = super().inverse_and_log_det(x, *args)
        wrong = jnp.where(jnp.arange(len(x)) < 60, 0.0, 0.3)
        return found._replace(logdet=found.logdet + wrong.astype(x.dtype))


def test_certificate_names_rows_that_depend_on_their_place():
    flow = Flow(WrongLate(FIELDS["normalizing"]()), StandardNormal(3))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(100, 3)))
    solve = Solve("euler", step=0.25)
    found = evaluate.accuracy_report(flow, x, reference_points=0, solve=solve)
    expected = "40 of 100 rows (first: 60, 61, 62, ...) differ from their first copy, by up to 0.3 "
    assert expected in found.warnings()[0]
    assert found.numerics()["row_difference"] == pytest.approx(0.3, rel=1e-6)
    np.testing.assert_array_equal(found.row_independence.wrong_rows, np.arange(60, 100))
    # In a small enough batch no row is wrong.
    assert evaluate.row_independence(flow, x, batch=50, solve=solve).warning() is None


@pytest.mark.slow
def test_certificate_of_a_large_batch_of_a_normalizing_field_has_no_warning():
    flow = astype(CNF(FIELDS["normalizing"](), StandardNormal(3)), jnp.float32)
    x = jr.normal(jr.key(0), (10_000, 3), jnp.float32)
    found = evaluate.accuracy_report(flow, x, reference_points=0)
    assert found.row_independence.warning() is None
    assert found.numerics()["row_difference"] < 1e-4


@pytest.mark.parametrize("divergence", [Exact(), Hutchinson()])
def test_copies_of_rows_go_through_the_program_that_scores(divergence):
    flow = CNF(FIELDS["mlp ignore"](), StandardNormal(3))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(20, 3)))
    settings = {"key": jr.key(0), "divergence": divergence}
    evaluate.log_prob(flow, x, **settings)
    with compilations() as names:
        evaluate.row_independence(flow, x, batch=20, **settings)
    assert "jit(_score)" not in names


def test_rows_that_fail_everywhere_are_not_compared_and_those_that_fail_once_are_wrong():
    log_prob = np.array([1.0, np.nan, 3.0, 1.0, np.nan, np.nan])
    found = evaluate.RowIndependence(log_prob, 3)
    np.testing.assert_array_equal(found.wrong_rows, [5])
    assert found.difference == np.inf
    nothing = evaluate.RowIndependence(np.full(6, np.nan), 3)
    assert nothing.warning() is None
    assert np.isnan(nothing.difference)


def test_selfcheck_passes_in_a_process_of_its_own():
    command = [sys.executable, "-m", "jcnf.selfcheck"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("jax ")
    assert len(lines) == 1 + len(selfcheck.CHECKS)
    assert all(line.startswith("ok  ") for line in lines[1:])


@pytest.mark.parametrize("wrong", [0.3, np.nan])
def test_selfcheck_sees_wrong_rows(monkeypatch, capsys, wrong):
    divergence = selfcheck._divergence

    def wrong_for_some(dim, x):
        return divergence(dim, x) + jnp.where(x[0] > 3, wrong, 0).astype(x.dtype)

    monkeypatch.setattr(selfcheck, "_divergence", wrong_for_some)
    monkeypatch.setattr(selfcheck, "CHECKS", (selfcheck.rows_of_a_divergence,))
    assert not selfcheck.run()
    assert re.search(r"FAIL .* wrong in 2 dimensions: \d+ of 10000 rows", capsys.readouterr().out)


def test_selfcheck_goes_on_after_a_check_that_raises(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no such device\nat all")

    def sound():
        return selfcheck.Outcome(1e-4, 1e-3, "a number")

    monkeypatch.setattr(selfcheck, "CHECKS", (broken, sound))
    assert not selfcheck.run()
    _, *lines, _ = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAIL  broken: RuntimeError: no such device"
    assert lines[1].startswith("ok    a number: error 1.0e-04")
    monkeypatch.setattr(selfcheck, "CHECKS", (sound,))
    assert selfcheck.run()
