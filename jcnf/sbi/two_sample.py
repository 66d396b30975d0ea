"""Tests whether a classifier can tell posterior draws from the truth."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.base import clone
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

from jcnf._checks import InputError, check_finite, check_int

HIDDEN_PER_COLUMN = 10  # units in each of the two hidden layers
# Among the settings tried, these best told a posterior of 0.85 times the true width from the true
# one, at 1,000 and 3,000 simulations. Early stopping on held-out rows does not replace the decay.
LOCAL_TRAINING: Any = {"alpha": 0.3, "learning_rate_init": 3e-3, "tol": 1e-3}


def c2st(
    x: Float[np.ndarray, "n dim"],
    y: Float[np.ndarray, "m dim"],
    *,
    seed: int = 1,
    folds: int = 5,
    jobs: int | None = None,
) -> float:
    """Held-out accuracy of a classifier that tells two samples apart (C2ST).

    It is 1/2 if the samples have the same distribution and 1 if they can be told apart for certain
    (Lopez-Paz and Oquab 2017, "Revisiting Classifier Two-Sample Tests", arXiv:1610.06545). The
    classifier, its settings and the folds are those of the benchmark sbibm (Lueckmann et al. 2021,
    "Benchmarking Simulation-Based Inference", arXiv:2101.04653), so that values can be compared
    with published ones: `x` and `y` are standardized by the mean and standard deviation of `x` and
    classified in float32 by scikit-learn's `MLPClassifier` with two hidden layers of 10 dim units;
    the value is the mean accuracy over the held-out folds. In sbibm, `x` are the reference draws
    and `y` those of the posterior, 10,000 each. Pass samples of equal size: always guessing the
    larger one is right more than half of the time.

    **Arguments:**

    - `x`, `y`: independent draws. Their order affects the folds.
    - `seed`: seed of the classifier and the folds.
    - `folds`: number of folds, at most the number of draws.
    - `jobs`: number of processes that share the folds, -1 for one on each core; by default, this
      process takes them all. The result is the same.

    The value depends on the seed: in hard cases, such as thin posteriors of the right shape, by
    several hundredths.

    **Raises:** `InputError` for other shapes and for a column of `x` that does not vary, and
    `ValueError` for values that are not finite.
    """
    x, y = (np.asarray(sample, np.float32) for sample in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise InputError(
            "expected two samples (n, dim) and (m, dim) of at least 2 points; got "
            f"{x.shape} and {y.shape}"
        )
    check_int(2, len(x) + len(y), folds=folds)
    check_int(0, seed=seed)
    check_finite(x=x, y=y)
    x, y = _standardized(x, (x, y), "x")
    classifier = MLPClassifier(_hidden(x.shape[1]), max_iter=10_000, random_state=seed)
    labels = np.repeat([0.0, 1.0], [len(x), len(y)])
    splits = KFold(folds, shuffle=True, random_state=seed)
    scores = cross_val_score(
        classifier, np.concatenate([x, y]), labels, cv=splits, scoring="accuracy", n_jobs=jobs
    )
    return float(np.mean(scores))


class LocalC2ST(NamedTuple):
    """The local classifier two-sample test at one observation, or at several."""

    statistic: Float[np.ndarray, "*observations"]  # mean of (probability - 1/2)^2, 0 to 1/4
    null: Float[np.ndarray, "trials *observations"]  # statistics if the posterior were right

    @property
    def p_value(self) -> Float[np.ndarray, "*observations"]:
        """The share of the statistics, the observed one included, that are at least as large."""
        return (1 + (self.null >= self.statistic).sum(axis=0)) / (1 + len(self.null))


def local_c2st(
    theta: Float[np.ndarray, "n dim"],
    draws: Float[np.ndarray, "n dim"],
    x: Float[np.ndarray, "n context"],
    draws_at: Float[np.ndarray, "*observations m dim"],
    x_at: Float[np.ndarray, "*observations context"],
    *,
    trials: int = 100,
    ensemble: int = 1,
    classifier: Any = None,
    seed: int = 1,
) -> LocalC2ST:
    """Test the posterior at single observations, without draws from the true one (L-C2ST).

    A classifier learns to tell pairs (theta, x) of the joint distribution from pairs (draw, x),
    with one posterior draw for each x. At an observation, its probability is 1/2 for all parameters
    if the posterior there is right; the statistic is the mean of (probability - 1/2)^2 over
    posterior draws at the observation (Linhart, Gramfort and Rodrigues 2023, "L-C2ST: Local
    Diagnostics for Posterior Approximations in Simulation-Based Inference", arXiv:2306.03580). The
    statistic is compared with those of classifiers that were trained after theta and draw of each
    pair were exchanged with probability 1/2. For an exact posterior these have the same
    distribution, so that the p-value is below a with probability at most a. (The paper permutes all
    labels, which also mixes pairs, and counts only the null statistics.)

    The power at an observation comes from simulations near it: a posterior that is wrong only there
    is overlooked if few are. The p-value is at least 1/(trials + 1).

    The cost is (`trials` + 1) `ensemble` trainings on 2 n rows, for all observations together.

    **Arguments:**

    - `theta`, `x`: parameters from the prior, and the observation simulated from each. They must
      not be those that the posterior was trained on.
    - `draws`: one posterior draw given each row of `x`.
    - `draws_at`, `x_at`: draws from the posterior given the observation to test, and that
      observation; with a leading axis for several observations.
    - `trials`: number of classifiers under the null hypothesis.
    - `ensemble`: number of classifiers whose probabilities are averaged for one statistic.
    - `classifier`: a scikit-learn classifier with `predict_proba`. By default an `MLPClassifier`
      with two hidden layers of 10 units for each column of theta and x, and weight decay, without
      which it overfits and null statistics are large. Theta and x are standardized before.
    - `seed`: seed of the exchanges and of the classifiers.

    **Raises:** `InputError` for shapes that do not agree and for columns of `theta` or `x` that do
    not vary, and `ValueError` for values that are not finite.
    """
    check_int(trials=trials, ensemble=ensemble)
    check_int(0, seed=seed)
    given = {"theta": theta, "draws": draws, "x": x, "draws_at": draws_at, "x_at": x_at}
    theta, draws, x, draws_at, x_at = (np.asarray(v, np.float32) for v in given.values())
    _check_pairs(theta, draws, x)
    _check_observations(theta, x, draws_at, x_at)
    check_finite(theta=theta, draws=draws, x=x, draws_at=draws_at, x_at=x_at)
    theta, draws, draws_at = _standardized(theta, (theta, draws, draws_at), "theta")
    x, x_at = _standardized(x, (x, x_at), "x")
    at = np.broadcast_to(x_at[..., None, :], (*draws_at.shape[:-1], x.shape[1]))
    points = np.concatenate([draws_at, at], axis=-1)
    if classifier is None:
        classifier = MLPClassifier(_hidden(points.shape[-1]), max_iter=1000, **LOCAL_TRAINING)
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], len(theta))

    def statistic(first, second):
        rows = np.concatenate([np.concatenate([part, x], axis=1) for part in (first, second)])
        chances = []
        for _ in range(ensemble):
            fitted = _seeded(clone(classifier), int(rng.integers(2**31))).fit(rows, labels)
            flat = fitted.predict_proba(points.reshape(-1, points.shape[-1]))[:, 1]
            chances.append(flat.reshape(points.shape[:-1]))
        return ((np.mean(chances, axis=0) - 0.5) ** 2).mean(axis=-1)

    def exchanged():
        swap = rng.random((len(theta), 1)) < 0.5
        return np.where(swap, theta, draws), np.where(swap, draws, theta)

    observed = statistic(draws, theta)
    null = [statistic(*exchanged()) for _ in range(trials)]
    return LocalC2ST(np.asarray(observed), np.array(null))


def _hidden(columns):
    return (HIDDEN_PER_COLUMN * columns,) * 2


def _standardized(reference, samples, name):
    """Return samples in units of the reference's standard deviations from its mean, in float32."""
    exact = reference.astype(np.float64)
    mean, std = (m.astype(np.float32) for m in (exact.mean(axis=0), exact.std(axis=0, ddof=1)))
    if not std.all():
        raise InputError(
            f"column {int(np.argmin(std))} of {name} is the same in all {len(reference)} rows: "
            "leave it out"
        )
    return [(sample - mean) / std for sample in samples]


def _seeded(classifier, seed):
    """Set each seed of a classifier, also those of the steps of a pipeline."""
    names = [n for n in classifier.get_params() if n.rpartition("__")[2] == "random_state"]
    return classifier.set_params(**dict.fromkeys(names, seed))


def _check_pairs(theta, draws, x):
    fits = theta.ndim == 2 and x.ndim == 2 and theta.shape == draws.shape and len(theta) == len(x)
    if not fits or len(theta) < 2:
        raise InputError(
            "expected theta and draws of shape (n, dim) and x of shape (n, context), with one draw "
            f"for each of at least 2 rows of x; got {theta.shape}, {draws.shape} and {x.shape}"
        )


def _check_observations(theta, x, draws_at, x_at):
    fits = draws_at.ndim in (2, 3) and x_at.ndim == draws_at.ndim - 1 and draws_at.size
    if not fits or draws_at.shape[:-2] != x_at.shape[:-1]:
        raise InputError(
            "expected draws_at of shape (m, dim) and x_at of shape (context,), or (observations, "
            f"m, dim) and (observations, context); got {draws_at.shape} and {x_at.shape}"
        )
    if (draws_at.shape[-1], x_at.shape[-1]) != (theta.shape[1], x.shape[1]):
        raise InputError(
            f"draws_at and x_at must have the {theta.shape[1]} columns of theta and the "
            f"{x.shape[1]} of x; got {draws_at.shape} and {x_at.shape}"
        )
