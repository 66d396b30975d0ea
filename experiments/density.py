"""Learn the density of a table of numbers; then score rows, draw samples and fill in cells.

    python -m experiments.density --data table.csv
    python -m experiments.density use --from RUN_DIR --score new.csv --samples 1000 --out DIR

With --context, learn the density of the other columns given the named ones. `use` works with a
finished run; its flags are listed by `use --help`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run, check_reachable
from experiments._runner.settings import Count, Positive, Whole
from experiments._tasks.tables import (
    SAMPLES,
    Columns,
    TableFlow,
    TableRun,
    learn_table,
    sample_rows,
)
from jcnf import CNF, Solve, evaluate
from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, read_rows, write_rows
from jcnf.inference import impute
from jcnf.inference.gaussian import Gaussian

SCORES = "log_prob.csv"
IMPUTED = "imputed.csv"
IMPUTED_STD = "imputed_std.csv"
GAUSSIAN_FIT_SAMPLES = 5000


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseRun(Run):
    """The output directory, seed and precision."""

    # directory of the outputs (by default that of the finished run)
    out: Path | None = None
    # seed of the samples and draws
    seed: Whole = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseDensity(Experiment):
    """A finished run, and the outputs to write by its flow."""

    # finished run of density or tabular
    from_run: Annotated[Path, tyro.conf.arg(name="from")]
    # table to score: its rows' log-densities, nats in the units of the data, go to log_prob.csv
    score: Path | None = None
    # number of samples to write to samples.csv
    samples: Count | None = None
    # table whose rows are the contexts of the samples, in turn, if the run had a --context
    context_table: Path | None = None
    # table whose empty or NaN cells are filled in by means of draws given the rest of the row, in
    # imputed.csv; the standard deviations of the draws go to imputed_std.csv
    impute: Path | None = None
    # relative and absolute tolerance for log-densities and samples (by default that of the run)
    test_tolerance: Positive | None = None

    run: UseRun = UseRun()

    def check(self) -> None:
        if self.score is self.samples is self.impute is None:
            raise ValueError("give an output to write: --score PATH, --samples N or --impute PATH")
        if self.context_table is not None and self.samples is None:
            raise ValueError("--context-table serves sampling only: add --samples N")
        if self.test_tolerance is not None:
            check_reachable("test_tolerance", self.test_tolerance)


def run(settings: TableFlow | UseDensity) -> None:
    """Train and measure a flow, or use that of a finished run."""
    if isinstance(settings, TableFlow):
        learn_table("density", settings, settings.table.load(settings.run.seed))
    else:
        use(settings)


def use(settings: UseDensity) -> None:
    """Score rows, draw samples and fill in rows by the flow of a finished run."""
    trained = TableRun.load(settings.from_run)
    flow, columns, measure = trained.flow, trained.columns, trained.settings.measure
    if settings.test_tolerance is not None:
        measure = dataclasses.replace(measure, test_tolerance=settings.test_tolerance)
    out, solve = settings.run.out or settings.from_run, measure.make_solve()
    wanted_of = {SCORES: settings.score, SAMPLES: settings.samples, IMPUTED: settings.impute}
    for name, wanted in wanted_of.items():
        if wanted and (out / name).exists():
            raise InputError(f"{out / name} exists: give another directory with --out")
    if settings.impute is not None:
        trained.require_all_columns("--impute")
    context = read_contexts(settings, columns) if settings.samples is not None else None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {out} ({error.strerror}): choose another --out"
        ) from None
    seed = jr.key(settings.run.seed)
    if settings.score is not None:
        score_rows(flow, columns, solve, read_rows(settings.score, columns.scale.columns), out)
    if settings.samples is not None:
        # A different key from that of the samples drawn after training, so that these differ.
        sample_rows(flow, columns, solve, jr.fold_in(seed, 5), settings.samples, context, out)
    if settings.impute is not None:
        rows = read_rows(settings.impute, columns.scale.columns, missing=True)
        impute_rows(flow, columns.scale, jr.fold_in(seed, 7), rows, out)


def read_contexts(settings: UseDensity, columns: Columns) -> np.ndarray | None:
    """Return the rows of --context-table, standardized (rows, context); None without a context."""
    path, scale = settings.context_table, columns.scale.take(columns.given)
    if columns.given and path is not None:
        return scale.standardize(read_rows(path, scale.columns))
    if columns.given:
        raise InputError(
            f"{settings.from_run} learned a density given {', '.join(scale.columns)}: name a table "
            "of these columns with --context-table PATH"
        )
    if path is not None:
        raise InputError(f"{settings.from_run} had no --context: leave out --context-table")
    return None


def score_rows(flow: CNF, columns: Columns, solve: Solve, rows: np.ndarray, out: Path) -> None:
    """Write the log-density of each row, in nats and the units of the data, to log_prob.csv."""
    x, context = columns.split(columns.scale.standardize(rows))
    scores = evaluate.log_prob(flow, x, context=context, solve=solve)
    log_prob = scores.log_prob - columns.modeled.log_scale
    write_rows(out / SCORES, log_prob[:, None], ["log_prob"])
    print(f"{out / SCORES}: {len(rows)} log-densities, mean {np.mean(log_prob):.4f} nats")
    if scores.failures:
        print(
            f"warning: the solve failed for {scores.failures} rows, which are nan in {SCORES}: "
            "remove rows far outside the training data"
        )


def impute_rows(
    flow: CNF, scale: Standardizer, key: Key[Array, ""], rows: np.ndarray, out: Path
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
    samples = evaluate.sample(
        flow, sample_key, GAUSSIAN_FIT_SAMPLES, solve=impute.SAMPLING_SOLVE
    ).x[-1]
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


if __name__ == "__main__":
    main(run, {"train": TableFlow, "use": UseDensity})
