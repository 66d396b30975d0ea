"""Score, sample and impute rows of a table with a trained flow, and write them as .csv."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import SolveSettings
from jcnf import Flow, evaluate
from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, write_rows
from jcnf.inference import impute
from jcnf.inference.gaussian import Gaussian

SAMPLES = "samples.csv"
SCORES = "log_prob.csv"
IMPUTED = "imputed.csv"
IMPUTED_STD = "imputed_std.csv"
GAUSSIAN_FIT_SAMPLES = 5000


class Columns(NamedTuple):
    """The columns of a table that are modeled, and those that are given as context."""

    scale: Standardizer  # of all columns
    places: list[int]  # indices of the modeled columns
    given: list[int]  # indices of the context columns

    @classmethod
    def of(cls, scale: Standardizer, context: tuple[str, ...]) -> "Columns":
        """Make `Columns` with a context of these names or numbers.

        **Raises:** `InputError` if no column is left to model.
        """
        given = scale.positions(context)
        places = [i for i in range(len(scale.columns)) if i not in given]
        if not places:
            raise InputError("--context leaves no column to model: name fewer")
        return cls(scale, places, given)

    @property
    def modeled(self) -> Standardizer:
        """The scale of the modeled columns."""
        return self.scale.take(self.places)

    def split(self, rows: np.ndarray) -> tuple[Array, Array | None]:
        """Split standardized whole rows into (x, context) on the device; context may be None."""
        x = jnp.asarray(rows[:, self.places], float)
        return x, jnp.asarray(rows[:, self.given], float) if self.given else None

    def join(self, x: np.ndarray, context: Array | None) -> np.ndarray:
        """Join x and context to whole rows; the inverse of `split`."""
        rows = np.zeros((len(x), len(self.scale.columns)))
        rows[:, self.places] = x
        if context is not None:
            rows[:, self.given] = context
        return rows


def score_rows(
    settings: SolveSettings, flow: Flow, columns: Columns, rows: np.ndarray, out: Path
) -> None:
    """Write the log-density of each row, in nats and the units of the data, to log_prob.csv."""
    x, context = columns.split(columns.scale.standardize(rows))
    scores = evaluate.log_prob(flow, x, context=context, solve=settings.make_test_solve())
    log_prob = scores.log_prob - columns.modeled.log_scale
    write_rows(out / SCORES, log_prob[:, None], ["log_prob"])
    print(f"{out / SCORES}: {len(rows)} log-densities, mean {np.mean(log_prob):.4f} nats")
    if scores.failures:
        print(
            f"warning: the solve failed for {scores.failures} rows, which are nan in {SCORES}: "
            "remove rows far outside the training data"
        )


def sample_rows(
    settings: SolveSettings,
    flow: Flow,
    columns: Columns,
    key: Key[Array, ""],
    count: int,
    context: np.ndarray | None,
    out: Path,
) -> np.ndarray:
    """Write `count` samples, in the units of the data, to samples.csv; return them as whole rows.

    The rows of `context` (rows, context), standardized, are used in turn. Consumes `key`.
    """
    given = None
    if context is not None:
        given = jnp.asarray(context[np.arange(count) % len(context)], float)
    drawn = evaluate.sample(flow, key, count, context=given, solve=settings.make_test_solve())
    rows = columns.scale.unstandardize(columns.join(drawn.x[-1], given))
    write_rows(out / SAMPLES, rows, columns.scale.columns)
    print(f"{out / SAMPLES}: {count} samples")
    if drawn.failures:
        print(f"warning: the solve failed for {drawn.failures} samples, nan in {SAMPLES}")
    return rows


def impute_rows(
    flow: Flow,
    scale: Standardizer,
    key: Key[Array, ""],
    rows: np.ndarray,
    out: Path,
) -> None:
    """Write `rows`, in the units of the data, to imputed.csv with missing (NaN) entries filled in.

    A missing entry becomes the mean of its draws, whose standard deviation goes to
    imputed_std.csv; it is 0 for known entries. Consumes `key`.
    """
    missing = np.isnan(rows)
    x = scale.standardize(np.where(missing, scale.mean, rows))
    x = np.asarray(jnp.asarray(np.where(missing, np.nan, x), float))
    # The draws start from a Gaussian. One fitted to the flow's own samples needs no data.
    sample_key, draw_key = jr.split(key)
    samples = evaluate.sample(flow, sample_key, GAUSSIAN_FIT_SAMPLES, solve=impute.SAMPLING).x[-1]
    gaussian = Gaussian.fit(samples[np.isfinite(samples).all(axis=1)])
    filled = impute.impute(flow, x, gaussian, draw_key)
    whole = np.where(missing, scale.unstandardize(filled.mean), rows)
    write_rows(out / IMPUTED, whole, scale.columns)
    write_rows(out / IMPUTED_STD, filled.std * scale.std, scale.columns)
    some = missing.any(axis=1)
    print(f"{out / IMPUTED}: {missing.sum()} entries of {some.sum()} rows filled in")
    stuck = int(np.sum(filled.acceptance[some] == 0))
    if stuck:
        print(f"warning: the chains of {stuck} rows did not move: their entries are unreliable")
