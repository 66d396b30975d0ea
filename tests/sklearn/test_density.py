"""FlowDensity: a mixed table, its samples and files, densities given a context, and errors.

The fits are few and short: each compiles its own training program.
"""

import os
import pickle
import subprocess
import sys
import warnings
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import sklearn
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import jcnf
from jcnf._checks import InputError
from jcnf.sklearn import Column, FlowDensity, mixture

N, CIRCLE = 600, 2 * np.pi
Density = partial(FlowDensity, steps=120, progress=False)


pytestmark = pytest.mark.usefixtures("as_users_have_jax")


# A table of all kinds of columns


def draw_table(seed, n=N):
    rng = np.random.default_rng(seed)
    first = rng.random(n) < 0.5
    return pd.DataFrame(
        {
            "skew": rng.lognormal(size=n),
            "bimodal": np.where(first, rng.normal(-3, 0.2, n), rng.normal(3, 0.5, n)),
            "share": rng.beta(0.5, 0.5, n).astype(np.float32),
            "angle": rng.vonmises(2, 1, n) % CIRCLE,
            "count": rng.poisson(np.where(first, 2, 6)),
            "price": np.round(rng.normal(0, 2, n), 1),
            "flag": first,
        }
    )


TABLE = draw_table(0)
ANGLE = Column(0, CIRCLE, circular=True)
SUPPORTS = {
    "skew": Column(0.0),
    "bimodal": Column(),
    "share": Column(0.0, 1.0),
    "angle": ANGLE,
    "count": Column(0.0, step=1.0),
    "price": Column(step=0.1),
    "flag": Column(0.0, 1.0, step=1.0),
}


@contextmanager
def small(**changes):
    """Fit narrower networks and fewer normal distributions, which takes half the time."""
    of, changes = mixture.Plan.of, {"width": 32, **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture.Plan, "of", lambda *given: of(*given)._replace(**changes))
        patch.setattr(mixture, "NORMALS", (2, 4))
        yield


@pytest.fixture(scope="module")
def density():
    with small(), jax.enable_x64(True):  # in which the flows are of float32 too
        return Density(columns={"angle": ANGLE}).fit(TABLE)


@pytest.fixture(scope="module")
def scores(density):
    return density.score_samples(TABLE)


@pytest.fixture(scope="module")
def samples(density):
    return density.sample(5000)


def test_supports_are_chosen_and_described(density):
    assert dict(zip(TABLE, density.columns_, strict=True)) == SUPPORTS
    lines = density.describe().splitlines()
    assert len(lines) == len(SUPPORTS)
    assert lines[0] == "skew: positive"
    assert lines[1].startswith("bimodal: unbounded, spline of ")
    assert lines[4].startswith("count: whole, positive")
    assert lines[5].startswith("price: in steps of 0.1")


def test_samples_have_the_names_and_dtypes_of_the_table(samples):
    pd.testing.assert_series_equal(samples.dtypes, TABLE.dtypes)
    assert samples.shape == (5000, len(SUPPORTS))
    assert np.isfinite(samples.to_numpy(float)).all()


@pytest.mark.parametrize("name", SUPPORTS)
def test_samples_are_inside_their_supports_and_follow_the_column(samples, name):
    drawn, support = samples[name].to_numpy(), SUPPORTS[name]
    assert support.contains(drawn.astype(float)).all()
    if support.step:
        np.testing.assert_allclose(drawn / support.step, np.round(drawn / support.step), atol=1e-9)
    if support.circular:
        assert np.all((drawn >= support.lower) & (drawn <= support.upper))
    # Far from both samples of one distribution: at 600 rows, 0.056 is the median distance.
    assert stats.ks_2samp(drawn, draw_table(1)[name]).statistic < 0.11


def test_samples_keep_dependence(samples):
    """The counts are of mean 2 in one hill of "bimodal", and 6 in the other."""
    left = samples["bimodal"] < 0
    assert abs(samples["count"][left].mean() - 2) < 1
    assert abs(samples["count"][~left].mean() - 6) < 1
    assert np.mean(samples["flag"] == left) > 0.65


