"""Two-sample tests where the best classifier, or the truth, is known."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.model_selection import KFold
from sklearn.neural_network import MLPClassifier
from sklearn.tree import DecisionTreeClassifier

from jcnf import sbi
from jcnf.sbi.two_sample import _standardized

STD = np.sqrt(0.5)  # of the posterior N(x/2, 1/2) of theta ~ N(0, 1), x | theta ~ N(theta, 1)
AT = np.array([[-1.0], [1.5]])


def pairs(rng, n, width=1.0):
    theta = rng.normal(size=(n, 1))
    x = theta + rng.normal(size=(n, 1))
    return theta, x / 2 + width * STD * rng.normal(size=(n, 1)), x


def draws_at(rng, m=200, width=1.0):
    return AT[:, None] / 2 + width * STD * rng.normal(size=(2, m, 1))


# C2ST


def test_c2st_of_shifted_normals_is_the_best_accuracy():
    """The best rule is right with probability Phi(shift/2)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 1)), rng.normal(size=(500, 1)) + 2
    best = norm.cdf(1)
    assert sbi.c2st(x, y) == pytest.approx(best, abs=4 * np.sqrt(best * (1 - best) / 1000))


def test_c2st_of_one_distribution_is_a_half():
    x, y = np.random.default_rng(0).normal(size=(2, 300, 2))
    assert sbi.c2st(x, y) == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / 600))


def test_c2st_is_that_of_sbibm_written_out():
    rng = np.random.default_rng(1)
    x, y = rng.normal(3, 2, (100, 2)).astype("float32"), rng.normal(3, 1, (80, 2))
    mean = x.astype(float).mean(axis=0).astype("float32")
    std = x.astype(float).std(axis=0, ddof=1).astype("float32")
    rows = np.concatenate([(x - mean) / std, (y.astype("float32") - mean) / std])
    labels, right = np.arange(180) >= 100, []
    for train, test in KFold(4, shuffle=True, random_state=7).split(rows):
        one = MLPClassifier((20, 20), max_iter=10_000, random_state=7)
        assert rows.dtype == np.float32
        one.fit(rows[train], labels[train])
        right.append(np.mean(one.predict(rows[test]) == labels[test]))
    assert sbi.c2st(x, y, seed=7, folds=4, jobs=2) == np.mean(right)


def test_standardized_samples_have_the_reference_deviation_by_n_minus_1_as_in_sbibm():
    x = np.array([[1.0], [3.0]], "float32")
    (found,) = _standardized(x, (x,), "x")
    np.testing.assert_allclose(found[:, 0], [-np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-6)


def test_c2st_does_not_depend_on_units():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 2))
    units = np.array([1024.0, 2.0**-10])  # exact in floating point
    assert sbi.c2st(x, y, folds=2) == sbi.c2st(x * units, y * units, folds=2)


# Local C2ST


def test_local_statistic_is_that_of_the_best_classifier():
    """Quadratic discriminants are the best classifier of these pairs, and they are consistent."""
    rng, width = np.random.default_rng(0), 0.6
    data = pairs(rng, 100_000, width), (draws_at(rng, 20_000, width), AT)
    found = sbi.local_c2st(*data[0], *data[1], trials=1, classifier=QuadraticDiscriminantAnalysis())
    z = np.linspace(-8, 8, 4001)
    truth, wrong = norm.pdf(z), norm.pdf(z, 0, width)
    best = np.trapezoid(wrong * (truth / (truth + wrong) - 0.5) ** 2, z)
    np.testing.assert_allclose(found.statistic, best, rtol=0.03)
    assert (found.null < 0.01 * best).all()


def test_local_p_values_of_an_exact_posterior_are_uniform():
    found = []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        best = QuadraticDiscriminantAnalysis()
        test = sbi.local_c2st(
            *pairs(rng, 100), draws_at(rng, 50)[0], AT[0], trials=9, classifier=best, seed=seed
        )
        found.append(test.p_value)
    for chance in (0.1, 0.5):
        error = np.sqrt(chance * (1 - chance) / 150)
        assert np.mean(np.array(found) <= chance + 1e-9) == pytest.approx(chance, abs=4 * error)


def test_local_c2st_tells_where_the_posterior_is_wrong():
    """The posterior has half of the width where x > 0."""
    rng = np.random.default_rng(0)
    theta, draws, x = pairs(rng, 3000)
    draws = np.where(x > 0, x / 2 + 0.5 * (draws - x / 2), draws)
    at = draws_at(rng)
    at[1] = AT[1] / 2 + 0.5 * (at[1] - AT[1] / 2)
    tree = DecisionTreeClassifier(min_samples_leaf=100)
    right, wrong = sbi.local_c2st(theta, draws, x, at, AT, trials=39, classifier=tree).p_value
    assert wrong == 1 / 40
    assert right > 0.05


def test_local_c2st_by_default_finds_a_narrow_posterior_and_is_repeatable():
    rng = np.random.default_rng(0)
    data = *pairs(rng, 400, 0.6), draws_at(rng, width=0.6)[0], AT[0]
    found = sbi.local_c2st(*data, trials=9)
    assert found.statistic.shape == ()
    assert found.null.shape == (9,)
    assert found.p_value == 1 / 10
    np.testing.assert_array_equal(sbi.local_c2st(*data, trials=1).null, found.null[:1])


def test_local_c2st_of_several_observations_is_that_of_each():
    rng = np.random.default_rng(0)
    data, at = pairs(rng, 200), draws_at(rng)
    tree = DecisionTreeClassifier(max_features=1, max_depth=4)  # random features
    together = sbi.local_c2st(*data, at, AT, trials=3, ensemble=2, classifier=tree)
    for i in range(2):
        alone = sbi.local_c2st(*data, at[i], AT[i], trials=3, ensemble=2, classifier=tree)
        np.testing.assert_allclose(alone.null, together.null[:, i], rtol=1e-12)
        np.testing.assert_allclose(alone.statistic, together.statistic[i], rtol=1e-12)


def test_local_p_value_counts_the_observed_statistic_and_ties():
    found = sbi.LocalC2ST(np.array(2.0), np.array([1.0, 2.0, 3.0, 1.0]))
    assert found.p_value == 3 / 5


# Input

ROWS = np.arange(12.0).reshape(6, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sbi.c2st(ROWS, ROWS[:, :1]), "two samples"),
        (lambda: sbi.c2st(ROWS * [0, 1], ROWS), "column 0 of x"),
        (lambda: sbi.c2st(ROWS, ROWS + np.inf), "y has NaN or inf"),
        (lambda: sbi.c2st(ROWS, ROWS, folds=1), "folds must be"),
        (lambda: sbi.local_c2st(ROWS, ROWS[:3], ROWS, ROWS, ROWS[0]), "one draw for each"),
        (lambda: sbi.local_c2st(ROWS, ROWS, ROWS, ROWS, ROWS), "draws_at of shape"),
        (lambda: sbi.local_c2st(ROWS, ROWS, ROWS, ROWS[:, :1], ROWS[0]), "2 columns of theta"),
        (lambda: sbi.local_c2st(ROWS, ROWS, 0 * ROWS, ROWS, ROWS[0]), "column 0 of x is"),
        (lambda: sbi.local_c2st(ROWS, ROWS, ROWS, ROWS, ROWS[0], trials=0), "trials must be"),
    ],
)
def test_two_sample_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
