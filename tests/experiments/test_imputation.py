"""Filling in missing entries of tables on the command line, and measuring how well."""

import json

import jax.random as jr
import numpy as np
import pytest
from helpers import COVARIANCE, exact
from scipy import linalg
from test_experiments import SMALL, run

from experiments.density import impute_rows
from experiments.imputation import measure
from jcnf.data.tables import Standardizer, read_rows, write_rows


def test_rows_are_filled_in_in_their_own_units(tmp_path):
    """For the flow of N(0, COVARIANCE), the mean of c given a and b is a linear function."""
    scale = Standardizer(np.array([5.0, -3.0, 100.0]), np.array([2.0, 0.1, 30.0]), ("a", "b", "c"))
    rng = np.random.default_rng(0)
    truth = scale.unstandardize(rng.multivariate_normal(np.zeros(3), COVARIANCE, 20))
    rows = np.where(np.arange(3) == 2, np.nan, truth)
    rows[:2] = truth[:2]
    write_rows(tmp_path / "table.csv", rows, scale.columns)
    again = read_rows(tmp_path / "table.csv", scale.columns, missing=True)
    impute_rows(exact(), scale, jr.key(0), again, tmp_path)
    filled = read_rows(tmp_path / "imputed.csv", scale.columns)
    std = read_rows(tmp_path / "imputed_std.csv", scale.columns)
    np.testing.assert_array_equal(filled[:, :2], truth[:, :2])
    np.testing.assert_array_equal(filled[:2], truth[:2])
    np.testing.assert_array_equal(std[:2], 0)
    gain = linalg.solve(COVARIANCE[:2, :2], COVARIANCE[:2, 2])
    spread = 30 * np.sqrt(COVARIANCE[2, 2] - gain @ COVARIANCE[:2, 2])
    expected = 100 + 30 * (truth[2:, :2] - scale.mean[:2]) / scale.std[:2] @ gain
    error = (filled[2:, 2] - expected) / spread
    assert np.sqrt(np.mean(error**2)) < 0.5
    assert std[2:, 2].mean() == pytest.approx(spread, rel=0.2)


def test_measures_are_over_hidden_entries_and_gaps_are_paired():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(500, 4))
    hidden = rng.random(truth.shape) < 0.3
    common, small = rng.normal(size=(2, 500, 4))
    good, bad = truth + 0.1 * small, truth + 0.5 * common
    # Entries that are not hidden must not count.
    estimates = {
        "mean": np.where(hidden, bad, 1e9),
        "gaussian": np.where(hidden, bad, 1e9),
        "flow": np.where(hidden, good, 1e9),
        "flow_weighted": np.where(hidden, bad, -1e9),
    }
    rows = rng.normal(size=500) * hidden.any(axis=1)
    log_probs = {
        "mean": rows,
        "gaussian": rows,
        "flow": rows + 0.7 * hidden.sum(axis=1),
    }
    found = measure(truth, hidden, estimates, log_probs)
    assert found["hidden"] == hidden.sum()
    assert abs(found["rmse_flow"] - 0.1) < 4 * found["rmse_flow_stderr"] < 0.02
    assert found["rmse_flow"] == pytest.approx(np.sqrt(np.mean((good - truth)[hidden] ** 2)))
    assert found["rmse_gain_flow"] == pytest.approx(found["rmse_gaussian"] - found["rmse_flow"])
    assert found["rmse_gain_flow_weighted_stderr"] < 1e-12
    assert found["log_prob_gain"] == pytest.approx(0.7)
    assert found["log_prob_gain_stderr"] < 1e-12 < found["log_prob_flow_stderr"]


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 2)) @ np.array([[1, 0.8], [0, 0.6]]) + 7
    write_rows(tmp_path / "table.csv", x, ["a", "b"])
    trained = tmp_path / "density"
    words = ["--data", tmp_path / "table.csv", "--out", trained, "--steps", 10]
    done = run("density", *words, *SMALL)
    assert done.returncode == 0, done.stderr
    words = ["--rows", 40, "--draws", 2, "--chain-steps", 4, "--burn-in", 2, "--importance", 8]
    done = run("imputation", "use", "--from", trained, *words, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["rmse_gaussian"] < summary["metrics"]["rmse_mean"]
    assert np.isfinite(summary["metrics"]["log_prob_flow"])
    assert (tmp_path / "run" / "figures" / "imputed.png").exists()
    x[0, 0] = np.nan
    write_rows(tmp_path / "holes.csv", x, ["a", "b"])
    words = ["use", "--from", trained, "--impute", tmp_path / "holes.csv", "--out", tmp_path]
    done = run("density", *words)
    assert done.returncode == 0, done.stderr
    assert np.isfinite(read_rows(tmp_path / "imputed.csv", ["a", "b"])).all()