def test_samples_follow_from_the_seed(density, samples):
    pd.testing.assert_frame_equal(density.sample(5000), samples)
    assert not density.sample(5000, random_state=1).equals(samples)


def test_scores_of_new_rows_are_those_that_were_held_out(density):
    new = density.score_samples(draw_table(1))
    error = np.std(new) / np.sqrt(N)
    assert error < 0.1
    assert abs(np.mean(new) + density.held_out_nll_) < 5 * error
    assert density.score(draw_table(1)) == np.mean(new)


def test_scores_do_not_depend_on_the_precision_of_jax(density, scores):
    with jax.enable_x64(True):
        np.testing.assert_array_equal(density.score_samples(TABLE), scores)


@pytest.mark.parametrize(
    ("column", "value"),
    [("skew", -0.1), ("skew", 0.0), ("share", 1.25), ("count", -1), ("count", -0.4), ("flag", 2)],
)
def test_outside_the_support_the_score_is_minus_infinity(density, scores, column, value):
    table = TABLE.astype(float)
    table.loc[3, column] = value
    with pytest.warns(UserWarning, match=f"column {column} is outside its support .*first: 3"):
        found = density.score_samples(table)
    assert found[3] == -np.inf
    np.testing.assert_allclose(np.delete(found, 3), np.delete(scores, 3), atol=1e-12)


def test_a_circle_has_no_end(density, scores):
    turned = TABLE.assign(angle=TABLE["angle"] - 3 * CIRCLE)
    np.testing.assert_allclose(density.score_samples(turned), scores, atol=1e-4)


def test_the_density_is_continuous_around_a_circle(density):
    """At both ends of its bounds, and half a turn from its middle, where its angle jumps."""
    jump = float(density.outer_[1].turn[list(TABLE).index("angle")])
    for place in (0.0, jump):
        around = place + np.array([-1e-4, 0, 1e-4])
        rows = pd.concat([TABLE.head(20).assign(angle=angle) for angle in (*around, CIRCLE)])
        before, at, after, end = density.score_samples(rows).reshape(4, 20)
        np.testing.assert_allclose(before, at, atol=2e-3)
        np.testing.assert_allclose(after, at, atol=2e-3)
    np.testing.assert_allclose(
        density.score_samples(rows.tail(20).assign(angle=0.0)), end, atol=1e-4
    )


@pytest.mark.slow
def test_a_circle_beats_bounds_where_data_cross_them():
    """Two angles that differ by little, on rows that were not trained on."""

    def draw(rng, n):
        first = rng.uniform(0, 360, n)
        return np.stack([first, (first + np.rad2deg(rng.vonmises(0, 4, n))) % 360], axis=1)

    rng = np.random.default_rng(0)
    rows, new = draw(rng, N), draw(rng, 5000)
    circle, bounds = (
        {0: support, 1: support} for support in (Column(0, 360, circular=True), (0, 360))
    )
    gains = Density(columns=circle).fit(rows).score_samples(new)
    gains = gains - Density(columns=bounds).fit(rows).score_samples(new)
    assert gains.mean() > 2 * gains.std() / len(gains) ** 0.5


def test_a_saved_density_is_the_same(density, scores, samples, tmp_path):
    density.save(tmp_path / "a.jcnf")
    loaded = FlowDensity.load(tmp_path / "a.jcnf")
    np.testing.assert_array_equal(loaded.score_samples(TABLE), scores)
    pd.testing.assert_frame_equal(loaded.sample(5000), samples)
    assert loaded.describe() == density.describe()
    assert loaded.held_out_nll_ == density.held_out_nll_
    assert not hasattr(loaded, "predict")


