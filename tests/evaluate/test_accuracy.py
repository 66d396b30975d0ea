"""Reported errors of a flow are true ones, by the known densities of linear fields."""

import dataclasses

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, NotANumber, T, affine, astype, linear, log_density, mlp

from jcnf import CNF, Hutchinson, Solve, evaluate
from jcnf.distributions import StandardNormal
from jcnf.regularizers import kinetic

RNG = np.random.default_rng(3)
X, CONTEXT = jnp.asarray(RNG.normal(size=(30, 3))), jnp.asarray(RNG.normal(size=(30, 2)))
LOOSE = Solve(rtol=1e-2, atol=1e-2, norm="worst")


@pytest.mark.slow
def test_the_numerical_error_is_that_to_the_known_density():
    report = evaluate.accuracy_report(
        affine(), X, context=CONTEXT, solve=LOOSE, reference_points=10
    )
    error = np.abs(report.scores.log_prob - log_density(X, CONTEXT))
    assert np.max(error) > 1e-4
    few = np.linspace(0, 29, 10).astype(int)
    np.testing.assert_allclose(report.log_prob_error, error[few], atol=2e-3 * np.max(error))
    figures = report.numerics()
    assert figures["log_prob_error"] == pytest.approx(np.mean(error[few]), rel=1e-2)
    assert figures["solver_failures"] == 0
    assert 0 < figures["nfe_backward"] <= figures["nfe_forward"]
    assert 0 < figures["roundtrip_error"] < 0.1
    assert "mass" not in figures
    assert "estimator_stderr" not in figures
    assert report.warnings() == []


@pytest.mark.slow
def test_rounding_is_part_of_the_error():
    solve = Solve(step=T / 64)  # of order 5: without rounding the error is below 1e-10
    single = evaluate.accuracy_report(
        astype(linear(), jnp.float32), X.astype(jnp.float32), solve=solve
    )
    assert 1e-8 < single.nll_error < 1e-5
    assert evaluate.accuracy_report(linear(), X, solve=solve).nll_error < 1e-8


def test_an_estimator_is_averaged_and_its_spread_told():
    report = evaluate.accuracy_report(
        linear(), X, key=jr.key(0), solve=LOOSE, divergence=Hutchinson(), draws=50
    )
    # For a linear field the estimate is e'Ae along the whole path: Var = 2 |S - diag S|^2 T^2.
    symmetric = (MATRIX + MATRIX.T) / 2
    spread = np.sqrt(2 * np.sum((symmetric - np.diag(np.diag(symmetric))) ** 2)) * T
    expected = spread / np.sqrt(len(X) * 50)
    assert report.estimator_stderr == pytest.approx(expected, rel=0.35)
    exact = evaluate.log_prob(linear(), X, solve=LOOSE).nll
    assert abs(report.scores.nll - exact) < 4 * expected
    assert report.nll_error < 1e-2  # only the solver's: both sides have the same noise
    assert report.numerics()["estimator_stderr"] == report.estimator_stderr


def test_what_cannot_be_trusted_is_said():
    flow = CNF(mlp(2, (8, 8)), StandardNormal(2))
    # Many copies of two points have hardly any statistical error.
    x = jnp.tile(jnp.array([[0.3, -0.2], [0.3, -0.2001]]), (10, 1))
    euler = Solve(solver="euler", step=0.25, norm="worst")
    extent = (-0.5, 0.5, -0.5, 0.5)
    found = evaluate.accuracy_report(flow, x, solve=euler, extent=extent, cells=10)
    numerical, mass = found.warnings()
    assert "not below its statistical error" in numerical
    assert f"a mass of {found.grid.mass:.4f}" in mass
    assert found.numerics()["mass"] == found.grid.mass < 0.9

    broken = CNF(NotANumber(), StandardNormal(2))
    x = jnp.asarray(np.full((40, 2), 0.3)).at[7].set(2.0)
    found = evaluate.accuracy_report(broken, x, extent=(-0.1, 0.1, -0.1, 0.1), cells=3)
    assert found.failures == 1
    assert found.warnings()[0].startswith("the solve failed for 1 points")
    assert np.all(np.isfinite(found.log_prob_error))
    assert found.numerics()["grid_failures"] == 0

    found = evaluate.accuracy_report(
        broken, x[7:8].repeat(40, 0), extent=(1.5, 2.0, 1.5, 2.0), cells=3
    )
    assert found.failures == 40
    assert np.isnan(found.numerics()["log_prob_error"])
    assert any("9 cells of the grid" in warning for warning in found.warnings())


