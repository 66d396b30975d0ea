"""Trajectories fitted to windows of a series, and the built-in series."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, TIGHT, Linear, carried
from scipy import linalg

from jcnf._checks import InputError
from jcnf.data.series import TARGETS, load_series, spiral
from jcnf.data.tables import read_rows
from jcnf.objectives import sample_windows, trajectory_fit

RNG = np.random.default_rng(0)
TIMES = np.cumsum(RNG.uniform(0.05, 0.3, 40))
SERIES = (
    jnp.asarray(TIMES),
    jnp.asarray(np.concatenate([carried(np.ones((1, 3)), t) for t in TIMES])),
)
FIELD = Linear(jnp.asarray(MATRIX))
BOUNDS = {"shortest": 0.5, "longest": 1.5}


@pytest.fixture(scope="module")
def windows():
    return jax.jit(sample_windows(500, **BOUNDS, rows=9))(jr.key(0), SERIES)


def test_windows_are_stretches_of_the_series(windows):
    assert windows.times.shape == windows.observed.shape == (9, 500)
    assert windows.values.shape == (9, 500, 3)
    rows = np.searchsorted(TIMES, windows.times)
    np.testing.assert_array_equal(windows.times, TIMES[rows])
    np.testing.assert_array_equal(windows.values, np.asarray(SERIES[1])[rows])
    # Observed rows follow the start, each once; the others repeat the last one.
    steps, observed = np.diff(rows, axis=0), np.asarray(windows.observed)
    assert not observed[0].any()
    assert observed[1].all()
    np.testing.assert_array_equal(steps > 0, observed[1:])
    np.testing.assert_array_equal(steps >= 0, True)
    # Every row but the last starts some window.
    assert set(rows[0]) == set(range(39))


def test_windows_have_random_lengths_and_random_rows_of_those_within(windows):
    rows = np.searchsorted(TIMES, windows.times)
    lengths = windows.times[-1] - windows.times[0]
    gap = np.diff(TIMES)[rows[0]]
    assert np.all(lengths <= np.maximum(BOUNDS["longest"], gap))
    whole = windows.times[0] < TIMES[-1] - BOUNDS["longest"]
    # The last row is the last one within the window's length, which is uniform.
    assert 0.2 < np.min(lengths[whole]) < 0.5 < 1.3 < np.max(lengths[whole])
    assert np.mean(lengths[whole]) == pytest.approx(1 - 0.3 / 4, abs=0.1)
    # If more than 8 rows follow within the length, any of them may be left out.
    left_out = [set(range(r[0], r[-1])) - set(r) for r in rows.T]
    assert any(left_out)
    assert all(len(set(r)) == 9 for r, out in zip(rows.T, left_out, strict=True) if out)


@pytest.mark.slow
def test_all_windows_are_the_longest_from_each_row():
    windows = sample_windows(None, **BOUNDS, rows=50)(jr.key(0), SERIES)
    assert windows.times.shape == (41, 39)
    np.testing.assert_array_equal(windows.times[0], TIMES[:-1])
    for start, times, observed in zip(range(39), windows.times.T, windows.observed.T, strict=True):
        inside = TIMES[start + 1 :][TIMES[start + 1 :] <= TIMES[start] + BOUNDS["longest"]]
        np.testing.assert_array_equal(times[observed], inside)


def test_the_fit_is_the_mean_squared_error_of_what_is_observed():
    windows = sample_windows(4, **BOUNDS)(jr.key(1), SERIES)
    fit = jax.jit(partial(trajectory_fit, solve=TIGHT))
    loss, metrics = fit(FIELD, windows)
    assert loss < 1e-16
    assert metrics["nfe"] > 0
    assert not metrics["failed"]
    # Errors of 1 and 2 in components of observed rows count; those of repeated rows do not.
    number = int(np.sum(windows.observed))
    assert not windows.observed[-1, 0]
    wrong = windows.values.at[1, 0, 0].add(1.0).at[2, 3, 1].add(-2.0).at[-1, 0, 2].add(9.0)
    loss, metrics = fit(FIELD, windows._replace(values=wrong))
    np.testing.assert_allclose(loss, 5 / 3 / number, rtol=1e-6)
    np.testing.assert_allclose(metrics["rmse"], np.sqrt(loss), rtol=1e-12)


@pytest.mark.parametrize("settings", [(0.0, 1.0, 5), (2.0, 1.0, 5), (1.0, 2.0, 1)])
def test_windows_of_nothing_are_refused(settings):
    shortest, longest, rows = settings
    with pytest.raises(ValueError, match=r"shortest|rows must be a whole number, at least 2"):
        sample_windows(3, shortest=shortest, longest=longest, rows=rows)


# Series


def test_the_linear_spiral_is_the_matrix_exponential():
    matrix = np.array([[-0.1, -1], [1, -0.1]])
    series = spiral("linear", noise=0)
    assert series.values.shape == (200, 2)
    assert series.times[0] == 0
    assert series.times[-1] == 31.45
    exact = [linalg.expm(matrix * t) @ [0.6, 0.3] for t in series.times]
    np.testing.assert_allclose(series.values, exact, atol=1e-8)


@pytest.mark.parametrize("name", TARGETS)
def test_spirals_are_observed_with_noise_at_even_or_random_times(name):
    even, irregular = (spiral(name, points=300, noise=0.1, irregular=i, seed=1) for i in (0, 1))
    for series in (even, irregular):
        assert np.std(series.values - series.truth(series.times)) == pytest.approx(0.1, rel=0.1)
        assert (series.times[0], series.times[-1]) == (0, 31.45)
        assert np.all(np.diff(series.times) > 0)
    assert np.ptp(np.diff(even.times)) < 1e-9 < np.ptp(np.diff(irregular.times))
    again = spiral(name, points=300, noise=0.1, seed=1)
    np.testing.assert_array_equal(even.values, again.values)


def test_a_table_of_a_time_and_values_is_a_series(tmp_path):
    times = np.array([1900.0, 1901.0, 1903.0, 1904.0])
    values = np.array([[1.0, 20.0], [2.0, 40.0], [4.0, 10.0], [1.0, 30.0]])
    path = tmp_path / "series.csv"
    np.savetxt(
        path, np.column_stack([times, values]), delimiter=",", header="year,a,b", comments=""
    )
    series = load_series(path)
    assert (series.time_name, series.scale.columns) == ("year", ("a", "b"))
    np.testing.assert_allclose(series.begin + series.unit * series.times, times)
    np.testing.assert_allclose(series.scale.unstandardize(series.values), values)
    np.testing.assert_allclose(np.std(series.values, axis=0), 1)
    speeds = np.diff(series.values, axis=0) / np.diff(series.times)[:, None]
    np.testing.assert_allclose(np.mean(speeds**2), 1)
    assert load_series(path, unit=2.0).times[-1] == 2.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["t,a", "0,1", "2,2", "1,3"], "must increase; row 3 has 1 after 2"),
        (["t,a", "0,1", "1,1", "2,1"], "column a is constant"),
        (["t,a", "0,1", "1,2"], "at least 3 rows; got 2 columns and 2 rows"),
        (["t", "0", "1", "2"], "got 1 columns and 3 rows"),
    ],
)
def test_what_is_no_series_is_refused(tmp_path, lines, message):
    (tmp_path / "bad.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=re.escape(message)):
        load_series(tmp_path / "bad.csv")


@pytest.mark.parametrize("cell", ["high", "nan", ""])
def test_a_bad_cell_of_a_series_names_no_flag(tmp_path, cell):
    """Readers of series and of rows to score have no argument `drop`."""
    (tmp_path / "bad.csv").write_text(f"t,a,b\n0,1,2\n1,{cell},3\n2,3,5\n")
    for read in (load_series, partial(read_rows, columns=("t", "a", "b"))):
        with pytest.raises(InputError, match=r"column 2 \(a\) .*row 2") as raised:
            read(tmp_path / "bad.csv")
        assert "--" not in str(raised.value)


def test_an_unknown_target_names_the_known():
    with pytest.raises(InputError, match="unknown target 'cubik': use one of linear, cubic"):
        spiral("cubik")


def test_rows_held_out_have_no_part_in_the_scale(tmp_path):
    rows = [f"{t},{np.sin(t) + (100 if t > 19 else 0)}" for t in range(30)]
    (tmp_path / "series.csv").write_text("t,x\n" + "\n".join(rows) + "\n")
    series = load_series(tmp_path / "series.csv", held_out=10)
    assert series.scale.std[0] == pytest.approx(np.std(np.sin(np.arange(20))))
    assert series.unit < 3
    with pytest.raises(InputError, match="held_out=28 leaves fewer than 3"):
        load_series(tmp_path / "series.csv", held_out=28)
    for bad in ({"held_out": -1}, {"held_out": 2.5}, {"unit": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            load_series(tmp_path / "series.csv", **bad)