def test_files_of_other_things_are_refused(tmp_path):
    with pytest.raises(InputError):
        FlowDensity.load(tmp_path / "missing.jcnf")
    (tmp_path / "b.jcnf").write_bytes(b"not a density")
    with pytest.raises(InputError):
        FlowDensity.load(tmp_path / "b.jcnf")
    jcnf.training.checkpoint.save(tmp_path / "c.jcnf", jnp.zeros(2), {"step": 3})
    with pytest.raises(InputError, match=r"not written by FlowDensity\.save"):
        FlowDensity.load(tmp_path / "c.jcnf")


LOADED = """
import sys
import numpy as np, pandas as pd
from jcnf.sklearn import FlowDensity
density = FlowDensity.load(sys.argv[1])
np.save(sys.argv[3], density.score_samples(pd.read_pickle(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_new_process_gives_the_same_scores(density, scores, tmp_path):
    density.save(tmp_path / "a.jcnf")
    TABLE.to_pickle(tmp_path / "table")
    paths = [tmp_path / name for name in ("a.jcnf", "table", "scores.npy")]
    subprocess.run([sys.executable, "-c", LOADED, *paths], check=True, env=os.environ)
    np.testing.assert_array_equal(np.load(paths[-1]), scores)


def test_pickle_and_clone(density, scores):
    copied = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(copied.score_samples(TABLE), scores)
    unfitted = clone(density)
    assert unfitted.get_params() == density.get_params()
    with pytest.raises(NotFittedError):
        unfitted.score_samples(TABLE)


# Given a context


def spread(x):
    return 0.1 + 0.2 * np.abs(x)


def draw_pairs(seed, n):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-2, 2, (n, 1))
    return x, np.sin(2 * x) + spread(x) * rng.normal(size=x.shape)


FEW = 200  # rows of all scores and samples, which then share compiled programs
GRID = np.linspace(-1.8, 1.8, 50)[:, None]


@pytest.fixture(scope="module")
def given():
    x, y = draw_pairs(0, 1000)
    with small(folds=2, weight_decays=(0.1,)):
        return Density(steps=700).fit(y, context=pd.DataFrame(x, columns=["x"]))


@pytest.mark.slow
def test_the_mean_given_a_context_is_close(given):
    error = given.predict(GRID) - np.sin(2 * GRID[:, 0])
    assert error.shape == (50,)
    assert np.sqrt(np.mean((error / spread(GRID[:, 0])) ** 2)) < 0.5
    assert np.max(np.abs(error)) < 0.35


@pytest.mark.slow
def test_quantiles_given_a_context_are_close_and_ascend(given):
    levels = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
    found = given.quantile(levels, GRID)
    assert found.shape == (50, 7)
    assert np.all(np.diff(found, axis=1) > 0)
    truth = np.sin(2 * GRID) + spread(GRID) * stats.norm.ppf(levels)[None]
    assert np.sqrt(np.mean(((found - truth) / spread(GRID)) ** 2)) < 0.6
    np.testing.assert_array_equal(given.quantile(0.5, GRID), found[:, 3])
    x, y = draw_pairs(1, 50)  # of as many rows as the grid
    covered = np.mean(y <= given.quantile(levels, x), axis=0)
    assert np.all(np.abs(covered - levels) < 4 * np.sqrt(levels * (1 - levels) / 50))


@pytest.mark.slow
def test_quantiles_and_means_given_a_context_are_those_of_the_density(given):
    """Far into the tails too: against the integral of the density."""
    levels = np.array([1e-4, 0.01, 0.3, 0.5, 0.99, 0.9999])
    y = np.linspace(-4, 4, 10 * FEW)
    for x in (-1.5, 0.2):
        context = np.full((FEW, 1), x)
        parts = [given.score_samples(part[:, None], context=context) for part in np.split(y, 10)]
        p = np.exp(np.concatenate(parts))
        below = np.concatenate([[0], np.cumsum((p[1:] + p[:-1]) / 2 * np.diff(y))])
        found = given.quantile(levels, [[x]])[0]
        np.testing.assert_allclose(np.interp(found, y, below), levels, rtol=0.1, atol=2e-3)
        tails = np.interp(found[[0, -1]], y, np.minimum(below, below[-1] - below))
        np.testing.assert_allclose(tails, 1e-4, rtol=0.3)
        assert given.predict([[x]])[0] == pytest.approx(np.trapezoid(y * p, y), abs=3e-3)


@pytest.mark.slow
def test_quantiles_of_a_circular_column_are_those_of_its_samples():
    """From its lower to its upper bound, although the flow starts where data are fewest."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (400, 1))
    angle = (0.3 * rng.normal(size=x.shape)) % CIRCLE  # on both sides of the bound
    fitted = Density(steps=100, columns={0: Column(0, CIRCLE, circular=True)}).fit(angle, context=x)
    found = fitted.quantile([0.1, 0.4, 0.6, 0.9], [[0.0]])[0]
    drawn = fitted.sample(4000, context=[[0.0]])
    np.testing.assert_allclose(found, np.quantile(drawn, [0.1, 0.4, 0.6, 0.9]), atol=0.1)


