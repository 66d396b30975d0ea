"""Scores and checks of a posterior: against reference samples, and on held-out simulations."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Key
from tqdm import tqdm

from experiments._runner.progress import progress
from jcnf import evaluate, plot, sbi
from jcnf._checks import InputError
from jcnf.evaluate.chunks import evenly_spaced

FALSE_ALARMS = 0.05  # chance that an exact posterior is outside any of the bands
CHECKS = 3
RANK_BINS = 20


class Verdict(NamedTuple):
    """What one check found: whether its curve is inside the band of an exact posterior."""

    name: str
    p_value: float
    inside: bool
    area: float | None = None  # between curve and diagonal; negative for a posterior too narrow

    def in_words(self) -> str:
        """Return the verdict in a line."""
        words = f"{self.name}: p = {self.p_value:.2g}, "
        if self.inside:
            return words + "inside the band"
        words += "OUTSIDE the band"
        if self.area is None:
            return words
        return f"{words}: the posterior is too {'narrow' if self.area < 0 else 'wide'}"


class Checks(NamedTuple):
    """What held-out simulations say about a posterior."""

    simulations: int  # that were used
    failed: int  # that were not, because the solve of a sample or a density failed
    nll: float  # mean of -log p(truth | x), in nats
    nll_stderr: float
    gain: float  # mean of log p(truth | x) - log p(truth), in nats; 0 for the prior
    gain_stderr: float
    verdicts: tuple[Verdict, ...]
    figures: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """Return the numbers, without the figures."""
        found = self._asdict() | {"verdicts": [each._asdict() for each in self.verdicts]}
        return {name: value for name, value in found.items() if name != "figures"}


def finite_rows(simulations: sbi.Simulations) -> sbi.Simulations:
    """Return the simulations whose data are finite.

    **Raises:** `InputError` if none is.
    """
    theta, x = simulations
    good = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if not good.any():
        raise InputError("all held-out simulations have NaN or infinite values")
    return sbi.Simulations(theta[good], x[good])


def check_posterior(
    posterior: sbi.Posterior, held_out: sbi.Simulations, key: Key[Array, ""], num: int = 99
) -> Checks:
    """Rank the true parameters of held-out simulations among `num` posterior draws. Consumes `key`.

    The bands of all checks and parameters hold together with a probability of 95 %, by a
    Bonferroni correction.

    **Raises:** `InputError` if no simulation could be used.
    """
    theta, x = held_out
    n, dim = theta.shape
    with progress(f"drawing {num} samples for each of {n} held-out simulations"):
        draws = posterior.sample(key, num, x)
    with progress("measuring their log-densities"):
        points = np.concatenate([theta[:, None], draws], axis=1)
        log_prob = posterior.log_prob(points.reshape(-1, dim), np.repeat(x, num + 1, axis=0))
    log_prob = log_prob.reshape(n, num + 1)
    solved = np.isfinite(draws).all(axis=(1, 2)) & ~np.isnan(log_prob).any(axis=1)
    if not solved.any():
        raise InputError("no held-out simulation has a posterior that could be solved")
    theta, draws, log_prob = theta[solved], draws[solved], log_prob[solved]
    truths = log_prob[:, 0]
    gains = truths - posterior.prior.log_prob(theta)
    ranks = sbi.ranks(theta, draws)
    level = 1 - FALSE_ALARMS / CHECKS
    sbc = sbi.rank_calibration(ranks, num, level=1 - (1 - level) / dim)
    coverage = sbi.expected_coverage(truths, log_prob[:, 1:], level=level)
    tarp = sbi.tarp(theta, draws, level=level)
    names = posterior.prior.names
    verdicts = [
        Verdict(f"SBC of {name}", float(p), bool(inside))
        for name, p, inside in zip(names, sbc.p_value, sbc.inside, strict=True)
    ]
    verdicts += [
        Verdict(name, float(found.p_value), bool(found.inside), float(found.atc))
        for name, found in (("expected coverage", coverage), ("TARP", tarp))
    ]
    curves = np.stack([coverage.coverage, tarp.coverage])
    labels = ["expected coverage", "TARP"]
    return Checks(
        len(theta),
        n - len(theta),
        -float(np.mean(truths)),
        evaluate.standard_error(truths),
        float(np.mean(gains)),
        evaluate.standard_error(gains),
        tuple(verdicts),
        {
            "calibration": plot.calibration(
                coverage.levels, curves, coverage.lower, coverage.upper, labels
            ),
            "ranks": plot.ranks(ranks, num, names, bins=min(RANK_BINS, num + 1)),
        },
    )


class Scores(NamedTuple):
    """How far samples are from reference samples, by observation."""

    c2st: list[float]
    failed: int  # samples whose solve failed


def score_samples(
    samples: Float[np.ndarray, "m n dim"], references: Float[np.ndarray, "m n dim"]
) -> Scores:
    """Return the C2ST of the samples of each observation, with as many reference samples.

    **Raises:** `InputError` for an observation without samples.
    """
    found, failed = [], 0
    pairs = list(zip(samples, references, strict=True))
    for drawn, reference in tqdm(pairs, desc="C2ST", unit="observation", dynamic_ncols=True):
        kept = drawn[np.isfinite(drawn).all(axis=1)]
        failed += len(drawn) - len(kept)
        if len(kept) < 2:
            raise InputError("an observation has no samples, because their solves failed")
        some = reference[evenly_spaced(len(reference), len(kept))]
        found.append(sbi.c2st(some, kept, jobs=-1))
        tqdm.write(f"observation {len(found)} of {len(pairs)}: C2ST {found[-1]:.3f}")
    return Scores(found, failed)
