"""A mixture of a flow and of kernels of many widths, with the weights best on validation rows.

Places on the earth are crowded at many scales: fires return to within a kilometer, in forests that
are hundreds of kilometers wide. No single width of a kernel suits all of that, so there are kernels
of several widths, and kernels whose width follows the distance to their neighbors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from experiments._tasks.sphere_models import Mixture, Points, adaptive_kernels, kernels
from jcnf import Flow, Solve, evaluate
from jcnf.sklearn.mixture import best_weights, log_mean

CONCENTRATIONS = (1e2, 3e3, 1e5, 3e6)  # of equal kernels
NEIGHBORS, FRACTIONS = (3, 5, 10), (0.3, 0.8)  # of adaptive kernels


class Combined(NamedTuple):
    """The density (1 - share) mixture + share flow; either may be missing."""

    mixture: Mixture | None
    flow: Flow | None = None
    share: float = 0.0

    def score(self, x: Points, solve: Solve) -> Float[np.ndarray, " n"]:
        """Return the log-density of each row in nats; NaN where a flow alone cannot be solved."""
        scores, weights = [], []
        if self.mixture is not None:
            scores, weights = [self.mixture.score(x)], [1 - self.share]
        if self.flow is not None:
            scores.append(score_flow(self.flow, x, solve))
            weights.append(self.share)
        return log_mean(np.stack(scores, axis=1), np.array(weights))

    def sample(self, key: Key[Array, ""], num_samples: int, solve: Solve) -> Points:
        """Draw points, without those that could not be solved; consumes `key`."""
        count_key, mixture_key, flow_key = jr.split(key, 3)
        of_flow = int(jr.binomial(count_key, num_samples, self.share))
        drawn = []
        if self.flow is not None and of_flow:
            found = evaluate.sample(self.flow, flow_key, of_flow, solve=solve)
            drawn.append(found.x[-1][~found.failed])
        if self.mixture is not None and of_flow < num_samples:
            drawn.append(np.asarray(self.mixture.sample(mixture_key, num_samples - of_flow)))
        return np.concatenate(drawn)


def score_flow(flow: Flow, x: Points, solve: Solve) -> Float[np.ndarray, " n"]:
    """Return the log-density of each row by a flow in nats; NaN where the solve failed."""
    rows = jnp.asarray(x, float)
    found = np.array(evaluate.log_prob(flow, rows, solve=solve).log_prob)
    # Rows of a batch share their steps: one near a narrow component may fail there, but not alone.
    for row in np.flatnonzero(np.isnan(found)):
        found[row] = evaluate.log_prob(flow, rows[row : row + 1], solve=solve).log_prob[0]
    return found


def candidates(train: Points) -> dict[str, Mixture]:
    """Return kernels of many widths, by name."""
    found = {f"kernels of concentration {k:.0f}": kernels(train, k) for k in CONCENTRATIONS}
    for neighbor in NEIGHBORS:
        for fraction in FRACTIONS:
            name = f"kernels of {fraction} distances to neighbor {neighbor}"
            found[name] = adaptive_kernels(train, neighbor, fraction)
    return found


def combine(
    mixtures: dict[str, Mixture], flow: Flow | None, val: Points, solve: Solve
) -> tuple[Combined, dict[str, float]]:
    """Return the mixture of greatest likelihood on validation rows, and its weights by name."""
    names, scores = list(mixtures), [mixture.score(val) for mixture in mixtures.values()]
    if flow is not None:
        names, scores = [*names, "flow"], [*scores, score_flow(flow, val, solve)]
    weights = best_weights(np.stack(scores, axis=1))
    named = {name: float(w) for name, w in zip(names, weights, strict=True) if w > 0}
    share = named.get("flow", 0.0)
    of_mixtures = [(mixtures[name], w) for name, w in named.items() if name != "flow"]
    mixture = merge(of_mixtures) if of_mixtures else None
    return Combined(mixture, flow if share else None, share), named


def merge(weighted: Sequence[tuple[Mixture, float]]) -> Mixture:
    """Return one mixture with the components of all, whose weights are rescaled to sum to 1."""
    total = sum(weight for _, weight in weighted)
    means, concentrations, log_weights = zip(
        *((m.means, m.concentrations, m.log_weights + np.log(w / total)) for m, w in weighted),
        strict=True,
    )
    return Mixture(*map(jnp.concatenate, (means, concentrations, log_weights)))
