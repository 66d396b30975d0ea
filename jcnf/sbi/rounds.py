"""Posteriors for one observation, from simulations in rounds."""

from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import InputError, check_int, check_key, check_number
from jcnf.sbi.posterior import Posterior, fit_posterior
from jcnf.sbi.priors import Prior, as_prior
from jcnf.sbi.simulate import Simulations, Simulator, finite, run

REGION_DRAWS = 2000  # samples of the posterior that determine its region
MAX_BATCH, MAX_PRIOR_DRAWS = 200_000, 20_000_000


def fit_in_rounds(
    prior: Any,
    simulator: Simulator,
    x: Any,
    n: int,
    *,
    key: Key[Array, ""],
    rounds: int = 2,
    outside: float = 1e-3,
    progress: bool = True,
    **settings: Any,
) -> tuple[Posterior, Simulations]:
    """Learn p(theta | x) for one x, with `n` simulations in each of several rounds.

    The first round draws parameters from the prior. Each round after it draws them from the prior
    within the region of highest density of the last posterior, which has all but a share `outside`
    of its mass, and trains on all simulations in that region. So no correction of the density is
    needed, and the method is that of Deistler, Goncalves and Macke 2022 ("Truncated proposals for
    scalable and hassle-free simulation-based inference"). The posterior that is returned holds for
    `x` only; calibration checks are possible with the simulations of the last region.

    **Arguments:**

    - `prior`, `simulator`: as for `jcnf.sbi.simulate`.
    - `x`: the observation (...).
    - `n`: the number of simulations in each round.
    - `key`: consumed once.
    - `rounds`: the number of rounds; 1 is `fit_posterior`.
    - `outside`: the share of mass that each region leaves out.
    - `settings`: further arguments of `fit_posterior`.

    **Returns:** the posterior, and the simulations on which it was trained.

    **Raises:** `ValueError` if the region is so small that 20 million draws from the prior have
    fewer than `n` in it; what `simulate` and `fit_posterior` raise.
    """
    prior = as_prior(prior)
    check_int(n=n, rounds=rounds)
    check_number("(0, 1)", outside=outside)
    check_key(key)
    first, *others = jr.split(key, rounds)

    def simulated(key, theta):
        return finite(run(simulator, theta, key=key, progress=progress))

    def fitted(key, simulations):
        return fit_posterior(prior, simulations, key=key, progress=progress, **settings)

    draw_key, run_key, fit_key = jr.split(first, 3)
    kept = simulated(run_key, prior.sample(draw_key, n))
    posterior = fitted(fit_key, kept)
    for key in others:
        region_key, draw_key, run_key, fit_key = jr.split(key, 4)
        region = _Region(posterior, x, outside, region_key)
        before = region.contains(kept.theta)
        new = simulated(run_key, region.sample(prior, draw_key, n))
        kept = Simulations(
            np.concatenate([kept.theta[before], new.theta]), np.concatenate([kept.x[before], new.x])
        )
        posterior = fitted(fit_key, kept)
    return posterior, kept


class _Region:
    """The region of highest density that has all but a share `outside` of a posterior's mass."""

    def __init__(self, posterior: Posterior, x: Any, outside: float, key: Key[Array, ""]):
        self.posterior, self.x = posterior, x
        draws = posterior.sample(key, REGION_DRAWS, x)
        scores = posterior.log_prob(draws, x)
        self.least = float(np.nanquantile(scores, outside))
        # A box around the region spares most evaluations of the density.
        inside = draws[scores >= self.least]
        margin = 0.1 * np.ptp(inside, axis=0)
        self.lower, self.upper = inside.min(axis=0) - margin, inside.max(axis=0) + margin

    def contains(self, theta: Float[np.ndarray, "n dim"]) -> np.ndarray:
        found = ((theta >= self.lower) & (theta <= self.upper)).all(axis=1)
        if found.any():
            found[found] = self.posterior.log_prob(theta[found], self.x) >= self.least
        return found

    def sample(self, prior: Prior, key: Key[Array, ""], n: int) -> Float[np.ndarray, "n dim"]:
        found, drawn, size = np.empty((0, prior.dim)), 0, n
        while len(found) < n:
            if drawn >= MAX_PRIOR_DRAWS:
                raise InputError(
                    f"of {drawn} draws from the prior only {len(found)} are in the region of the "
                    "last posterior: use fewer rounds, or a larger `outside`"
                )
            theta = prior.sample(jr.fold_in(key, drawn), size)
            found = np.concatenate([found, theta[self.contains(theta)]])
            drawn, size = drawn + size, min(2 * size, MAX_BATCH)
        return found[:n]