def test_the_density_given_a_context_integrates_to_1(given):
    y = np.linspace(-3, 3, FEW)[:, None]
    for x in (-1.5, 0.2):
        p = np.exp(given.score_samples(y, context=np.full((FEW, 1), x)))
        assert abs(np.trapezoid(p, y[:, 0]) - 1) < 0.005
        law = stats.norm(np.sin(2 * x), spread(x))
        assert np.trapezoid(np.abs(p - law.pdf(y[:, 0])), y[:, 0]) < 0.4


def test_scores_given_a_context_are_close_to_the_truth(given):
    x, y = draw_pairs(1, FEW)
    truth = stats.norm.logpdf(y, np.sin(2 * x), spread(x)).mean()
    assert -0.05 < truth - given.score(y, context=x) < 0.2
    assert truth - given.score(y, context=-x) > 1


def test_scores_do_not_depend_on_the_other_rows(given):
    x, y = draw_pairs(1, FEW)
    scores = given.score_samples(y, context=x)
    few = given.score_samples(y[:7], context=x[:7])
    np.testing.assert_allclose(few, scores[:7], rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_finer_steps(given):
    """The number of steps is chosen by the rows held out."""
    x, y = draw_pairs(1, FEW)
    finer = pickle.loads(pickle.dumps(given))
    finer.mixture_ = given.mixture_._replace(steps=4 * given.mixture_.steps)
    errors = given.score_samples(y, context=x) - finer.score_samples(y, context=x)
    assert 0 < np.sqrt(np.mean(errors**2)) < 2e-3


def test_samples_use_the_rows_of_the_context_in_turn(given):
    drawn = given.sample(FEW, context=[[-1.2], [0.8], [0.0]])
    assert drawn.shape == (FEW, 1)
    means = [drawn[i::3].mean() for i in range(3)]
    np.testing.assert_allclose(means, np.sin([-2.4, 1.6, 0]), atol=0.25)


def test_a_context_far_away_has_a_density(given):
    assert np.isfinite(given.score_samples([[0.0]] * FEW, context=[[1e9]] * FEW)).all()


@pytest.mark.slow
def test_a_saved_density_keeps_its_context(given, tmp_path):
    x, y = draw_pairs(1, FEW)
    given.save(tmp_path / "a.jcnf")
    loaded = FlowDensity.load(tmp_path / "a.jcnf")
    expected = given.score_samples(y, context=x)
    np.testing.assert_array_equal(loaded.score_samples(y, context=x), expected)
    np.testing.assert_array_equal(loaded.predict(GRID), given.predict(GRID))


def test_only_a_density_with_a_context_predicts(density, given):
    for name in ("predict", "quantile"):
        with pytest.raises(AttributeError, match=name) as error:
            getattr(density, name)
        assert "fit(y, context=x)" in str(error.value.__cause__)
        assert not hasattr(FlowDensity(), name)
        assert hasattr(given, name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.score_samples([[0.0]]), r"given 1 column \(x\): pass context"),
        (lambda d: d.predict(pd.DataFrame({"z": [0.0]})), r"in this order; got .* \(z\)"),
        (lambda d: d.sample(3), "pass context"),
        (lambda d: d.score_samples([[0.0]], context=[[0.0]] * 2), "as many rows; got 1 and 2"),
        (
            lambda d: d.score_samples([[0.0]], context=[[0.0, 1.0]]),
            r"got 2 columns \(0, 1\)",
        ),
        (lambda d: d.predict([[np.nan]]), "the context has NaN or inf in column 0, in 1 of 1 rows"),
        (lambda d: d.predict([["a"]]), "context must be numbers"),
        (lambda d: d.predict([[[0.0]]]), r"of shape \(n, context\)"),
        (lambda d: d.quantile(1.0, [[0.0]]), "q must be between 0 and 1"),
        (lambda d: d.quantile([[0.5]], [[0.0]]), "q must be between 0 and 1"),
        (lambda d: d.sample(0, context=[[0.0]]), "n_samples must be"),
        (lambda d: d.score_samples([[0.0, 1.0]], context=[[0.0]]), "2 features, but FlowDensity"),
    ],
)
def test_a_bad_context_is_refused(given, call, message):
    with pytest.raises(ValueError, match=message):
        call(given)


