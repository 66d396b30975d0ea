"""Learn the density of a table of numbers; score, sample and fill in rows, now or from a saved run.

With --context, the density of the other columns given these.
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
from jcnf import CNF, evaluate, plot, training
from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, Table, load_table, read_rows

# What --from goes with.
WITH_FROM = {"from_run", "out", "seed", "x64", "devices", "test_tolerance"}
WITH_FROM |= {"score", "samples", "given", "impute"}


@preset
class Density(FitSettings):
    """A table, the flow that learns it, and what is wanted of it."""

    # the table: .csv, .csv.gz, .npy, or .npz (arrays train, val and test keep their split)
    data: Path | None = None
    # columns to leave out, by name or number
    drop: tuple[str, ...] = ()
    # columns that are given, by name or number (after --drop): the density is that of the others
    # (numbers all: give classes as columns of zeros and ones)
    context: tuple[str, ...] = ()
    # add uniform noise of one step to columns whose values repeat
    dequantise: bool = False
    # table whose rows' log-densities go to log_prob.csv, in the units of the data
    score: Path | None = None
    # rows to sample to samples.csv, others for another --seed (default: 10000 after training)
    samples: int | None = None
    # with --context: table whose rows give it to the samples in turn (default: the test rows, after
    # training)
    given: Path | None = None
    # table whose empty cells (or NaN) are filled in, to imputed.csv: means of draws given the rest
    # of their row; their standard deviations go to imputed_std.csv
    impute: Path | None = None
    # finished run to score with, sample from and fill in by, without training
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # rows of the validation part by which the parameters to keep are chosen
    validation_rows: int = 2000

    widths = (128, 128)
    frequencies = 8
    steps = 20_000
    lbfgs_batch = 0
    has_table = True
    validate_every = 1000
    patience = 8

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        super().check()
        if self.needs_data() == (self.data is None):
            raise InputError("give --data PATH to train, or --from RUN_DIR to use a trained run")
        self.at_least(1, "validation_rows", *(["samples"] if self.samples is not None else []))
        if self.from_run is not None and self.score is self.samples is self.impute is None:
            raise InputError(
                "--from needs --score PATH, --samples N or --impute PATH: say what is wanted"
            )
        if self.from_run is not None:
            defaults = type(self)()
            names = {field.name for field in dataclasses.fields(self)} - WITH_FROM
            given = [n for n in names if getattr(self, n) != getattr(defaults, n)]
            if given:
                flags = ", ".join("--" + name.replace("_", "-") for name in sorted(given))
                raise InputError(f"--from takes everything from its run: leave out {flags}")
        if self.from_run is not None and jax.process_count() > 1:
            raise InputError("--from runs in one process only: unset JAX_COORDINATOR_ADDRESS")
        if self.from_run is not None and self.given is not None and self.samples is None:
            raise InputError("--given is for samples: add --samples N")
        if self.drop_context:
            raise InputError("--drop-context is for guidance, which tables have none of: leave it")
        if self.impute is not None and self.context:
            raise InputError("--impute needs the density of all columns: leave out --context")

    def batches(self) -> tuple[str, ...]:
        """The settings that are sizes of batches, which the devices must divide."""
        return super().batches() if self.from_run is None else ()

    def needs_data(self) -> bool:
        """Whether a table has to be named."""
        return self.from_run is None

    def load(self) -> Table:
        """The table, in its three parts."""
        assert self.data is not None  # by `check`
        return load_table(self.data, seed=self.seed, drop=self.drop, dequantise=self.dequantise)


def run(settings: Density) -> None:
    """Train and measure, or load a trained run; then score, sample, fill in."""
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
            f"{settings.from_run} is a density given {', '.join(trained.context)}: name a table of "
            "them with --given"
        )
    if settings.impute is not None and trained.context:
        raise InputError(
            f"{settings.from_run} is a density given {', '.join(trained.context)}: --impute needs "
            "one of all columns"
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
        # Not the key of training's samples: these are others.
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
        raise InputError("--given is of no use to a density without --context: drop it")
    return scale.standardize(read_rows(settings.given, scale.columns))


def train_and_measure(
    name: str,
    settings: Density,
    table: Table,
    peers: Callable[[], dict[str, float]] = dict,
) -> None:
    """Train on the table's training part, keep the best of validation, measure on the test.

    `peers()` gives figures of other models, to stand beside.
    """
    columns = Columns.of(table.scale, settings.context)
    scale = columns.modelled
    settings.check_objective(len(columns.places), len(columns.given))
    # Read before training: a table that cannot be scored is better known now.
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
            evaluate.score(flow, validation, context=val_context, solve=quick).nll
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
        certificate = evaluate.certify(flow, test, context=context, solve=solve)
    scores = certificate.scores
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "test_nll_original": scores.nll + scale.log_scale,
        "gaussian_nll": gaussian_nll,
        "val_nll": fitted.score,
        **peers(),
    }
    numerics = certificate.numerics() | fitted.numerics()
    draw_figures(run_dir, settings, flow, table, samples, scores.nll)
    run_dir.save_figures(
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
    )
    run_dir.finish(metrics, numerics, fitted.timing, [*table.warnings, *certificate.warnings()])


def draw_figures(
    run_dir: RunDir,
    settings: Density,
    flow: CNF,
    table: Table,
    drawn: np.ndarray,
    test_nll: float,
) -> None:
    """One column: a histogram; two: the figures of the plane; more: pair plots of samples.

    `drawn` are whole rows in the units of the data.
    """
    scale, solve = table.scale, settings.make_test_solve()
    data = scale.unstandardize(table.test)
    if len(scale.columns) == 1:
        line = np.linspace(table.test.min() - 0.5, table.test.max() + 0.5, 1000)[:, None]
        log_prob = evaluate.score(flow, jnp.asarray(line, float), solve=solve).log_prob
        figure = plot.histogram(
            data,
            drawn,
            scale.unstandardize(line)[:, 0],
            np.exp(log_prob - scale.log_scale),
            scale.columns[0],
        )
        run_dir.save_figures(density=figure)
    elif len(scale.columns) == 2 and not settings.context:
        # Standardized: equal axes suit columns of unequal units.
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