def test_a_spread_needs_two_draws(unchecked):
    with pytest.raises(ValueError, match="at least 2 draws"):
        evaluate.accuracy_report(linear(), X, key=jr.key(0), divergence=Hutchinson(), draws=1)
    with pytest.raises(ValueError, match="Hutchinson draws noise: pass key"):
        evaluate.accuracy_report(linear(), X, divergence=Hutchinson())
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate.log_prob(linear(), X[:0])


@pytest.mark.slow
def test_mass_in_one_dimension():
    flow = CNF(mlp(1, (8, 8)), StandardNormal(1))
    x = flow.base.sample(jr.key(0), 200, X.dtype)
    found = evaluate.accuracy_report(flow, 3 * x, cells=100, reference_points=0)
    assert found.numerics()["mass"] == pytest.approx(1, abs=1e-3)
    assert found.grid.log_prob.shape == (1000,)


@pytest.mark.slow
def test_with_little_time_points_and_outer_cells_are_left_out_and_this_is_said():
    flow = CNF(mlp(2, ()), StandardNormal(2))
    x = flow.base.sample(jr.key(0), 3000, X.dtype)
    settings = {"reference_points": 0, "extent": (-4.0, 4.0, -4.0, 4.0), "cells": 120}
    found = evaluate.accuracy_report(flow, x, seconds=1e-6, chunk=1000, **settings)
    assert len(found.points) == len(found.scores.log_prob) == 2000
    whole = evaluate.log_prob(flow, x[found.points])
    np.testing.assert_allclose(found.scores.log_prob, whole.log_prob, atol=1e-5)
    assert (found.grid.unmeasured, found.grid.failures) == (120**2 - 10_000, 0)
    assert found.grid.measured_cells == 100
    assert found.grid.cropped(100).unmeasured == 0 < found.grid.cropped(102).unmeasured
    assert found.grid.cropped(100).measured_cells == 100
    inner = slice(10, 110)
    assert not np.isnan(found.grid.log_prob[inner, inner]).any()
    measured = ~np.isnan(found.grid.log_prob)
    assert measured.sum() == 10_000
    cells = evaluate.log_prob(flow, found.grid.points[measured.ravel()][::100])
    np.testing.assert_allclose(found.grid.log_prob[measured][::100], cells.log_prob, atol=1e-5)
    told = found.warnings()
    assert "2000 of 3000 points and the inner 10000 of 14400 cells (a mass of" in told[0]
    assert not any("on its grid" in each for each in told), "what is missing was not measured"


def test_a_grid_is_of_one_or_two_dimensions(unchecked):
    with pytest.raises(ValueError, match="each of the flow's dimensions; got 2 values for 3"):
        evaluate.grid(linear(), (-1.0, 1.0))
    with pytest.raises(ValueError, match="1 or 2 dimensions"):
        evaluate.grid(linear(), (-1.0, 1.0) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve", "reversible"])
def test_audit_of_a_gradient(adjoint):
    flow, regularizers = CNF(mlp(3, (4,)), StandardNormal(3), t1=T), {kinetic: 0.1}
    solve = Solve(rtol=1e-6, atol=1e-6, adjoint=adjoint)
    audit = evaluate.audit_gradients(
        flow, X[:5], key=jr.key(0), solve=solve, divergence=Hutchinson(), regularizers=regularizers
    )
    assert not audit.failed
    assert audit.of_reference < 1e-7
    assert 0 < audit.to_true < 1e-3
    assert audit.to_discretized < 1e-3
    assert (audit.to_discretized == 0) == (adjoint == "checkpoint")


@pytest.mark.slow
def test_audit_sees_a_wrong_gradient_and_a_failed_solve():
    flow = CNF(mlp(3, (4,)), StandardNormal(3), t1=T)
    coarse = Solve(solver="euler", step=0.4, adjoint="backsolve")
    audit = evaluate.audit_gradients(flow, X[:5], solve=coarse)
    assert audit.to_true > 1e-2
    assert audit.to_discretized > 1e-2
    assert not audit.failed
    failing = dataclasses.replace(coarse, adjoint="checkpoint", max_steps=1)
    assert evaluate.audit_gradients(flow, X[:5], solve=failing).failed