def test_a_density_without_a_context_is_given_none(density):
    with pytest.raises(ValueError, match="without a context: leave out context"):
        density.score_samples(TABLE, context=np.zeros((N, 1)))
    with pytest.raises(ValueError, match="feature names should match"):
        density.score_samples(TABLE[TABLE.columns[::-1]])


@pytest.mark.slow
def test_names_of_columns_may_be_numbers(tmp_path):
    table = TABLE.iloc[:60, [0, 4]].set_axis([3, 7], axis=1)
    fitted = Density(steps=20).fit(table)
    assert fitted.describe().splitlines()[1].startswith("7: whole")
    fitted.save(tmp_path / "a.jcnf")
    for density in (fitted, FlowDensity.load(tmp_path / "a.jcnf")):
        drawn = density.sample(FEW)
        assert list(drawn.columns) == [3, 7]
        assert drawn.dtypes.tolist() == table.dtypes.tolist()
        assert np.isfinite(density.score_samples(drawn)).all()


# What is refused, and what is told

ROWS = np.random.default_rng(0).normal(size=(20, 2))


MIXED = pd.DataFrame(
    {"a": ROWS[:, 0], "b": ["x"] * 20, "c": pd.Timestamp("2020"), "d": [True] * 20}
)


def with_value(value, row=4):
    rows = ROWS.astype(object if isinstance(value, str) else float)
    rows[row, 1] = value
    return rows


@pytest.mark.parametrize(
    ("message", "x", "settings", "context"),
    [
        (r"constant in all 20 rows: 1: leave", np.c_[ROWS[:, 0], np.ones(20)], {}, None),
        ("minimum of 5 is required", ROWS[:4], {}, None),
        (r"NaN or inf in column 1, in 1 of 20 rows \(first: 4\)", with_value(np.nan), {}, None),
        ("the table has NaN or inf in column 1", with_value(np.inf), {}, None),
        ("could not convert string to float", with_value("a"), {}, None),
        ("the table has columns that are not numbers: b, c. ", MIXED, {}, None),
        ("the context has columns that are not numbers: b, c. ", ROWS, {}, MIXED),
        ("Expected 2D array", ROWS[:, 0], {}, None),
        ("column 1 is said to be positive, but has -", ROWS, {"columns": {1: "positive"}}, None),
        (r"has 7 in row 4: give wider", with_value(7.0), {"columns": {1: (-5, 5)}}, None),
        ("column 0 is said to be whole, but has", ROWS, {"columns": {0: "whole"}}, None),
        ("no column 'a'", ROWS, {"columns": {"a": "whole"}}, None),
        ("no column 2", ROWS, {"columns": {2: "whole"}}, None),
        ("column 0 must be 'unbounded'", ROWS, {"columns": {0: "wholes"}}, None),
        ("column 0: .*expected lower < upper", ROWS, {"columns": {0: (1, 0)}}, None),
        ("columns must map names", ROWS, {"columns": ["whole"]}, None),
        ("steps must be a whole number", ROWS, {"steps": 0}, None),
        ("steps must be a whole number", ROWS, {"steps": 2.5}, None),
        ("as many rows; got 20 and 19", ROWS, {}, ROWS[1:]),
        ("the context has NaN or inf in column 1", ROWS, {}, with_value(np.nan)),
        ("context must be numbers", ROWS, {}, with_value("a")),
        ("the context is constant in all 20 rows: 0", ROWS, {}, np.full(20, 0.123456789)),
    ],
)
def test_bad_arguments_are_refused(message, x, settings, context):
    with pytest.raises(ValueError, match=message):
        Density(**settings).fit(x, context=context)


