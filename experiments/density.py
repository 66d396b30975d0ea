"""Learn the density of a table of numbers; score rows, draw samples and fill in missing entries.

Train a flow with --data, or use a finished run with --from. With --context, learn the density of
the other columns given the named ones.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import preset
from experiments._runner.flow_config import FitSettings
from experiments._runner.loop import fit
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir, load_flow
from experiments._tasks.figures import plane
from experiments._tasks.tables import (
    IMPUTED,
    SAMPLES,
    SCORES,
    Columns,
    impute_rows,
    sample_rows,
    score_rows,
)
from jcnf import Flow, evaluate, plot, training
from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, Table, load_table, read_rows

# The settings that may be given with --from.
ALLOWED_WITH_FROM = {"from_run", "out", "seed", "x64", "devices", "test_tolerance"}
ALLOWED_WITH_FROM |= {"score", "samples", "given", "impute"}


@preset
class Density(FitSettings):
    """A table, the flow that learns its density, and the outputs to write."""

    # table to learn: .csv, .csv.gz, .npy or .npz (arrays train, val and test keep their split)
    data: Path | None = None
    # columns to leave out, by name or number (from 1)
    drop: tuple[str, ...] = ()
    # columns to condition on, by name or number (counted after --drop): learn the density of the
    # others given these (encode classes as columns of zeros and ones)
    context: tuple[str, ...] = ()
    # dequantize columns whose values repeat: add uniform noise as wide as one step
    dequantize: bool = False
    # table to score: its rows' log-densities, nats in the units of the data, go to log_prob.csv
    score: Path | None = None
    # samples to write to samples.csv; they depend on --seed (default: 10000 after training)
    samples: int | None = None
    # with --context: table whose rows are the contexts of the samples, in turn (default: the test
    # rows, after training)
    given: Path | None = None
    # table whose empty or NaN cells are filled in by means of draws given the rest of the row, in
    # imputed.csv; the standard deviations of the draws go to imputed_std.csv
    impute: Path | None = None
    # finished run to use for --score, --samples and --impute, instead of training
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # validation rows that decide which parameters are kept
    validation_rows: int = 2000

    widths = (128, 128)
    frequencies = 8
    steps = 20_000
    lbfgs_batch = 0
    has_table = True
    validate_every = 1000
    patience = 8

    def check(self) -> None:
        super().check()
        if self.needs_data() == (self.data is None):
            raise InputError(
                "give either --data PATH to train, or --from RUN_DIR to use a finished run"
            )
        self.at_least(1, "validation_rows", *(["samples"] if self.samples is not None else []))
        if self.from_run is not None and self.score is self.samples is self.impute is None:
            raise InputError(
                "--from needs an output to write: add --score PATH, --samples N or --impute PATH"
            )
        if self.from_run is not None:
            defaults = type(self)()
            names = {field.name for field in dataclasses.fields(self)} - ALLOWED_WITH_FROM
            given = [n for n in names if getattr(self, n) != getattr(defaults, n)]
            if given:
                flags = ", ".join("--" + name.replace("_", "-") for name in sorted(given))
                raise InputError(f"--from takes these settings from the run: leave out {flags}")
        if self.from_run is not None and jax.process_count() > 1:
            raise InputError("--from works in one process only: unset JAX_COORDINATOR_ADDRESS")
        if self.from_run is not None and self.given is not None and self.samples is None:
            raise InputError("--given only serves sampling: add --samples N")
        if self.drop_context:
            raise InputError(
                "--drop-context serves guidance, which tables do not use: leave it out"
            )
        if self.impute is not None and self.context:
            raise InputError("--impute needs the density of all columns: leave out --context")

    def batches(self) -> tuple[str, ...]:
        """Names of the batch-size settings that the devices must divide."""
        return super().batches() if self.from_run is None else ()

    def needs_data(self) -> bool:
        """Return whether --data is required."""
        return self.from_run is None

    def load(self) -> Table:
        """Load the table, split into training, validation and test parts."""
        assert self.data is not None  # by `check`
        return load_table(self.data, seed=self.seed, drop=self.drop, dequantize=self.dequantize)


def run(settings: Density) -> None:
    """Train and measure, or load a finished run; then score, sample and fill in rows."""
    if settings.from_run is None:
        train_and_measure("density", settings, settings.load())
        return
    flow, trained, notes = load_flow(settings.from_run, Density)
    if settings.test_tolerance != Density.test_tolerance:
        trained = dataclasses.replace(trained, test_tolerance=settings.test_tolerance)
    out = settings.out or settings.from_run
    wanted_of = {SCORES: settings.score, SAMPLES: settings.samples, IMPUTED: settings.impute}
    for name, wanted in wanted_of.items():
        if wanted and (out / name).exists():
            raise InputError(f"{out / name} exists: give another directory with --out")
    columns = Columns.of(Standardizer.from_json(notes["table"]), trained.context)
    context = _context_rows(settings, columns)
    if settings.samples is not None and trained.context and context is None:
        raise InputError(
            f"{settings.from_run} learned a density given {', '.join(trained.context)}: "
            "name a table of these columns with --given PATH"
        )
    if settings.impute is not None and trained.context:
        raise InputError(
            f"--impute needs the density of all columns, and {settings.from_run} learned one given "
            f"{', '.join(trained.context)}: give a run trained without --context"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {out} ({error.strerror}): choose another --out"
        ) from None
    if settings.score is not None:
        rows = read_rows(settings.score, columns.scale.columns)
        score_rows(trained, flow, columns, rows, out)
    if settings.samples is not None:
        # A different key from that of the samples drawn after training, so that these differ.
        key = jr.fold_in(jr.key(settings.seed), 5)
        sample_rows(trained, flow, columns, key, settings.samples, context, out)
    if settings.impute is not None:
        rows = read_rows(settings.impute, columns.scale.columns, missing=True)
        impute_rows(flow, columns.scale, _impute_key(settings), rows, out)


def _impute_key(settings: Density) -> Key[Array, ""]:
    return jr.fold_in(jr.key(settings.seed), 7)


def _context_rows(settings: Density, columns: Columns) -> np.ndarray | None:
    """The rows of --given, standardized (rows, context)."""
    if settings.given is None:
        return None
    scale = columns.scale.take(columns.given)
    if not columns.given:
        raise InputError("--given needs a density learned with --context: leave out --given")
    return scale.standardize(read_rows(settings.given, scale.columns))


def train_and_measure(
    name: str,
    settings: Density,
    table: Table,
    peers: Callable[[], dict[str, float]] = dict,
) -> None:
    """Train on the training part, keep the parameters best on validation, measure on the test part.

    `peers()` returns further metrics, of other models, for the summary.
    """
    columns = Columns.of(table.scale, settings.context)
    scale = columns.modeled
    settings.check_objective(len(columns.places), len(columns.given))
    # Read these tables before training, so that a bad one is found at once.
    to_score = read_rows(settings.score, table.scale.columns) if settings.score else None
    to_fill = None
    if settings.impute is not None:
        to_fill = read_rows(settings.impute, table.scale.columns, missing=True)
    context_rows = _context_rows(settings, columns)
    gaussian_nll = evaluate.gaussian_nll(table.train, table.test)
    if columns.given:  # p(x | c) = p(x, c) / p(c)
        given = table.take(columns.given)
        gaussian_nll -= evaluate.gaussian_nll(given.train, given.test)
    run_dir = RunDir(name, settings, resume=settings.resume)
    for warning in table.warnings:
        print(f"warning: {warning}")

    count = min(settings.validation_rows, len(table.val))
    evenly = np.linspace(0, len(table.val) - 1, count).astype(int)
    validation, val_context = columns.split(table.val[evenly])
    solve, quick = settings.make_test_solve(), settings.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(len(columns.places), len(columns.given)),
        draw_of=training.draw_rows,
        data=columns.split(table.train),
        validate=lambda flow: (
            evaluate.log_prob(flow, validation, context=val_context, solve=quick).nll
        ),
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {"table": table.scale.to_json(), "warnings": table.warnings})

    if to_score is not None:
        score_rows(settings, flow, columns, to_score, run_dir.path)
    if to_fill is not None:
        impute_rows(flow, scale, _impute_key(settings), to_fill, run_dir.path)
    test, context = columns.split(table.test)
    if context is not None and context_rows is None:
        context_rows = np.asarray(context)
    key, count = jr.fold_in(jr.key(settings.seed), 3), settings.samples or 10_000
    with progress(f"drawing {count} samples"):
        samples = sample_rows(settings, flow, columns, key, count, context_rows, run_dir.path)
    with progress(f"measuring on {len(test)} test rows"):
        report = evaluate.accuracy_report(flow, test, context=context, solve=solve)
    scores = report.scores
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "test_nll_original": scores.nll + scale.log_scale,
        "gaussian_nll": gaussian_nll,
        "val_nll": fitted.score,
        **peers(),
    }
    numerics = report.numerics() | fitted.numerics()
    draw_figures(run_dir, settings, flow, table, samples, scores.nll)
    run_dir.save_figures(
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
    )
    run_dir.finish(metrics, numerics, fitted.timing, [*table.warnings, *report.warnings()])


def draw_figures(
    run_dir: RunDir,
    settings: Density,
    flow: Flow,
    table: Table,
    drawn: np.ndarray,
    test_nll: float,
) -> None:
    """Draw a histogram of one column, the figures of the plane for two, or pair plots of more.

    `drawn` holds whole sampled rows in the units of the data.
    """
    scale, solve = table.scale, settings.make_test_solve()
    data = scale.unstandardize(table.test)
    if len(scale.columns) == 1:
        line = np.linspace(table.test.min() - 0.5, table.test.max() + 0.5, 1000)[:, None]
        log_prob = evaluate.log_prob(flow, jnp.asarray(line, float), solve=solve).log_prob
        figure = plot.histogram(
            data,
            drawn,
            scale.unstandardize(line)[:, 0],
            np.exp(log_prob - scale.log_scale),
            scale.columns[0],
        )
        run_dir.save_figures(density=figure)
    elif len(scale.columns) == 2 and not settings.context:
        # Draw standardized columns: their units may differ, and both axes have one scale.
        (x0, y0), (x1, y1) = np.quantile(table.test, [0.001, 0.999], axis=0)
        grid = evaluate.grid(flow, (x0 - 0.5, x1 + 0.5, y0 - 0.5, y1 + 0.5), solve=solve)
        plane(
            run_dir,
            flow,
            table.test,
            scale.standardize(drawn),
            grid,
            key=jr.fold_in(jr.key(settings.seed), 4),
            solve=solve,
            title=f"{' and '.join(scale.columns)}, standardized: held-out NLL {test_nll:.3f} nats",
        )
    else:
        run_dir.save_figures(pairs=plot.pairs(data, drawn, scale.columns))


if __name__ == "__main__":
    main(run, Density)
