"""Calibration of a posterior, from simulations whose true parameters are known.

Each check takes n simulations: parameters drawn from the prior, an observation simulated from each,
and independent draws from the posterior given that observation. Each then ranks the truth among its
draws by some scalar: a parameter (`sbc`), the log-density (`expected_coverage`), or the distance to
a reference point (`tarp`). If the posterior is exact, truth and draws are exchangeable, so that the
rank is uniform on 0, ..., draws, and the ranks of simulations are independent. `rank_calibration`
tests this, without approximations.

The converse is false. A rank can be uniform although the posterior is wrong, and each function says
what it overlooks.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln
from scipy.stats import binom

from jcnf._checks import InputError, check_finite, check_int, check_number

MAX_LEVELS = 100  # at which a curve is compared with its band
MIN_P_VALUE = 1e-12  # below are differences of numbers near 1, which are rounding errors
_BISECTIONS = 40


class Calibration(NamedTuple):
    """Coverage against level, with the band that holds for an exact posterior.

    `coverage` is the share of simulations whose truth ranks below the level: the truth is below the
    posterior's quantile of this level (`sbc`), in its highest-density region of this mass
    (`expected_coverage`), or in the ball of this mass around the reference (`tarp`). For an exact
    posterior it is the level, and the whole curve is within the band with a probability of at least
    the one that was asked for.
    """

    levels: Float[np.ndarray, " levels"]  # from 0 to 1
    coverage: Float[np.ndarray, "*curves levels"]  # `sbc` has one curve for each parameter
    lower: Float[np.ndarray, " levels"]  # the band; it holds for each curve separately
    upper: Float[np.ndarray, " levels"]
    p_value: Float[np.ndarray, "*curves"]  # that the ranks are uniform; exact, but 0 below 1e-12

    @property
    def inside(self) -> Bool[np.ndarray, "*curves"]:
        """Whether a curve is within its band at every level."""
        within = (self.lower <= self.coverage) & (self.coverage <= self.upper)
        return np.asarray(within.all(axis=-1))

    @property
    def atc(self) -> Float[np.ndarray, "*curves"]:
        """The area between curve and diagonal over levels from 1/2 to 1, from -3/8 to 1/8.

        By `expected_coverage` and `tarp` it is negative if the posterior is too narrow (too sure),
        positive if it is too wide. The package sbi has the same quantity, as a sum over its levels
        in place of an integral.
        """
        levels = np.union1d(self.levels, 0.5)
        excess = self.coverage - self.levels
        rows = [np.interp(levels, self.levels, row) for row in excess.reshape(-1, excess.shape[-1])]
        upper_half = levels >= 0.5
        area = np.trapezoid(np.array(rows)[:, upper_half], levels[upper_half], axis=-1)
        return np.reshape(area, excess.shape[:-1])


def rank_calibration(
    ranks: Int[np.ndarray, "n *curves"], draws: int, *, level: float = 0.95
) -> Calibration:
    """Compare ranks with the uniform distribution on 0, ..., draws.

    The band is simultaneous: the distribution function of n uniform ranks is inside it at all of
    its levels at once with probability `level` or slightly more, since shares are discrete. At each
    level it has the binomial's central interval of one pointwise probability (Säilynoja, Bürkner
    and Vehtari 2022, "Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison", Statistics and Computing 32). That
    probability is found by bisection on the exact chance of staying inside, which convolutions over
    the levels give (as in Moscovich and Nadler 2017, "Fast calculation of boundary crossing
    probabilities for Poisson processes", Statistics & Probability Letters 123). Levels are
    multiples of 1/(draws + 1), about `MAX_LEVELS` of them.

    **Arguments:**

    - `ranks`: (n,), or (n, curves) for several curves, of whole numbers from 0 to `draws`.
    - `draws`: number of draws that each truth was ranked among.
    - `level`: the probability that an exact posterior's curve is inside the band. A band that holds
      for all of k curves at once has level 1 - 0.05/k.

    **Returns:** a `Calibration`. Its `p_value` is above 1 - `level` exactly if the curve is
    `inside`.

    **Raises:** `InputError` for ranks of another shape or outside 0, ..., draws, and `ValueError`
    for a level that is not between 0 and 1.
    """
    check_int(draws=draws)
    check_number("(0, 1)", level=level)
    ranks = np.asarray(ranks)
    if ranks.ndim not in (1, 2) or not ranks.size or not np.issubdtype(ranks.dtype, np.integer):
        raise InputError(
            "expected ranks of shape (n,) or (n, curves), whole numbers; got "
            f"{ranks.dtype} of shape {ranks.shape}"
        )
    if ranks.min() < 0 or ranks.max() > draws:
        raise InputError(
            f"ranks must be between 0 and draws={draws}; got {ranks.min()} to {ranks.max()}: "
            "pass the number of draws that each truth was ranked among"
        )
    number = len(ranks)
    steps = np.linspace(0, draws + 1, min(MAX_LEVELS, draws + 1) + 1).round().astype(int)
    levels = steps / (draws + 1)
    below = np.searchsorted(steps, ranks, side="right")  # the first of `steps` above the rank
    curves = below.reshape(number, -1).T
    counts = np.array([np.bincount(b, minlength=len(steps)).cumsum()[: len(steps)] for b in curves])
    inner = tuple(levels[1:-1].tolist())
    low, high = (np.zeros(len(levels)), np.ones(len(levels)))
    low[-1], high[0] = 1.0, 0.0
    low[1:-1], high[1:-1] = (edge / number for edge in _band(number, inner, float(level)))
    p_values = [_p_value(number, inner, row[1:-1]) for row in counts]
    shape = ranks.shape[1:]
    return Calibration(
        levels,
        (counts / number).reshape(*shape, len(levels)),
        low,
        high,
        np.array(p_values).reshape(shape),
    )


def _interval(number, levels, tail):
    """Return the smallest and largest count at each level whose both tails are above `tail`/2."""
    return binom.ppf([[tail / 2], [1 - tail / 2]], number, levels).astype(int)


@functools.lru_cache(maxsize=16)
def _band(number, levels, probability):
    """Return the narrowest band of counts that holds with at least this probability."""
    # The bounds of Bonferroni and of a single level.
    low, high = np.log((1 - probability) / max(len(levels), 1)), np.log(1 - probability)
    low -= 1e-9
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        holds = _chance_inside(number, levels, *_interval(number, levels, np.exp(middle)))
        low, high = (middle, high) if holds >= probability else (low, middle)
    return _interval(number, levels, np.exp(low))


def _p_value(number, levels, counts):
    """Return the chance that uniform ranks leave the binomial's center as far as these do."""
    # `binom.sf(k - 1)` is the chance of k or more.
    tails = np.minimum(binom.cdf(counts, number, levels), binom.sf(counts - 1, number, levels))
    tail = 2 * float(tails.min(initial=0.5)) * (1 + 1e-9)  # leaves out counts that are as far
    if tail >= 1:
        return 1.0
    lower, upper = _interval(number, levels, tail)
    p_value = 1 - _chance_inside(number, levels, lower, upper)
    return min(p_value, 1.0) if p_value > MIN_P_VALUE else 0.0


def _chance_inside(number, levels, lower, upper):
    """Return the chance that `number` uniform values have counts within bounds at all levels.

    The counts up to each level are those of a Poisson process with `number` events in all, whose
    increments are independent, so that the chances of paths inside follow by convolutions.
    """
    log_factorials = gammaln(np.arange(number + 2) + 1.0)

    def poisson(width, most):
        k = np.arange(most + 1)
        rate = number * width
        return np.exp(k * np.log(rate) - rate - log_factorials[: most + 1])

    start, chances, last = 0, np.ones(1), 0.0
    for level, low, high in zip(levels, lower, upper, strict=True):
        if high < low:
            return 0.0
        steps = poisson(level - last, high - start)
        chances = np.convolve(chances, steps)[low - start : high - start + 1]
        start, last = low, level
    ends = poisson(1 - last, number - start)[number - start - np.arange(len(chances))]
    whole = np.exp(number * np.log(number) - number - log_factorials[number])
    return float(chances @ ends / whole)


def ranks(
    theta: Float[np.ndarray, "n dim"], samples: Float[np.ndarray, "n draws dim"], *, seed: int = 0
) -> Int[np.ndarray, "n dim"]:
    """Return how many of a simulation's posterior draws are below the truth, for each parameter.

    Ties are broken at random, so that the ranks of an exact posterior are uniform on 0, ..., draws
    for parameters with repeated values too.

    **Arguments:**

    - `theta`: the true parameters, drawn from the prior.
    - `samples`: for each truth, independent draws from the posterior given what was simulated.
    - `seed`: seed of NumPy, for ties.

    **Raises:** `InputError` for other shapes, and `ValueError` for values that are not finite.
    """
    theta, samples = _truths_and_draws(theta, samples)
    return _ranks_among(theta, samples.transpose(0, 2, 1), seed)


def sbc(
    theta: Float[np.ndarray, "n dim"],
    samples: Float[np.ndarray, "n draws dim"],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Calibration:
    """Simulation-based calibration: are the posterior's marginals right, averaged over the prior?

    The ranks of truths among their draws are compared with the uniform distribution, for each
    parameter (Talts et al. 2018, "Validating Bayesian Inference Algorithms with Simulation-Based
    Calibration", arXiv:1804.06788). A posterior that is too narrow has too many ranks at both ends,
    so that its curve is above the diagonal at low levels and below it at high ones; a curve above
    the diagonal throughout means that the posterior lies too high.

    It overlooks errors in how parameters depend on each other, and errors that cancel between
    observations: the prior in place of the posterior passes.

    **Arguments:** as for `ranks` and `rank_calibration`.

    **Returns:** a `Calibration` with one curve and one p-value for each parameter.

    **Raises:** as `ranks` and `rank_calibration` do.
    """
    theta, samples = _truths_and_draws(theta, samples)
    return rank_calibration(ranks(theta, samples, seed=seed), samples.shape[1], level=level)


def expected_coverage(
    log_prob: Float[np.ndarray, " n"],
    samples_log_prob: Float[np.ndarray, "n draws"],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Calibration:
    """Expected coverage of the posterior's highest-density regions.

    A truth is in the region of mass a if less than a share a of its draws has a higher density
    (Hermans et al. 2022, "A Crisis In Simulation-Based Inference? Beware, Your Posterior
    Approximations Can Be Unfaithful", arXiv:2110.06581; by ranks, without a search for regions:
    Deistler, Gonçalves and Macke 2022, "Truncated proposals for scalable and hassle-free
    simulation-based inference", arXiv:2210.04815). A curve below the diagonal means that the
    posterior is too narrow, one above that it is too wide.

    It overlooks errors that leave the densities of truths and draws alike, such as a posterior that
    is mirrored about its mode. The prior in place of the posterior passes.

    **Arguments:**

    - `log_prob`: the posterior's log-densities at the truths, given their observations, in nats;
      -inf for truths outside its support. An additive constant for each observation does not
      matter.
    - `samples_log_prob`: the same of independent draws from the posterior given each observation.
    - `level`: as for `rank_calibration`.
    - `seed`: seed of NumPy, for ties.

    **Raises:** `InputError` for other shapes, and for NaN.
    """
    log_prob, draws = _floats(log_prob), _floats(samples_log_prob)
    if log_prob.ndim != 1 or draws.ndim != 2 or len(draws) != len(log_prob) or not draws.size:
        raise InputError(
            "expected log_prob of shape (n,) and samples_log_prob of shape (n, draws); got "
            f"{log_prob.shape} and {draws.shape}"
        )
    for name, values in {"log_prob": log_prob, "samples_log_prob": draws}.items():
        bad = np.asarray(np.isnan(values).reshape(len(values), -1).any(axis=1))
        if bad.any():
            raise InputError(
                f"{name} has NaN in {bad.sum()} of {len(bad)} rows (first: {bad.argmax()}): remove "
                "simulations whose solve failed from both arrays, and report their number"
            )
    places = _ranks_among(-log_prob, -draws, seed)
    return rank_calibration(places, draws.shape[1], level=level)


def tarp(
    theta: Float[np.ndarray, "n dim"],
    samples: Float[np.ndarray, "n draws dim"],
    *,
    references: Float[np.ndarray, "n dim"] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Calibration:
    """Expected coverage of balls around reference points (TARP; Lemos et al. 2023).

    The region of mass a is the ball around a reference point that has a share a of the draws
    ("Sampling-Based Accuracy Testing of Posterior Estimators for General Inference",
    arXiv:2302.03026). It needs no densities. Distances are Euclidean, after each parameter was
    divided by its standard deviation over the truths. A curve below the diagonal at high levels and
    above it at low ones means that the posterior is too narrow; the reverse, that it is too wide.

    References that do not depend on the observation leave a blind spot: the prior in place of the
    posterior passes, as does every posterior that is right on average over some part of the
    observation. Only a posterior that passes with every choice of references, as functions of the
    observation, is right. A point estimate of the parameters from the observation, with a shift,
    is a choice that catches the prior.

    **Arguments:**

    - `theta`, `samples`: as for `ranks`.
    - `references`: a point for each simulation, in the units of `theta`. They may depend on the
      observations, but not on `theta` or `samples`. By default they are drawn uniformly from the
      box of all truths.
    - `level`: as for `rank_calibration`.
    - `seed`: seed of NumPy, for references and ties.

    **Raises:** `InputError` for other shapes and for a parameter that is the same in all truths,
    and `ValueError` for values that are not finite.
    """
    theta, samples = _truths_and_draws(theta, samples)
    scale = theta.std(axis=0)
    if not scale.all():
        raise InputError(
            f"parameter {int(np.argmin(scale))} of theta is the same in all {len(theta)} "
            "simulations: leave it out, or draw it from the prior"
        )
    rng = np.random.default_rng(seed)
    if references is None:
        centers = rng.uniform(theta.min(axis=0), theta.max(axis=0), theta.shape)
    else:
        centers = _floats(references)
        if centers.shape != theta.shape:
            raise InputError(
                f"references must have the shape of theta, {theta.shape}; got {centers.shape}"
            )
        check_finite(references=centers)
    truths = (((theta - centers) / scale) ** 2).sum(axis=-1)
    draws = (((samples - centers[:, None]) / scale) ** 2).sum(axis=-1)
    return rank_calibration(_ranks_among(truths, draws, rng), draws.shape[1], level=level)


def _ranks_among(truths, draws, seed):
    """Return the number of draws (*n, draws) below each truth (*n,), with ties at random."""
    rng = np.random.default_rng(seed)
    below = (draws < truths[..., None]).sum(axis=-1)
    return below + rng.integers((draws == truths[..., None]).sum(axis=-1), endpoint=True)


def _floats(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)


def _truths_and_draws(theta, samples):
    theta, samples = _floats(theta), _floats(samples)
    fits = theta.ndim == 2 and samples.ndim == 3 and theta.size and samples.size
    if not fits or (len(theta), theta.shape[1]) != (len(samples), samples.shape[2]):
        raise InputError(
            "expected theta of shape (n, dim) and samples of shape (n, draws, dim), with at least "
            f"1 draw for each truth; got {theta.shape} and {samples.shape}"
        )
    check_finite(theta=theta, samples=samples)
    return theta, samples
