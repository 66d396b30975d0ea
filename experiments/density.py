"""Learn the density of a table of numbers; then score rows, draw samples and fill in cells.

    python -m experiments.density --data table.csv
    python -m experiments.density use --from RUN_DIR --score new.csv --samples 1000 --out DIR

With --context, learn the density of the other columns given the named ones. `use` works with a
finished run; its flags are listed by `use --help`.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run, check_reachable
from experiments._runner.settings import Count, Positive, Settings, Whole
from experiments._tasks.tables import (
    NUM_SAMPLES,
    SAMPLES,
    Columns,
    TableFlow,
    TableRun,
    learn_table,
    sample_rows,
)
from jcnf import Flow, Solve, evaluate
from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, read_rows, write_rows
from jcnf.inference import impute
from jcnf.inference.gaussian import Gaussian

SCORES = "log_prob.csv"
IMPUTED = "imputed.csv"
IMPUTED_STD = "imputed_std.csv"
GAUSSIAN_FIT_SAMPLES = 5000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs(Settings):
    """What to write beside the run: log-densities, samples and filled-in cells."""

    # table to score: its rows' log-densities, nats in the units of the data, go to log_prob.csv
    score: Path | None = None
    # number of samples to write to samples.csv (after training, by default 10000)
    samples: Count | None = None
    # table whose rows are the contexts of the samples, in turn, for a density learned with
    # --context (after training, by default the test rows)
    context_table: Path | None = None
    # table whose empty or NaN cells are filled in by means of draws given the rest of the row, in
    # imputed.csv; the standard deviations of the draws go to imputed_std.csv
    impute: Path | None = None

    def read(self, columns: Columns) -> "Inputs":
        """Read the tables, so that a bad one is found before anything long begins.

        **Raises:** `InputError` for a bad table, and for outputs that a density with or without a
        context does not have.
        """
        if self.context_table is not None and not columns.context_indices:
            raise InputError("--context-table needs a density learned with --context")
        if self.impute is not None and columns.context_indices:
            raise InputError(
                "--impute needs the density of all columns, and this one is given "
                f"{', '.join(columns.context.columns)}: train without --context"
            )
        names = columns.scale.columns
        return Inputs(
            None if self.score is None else read_rows(self.score, names),
            None
            if self.context_table is None
            else columns.context.standardize(
                read_rows(self.context_table, columns.context.columns)
            ),
            None if self.impute is None else read_rows(self.impute, names, missing=True),
        )


class Inputs(NamedTuple):
    """The tables that the outputs are made from."""

    to_score: np.ndarray | None
    contexts: np.ndarray | None  # standardized
    to_fill: np.ndarray | None

    def write(self, flow: Flow, columns: Columns, solve: Solve, seed: int, out: Path) -> None:
        """Write the log-densities and the filled-in rows."""
        if self.to_score is not None:
            score_rows(flow, columns, solve, self.to_score, out)
        if self.to_fill is not None:
            impute_rows(flow, columns.scale, jr.fold_in(jr.key(seed), 7), self.to_fill, out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Density(TableFlow):
    """A table in a file, the flow that learns its density, and the outputs to write."""

    outputs: Outputs = Outputs()


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
    # relative and absolute tolerance for log-densities and samples (by default that of the run)
    test_tolerance: Positive | None = None

    outputs: Outputs
    run: UseRun = UseRun()

    def check(self) -> None:
        outputs = self.outputs
        if outputs.score is outputs.samples is outputs.impute is None:
            raise ValueError("give an output to write: --score PATH, --samples N or --impute PATH")
        if outputs.context_table is not None and outputs.samples is None:
            raise ValueError("--context-table serves sampling only: add --samples N")
        if self.test_tolerance is not None:
            check_reachable("test_tolerance", self.test_tolerance)


def run(settings: Density | UseDensity) -> None:
    """Train and measure a flow, or use that of a finished run; write the outputs."""
    if isinstance(settings, UseDensity):
        use(settings)
        return
    table, outputs = settings.table.load(settings.run.seed), settings.outputs
    columns = Columns.of(table.scale, settings.table.context)
    inputs = outputs.read(columns)
    sampling = {"num_samples": outputs.samples or NUM_SAMPLES, "contexts": inputs.contexts}
    flow, out = learn_table("density", settings, table, **sampling)
    inputs.write(flow, columns, settings.measure.make_solve(), settings.run.seed, out)


def use(settings: UseDensity) -> None:
    """Score rows, draw samples and fill in rows by the flow of a finished run."""
    trained, outputs = TableRun.load(settings.from_run), settings.outputs
    flow, columns, measure = trained.flow, trained.columns, trained.settings.measure
    if settings.test_tolerance is not None:
        measure = dataclasses.replace(measure, test_tolerance=settings.test_tolerance)
    out, solve = settings.run.out or settings.from_run, measure.make_solve()
    wanted_of = {SCORES: outputs.score, SAMPLES: outputs.samples, IMPUTED: outputs.impute}
    for name, wanted in wanted_of.items():
        if wanted and (out / name).exists():
            raise InputError(f"{out / name} exists: give another directory with --out")
    inputs = outputs.read(columns)
    if outputs.samples is not None and columns.context_indices and inputs.contexts is None:
        raise InputError(
            f"{settings.from_run} learned a density given {', '.join(columns.context.columns)}: "
            "name a table of these columns with --context-table PATH"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {out} ({error.strerror}): choose another --out"
        ) from None
    if outputs.samples is not None:
        # A different key from that of the samples drawn after training, so that these differ.
        key = jr.fold_in(jr.key(settings.run.seed), 5)
        sample_rows(flow, columns, solve, key, outputs.samples, inputs.contexts, out)
    inputs.write(flow, columns, solve, settings.run.seed, out)


def score_rows(flow: Flow, columns: Columns, solve: Solve, rows: np.ndarray, out: Path) -> None:
    """Write the log-density of each row, in nats and the units of the data, to log_prob.csv."""
    x, context = columns.split(columns.scale.standardize(rows))
    scores = evaluate.log_prob(flow, x, context=context, solve=solve)
    log_prob = scores.log_prob - columns.modeled.log_scale
    write_rows(out / SCORES, log_prob[:, None], ["log_prob"])
    print(f"{out / SCORES}: {len(rows)} log-densities, mean {np.mean(log_prob):.4f} nats")
    if scores.failures:
        warnings.warn(
            f"the solve failed for {scores.failures} rows, which are nan in {SCORES}: remove rows "
            "far outside the training data",
            stacklevel=2,
        )


def impute_rows(
    flow: Flow, scale: Standardizer, key: Key[Array, ""], rows: np.ndarray, out: Path
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
        warnings.warn(
            f"the chains of {stuck} rows did not move: their entries are unreliable", stacklevel=2
        )


if __name__ == "__main__":
    main(run, {"train": Density, "use": UseDensity})