@pytest.mark.parametrize(
    ("message", "x"),
    [
        ("column 1 counts the rows: leave it out", np.c_[ROWS[:, 0], np.arange(7, 27)]),
        ("20 rows are few for 11 columns", np.random.default_rng(1).normal(size=(20, 11))),
        (r"column 1: the value is more than 30 .* in 1 of 20 rows \(first: 4\)", with_value(1e6)),
        ("column 1: the logarithm is more than 30", np.exp(with_value(99.0))),
    ],
)
def test_odd_columns_are_told(message, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=message):
            Density().fit(x)


# Known densities


def excess(n, **settings):
    """Return the nats by which the truth beats a density of Beta(1/2, 1/2), on new rows."""
    rng, law = np.random.default_rng(0), stats.beta(0.5, 0.5)
    fitted = FlowDensity(progress=False, **settings).fit(rng.beta(0.5, 0.5, (n, 1)))
    x = rng.beta(0.5, 0.5, (1000, 1))
    return np.mean(law.logpdf(x[:, 0]) - fitted.score_samples(x)), fitted


@pytest.mark.slow
def test_a_density_that_is_infinite_at_both_ends():
    found, _ = excess(1000, steps=20)
    assert abs(found) < 0.02


@pytest.mark.slow
def test_a_density_that_is_infinite_at_both_ends_by_default():
    found, fitted = excess(6000)
    assert abs(found) < 0.005
    x = jnp.linspace(1e-6, 1 - 1e-6, 40_001)[:, None]
    p = np.exp(jcnf.log_prob(fitted.flow_, x))
    assert abs(np.trapezoid(p, x[:, 0]) - 1) < 0.01


# In scikit-learn


@pytest.mark.slow
def test_cross_validation_of_a_pipeline():
    pipeline = make_pipeline(StandardScaler(), Density(steps=20))
    rows = np.random.default_rng(0).multivariate_normal([1, 5], [[4, 1], [1, 1]], 400)
    found = cross_val_score(pipeline, rows, cv=2)
    scaled = StandardScaler().fit_transform(rows)
    truth = stats.multivariate_normal(np.zeros(2), np.cov(scaled.T)).logpdf(scaled).mean()
    np.testing.assert_allclose(found, truth, atol=0.25)


@pytest.mark.slow
def test_cross_validation_with_a_context():
    x, y = draw_pairs(0, 400)
    with sklearn.config_context(enable_metadata_routing=True):
        density = Density(steps=300).set_fit_request(context=True).set_score_request(context=True)
        found = cross_val_score(density, y, cv=2, params={"context": x})
    truth = stats.norm.logpdf(y, np.sin(2 * x), spread(x)).mean()
    assert np.all(truth - found < 0.5)
    assert np.all(truth - found > -0.2)


def checks():
    """Return the checks of scikit-learn's `check_estimator`, by name."""
    some = estimator_checks_generator(FlowDensity(steps=2, progress=False), mark="skip")
    for number, (estimator, check) in enumerate(some):
        yield pytest.param(estimator, check, id=f"{number} {check.func.__name__}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learns_own_check(estimator, check):
    check(estimator)
