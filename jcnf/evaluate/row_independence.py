"""Check that a row's log-density does not depend on the row's place in its batch.

A compiler or a device can be wrong in some places of a large batch and right everywhere else, and
then no measurement on a small batch shows it. For example, jaxlib 0.10.2 on CPUs gives wrong values
from row 8192 on, in 2 dimensions, if a field normalizes its input.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jcnf._checks import check_int, list_rows
from jcnf.divergence import Divergence, Exact, FixedNoise
from jcnf.evaluate.chunks import CHUNK
from jcnf.evaluate.log_prob import ACCURATE, check_data, log_prob
from jcnf.flows import Flow
from jcnf.ode import Solve

COPIED_ROWS = 100  # no compiler fault is known in batches this small


class RowIndependence(NamedTuple):
    """Log-densities of the same rows, repeated from end to end of one batch."""

    log_prob: np.ndarray  # (batch,) nats; NaN where the solve failed
    period: int  # the row at index i is a copy of the one at i % period

    @property
    def differences(self) -> np.ndarray:
        """Absolute difference between each row and its first copy, (batch,) nats.

        Infinite where the solve of one of them failed alone, NaN where both failed.
        """
        first = self.log_prob[np.arange(len(self.log_prob)) % self.period]
        alone = np.isnan(first) != np.isnan(self.log_prob)
        return np.where(alone, np.inf, np.abs(self.log_prob - first))

    @property
    def wrong_rows(self) -> np.ndarray:
        """Indices of rows that differ from their first copy by over sqrt(eps) (1 + |log-density|).

        That is far more than rounding; rows that failed in both places are not among them.
        """
        size = 1 + np.nan_to_num(np.abs(self.log_prob))
        return np.flatnonzero(self.differences > np.sqrt(np.finfo(size.dtype).eps) * size)

    @property
    def difference(self) -> float:
        """The largest of the differences, nats; NaN where no row could be compared."""
        known = self.differences[~np.isnan(self.differences)]
        return float(np.max(known)) if len(known) else np.nan

    def warning(self) -> str | None:
        """Return a sentence that says what is wrong and names the rows; None if nothing is."""
        wrong, batch = self.wrong_rows, len(self.log_prob)
        if not len(wrong):
            return None
        return (
            f"identical rows get different log-densities in a batch of {batch}: "
            f"{list_rows(wrong, batch)} differ from their first copy, by up to "
            f"{self.difference:.2g} nats. Suspect the compiler or the device: run "
            "`python -m jcnf.selfcheck`, and try another version of jaxlib"
        )


def row_independence(
    flow: Flow,
    x: Float[Array, "n dim"],
    *,
    key: Key[Array, ""] | None = None,
    context: Float[Array, "n context"] | None = None,
    solve: Solve = ACCURATE,
    divergence: Divergence = Exact(),  # noqa: B008 (frozen)
    batch: int = CHUNK,
) -> RowIndependence:
    """Score one batch that repeats the first rows of `x`, at most `COPIED_ROWS`.

    All copies go through one solve, with the same steps, so on a sound machine identical rows have
    identical log-densities, up to rounding. Set `batch` to the size of the batches that you want to
    trust: the program is then the one that `jcnf.evaluate.log_prob` runs on them.

    **Arguments:**

    - `x`: (n, dim), rows that the solve can carry to the base.
    - `key`: consumed once, and only by a stochastic `divergence`. Copies have the same noise.
    - `context`: (n, context), for a conditional flow.

    **Raises:** `ValueError` as `jcnf.evaluate.log_prob` does.
    """
    check_data(flow, x, context, solve, divergence)
    check_int(batch=batch)
    period = min(len(x), COPIED_ROWS, max(batch // 2, 1))
    x = jnp.asarray(x)[:period]
    divergence, noise = flow.with_noise(divergence, key, x)
    rows = x, None if context is None else context[:period], noise
    x, context, noise = jax.tree.map(lambda a: a[np.arange(batch) % period], rows)
    settings = {"solve": solve, "divergence": FixedNoise(divergence, noise), "chunk": batch}
    return RowIndependence(log_prob(flow, x, context=context, **settings).log_prob, period)
