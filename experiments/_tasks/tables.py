"""Learning the density of a table of numbers, as several experiments do."""

import dataclasses
import warnings
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments._runner.config import Loop, LoopExperiment, Measure, Run, Training
from experiments._runner.fields import FlowSettings, ResNet
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.loop import fit
from experiments._runner.objectives import FlowMatching, Objective
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir, kind_of, load_flow
from experiments._runner.settings import Count, Settings
from experiments._tasks.figures import save_density_figures
from jcnf import Flow, Solve, evaluate, plot, training
from jcnf._checks import InputError
from jcnf.data.tables import Standardizer, Table, load_table, write_rows
from jcnf.evaluate.chunks import evenly_spaced

SAMPLES = "samples.csv"
NUM_SAMPLES = 10_000


class TableSource(Settings):
    """Where a table comes from."""

    context: tuple[str, ...] = ()

    @property
    def path(self) -> Path | None:
        """The file or folder of the table; None if it comes with a package."""
        return None

    def load(self, seed: int) -> Table:
        """Return the table, split into training, validation and test parts."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFile(TableSource):
    """The table to learn."""

    # table to learn: .csv, .csv.gz, .npy or .npz (arrays train, val and test keep their split)
    data: Path
    # columns to leave out, by name or number (from 1)
    drop: tuple[str, ...] = ()
    # columns to condition on, by name or number (counted after --drop): learn the density of the
    # others given these (encode classes as columns of zeros and ones)
    context: tuple[str, ...] = ()
    # dequantize columns whose values repeat: add uniform noise as wide as one step
    dequantize: bool = False

    @property
    def path(self) -> Path:
        return self.data

    def load(self, seed: int) -> Table:
        return load_table(self.data, seed=seed, drop=self.drop, dequantize=self.dequantize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableMeasure(Measure):
    """Held-out numbers and validation."""

    # number of validation rows, which decide which parameters are kept
    validation_rows: Count = 2000


class TableExperiment(FlowExperiment, LoopExperiment):
    """The settings of an experiment that learns the density of a table."""

    table: TableSource
    measure: TableMeasure
    has_table = True


FLOW = FlowSettings(field=ResNet(width=128, time_frequencies=8))
TRAINING = Training(steps=20_000, lbfgs_batch=0)
LOOP = Loop(validate_every=1000, patience=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableFlow(TableExperiment):
    """A table in a file, and the flow that learns its density."""

    table: TableFile
    objective: Objective = FlowMatching()
    flow: FlowSettings = FLOW
    training: Training = TRAINING
    measure: TableMeasure = TableMeasure()
    loop: Loop = LOOP
    run: Run = Run()


class Columns(NamedTuple):
    """The columns of a table that are modeled, and those that are given as context."""

    scale: Standardizer  # of all columns
    modeled_indices: list[int]
    context_indices: list[int]

    @classmethod
    def of(cls, scale: Standardizer, context: tuple[str, ...]) -> "Columns":
        """Make `Columns` with a context of these names or numbers.

        **Raises:** `InputError` if no column is left to model.
        """
        given = scale.positions(context)
        modeled = [i for i in range(len(scale.columns)) if i not in given]
        if not modeled:
            raise InputError("--context leaves no column to model: name fewer")
        return cls(scale, modeled, given)

    @property
    def modeled(self) -> Standardizer:
        """The scale of the modeled columns."""
        return self.scale.take(self.modeled_indices)

    @property
    def context(self) -> Standardizer:
        """The scale of the context columns."""
        return self.scale.take(self.context_indices)

    def split(self, rows: np.ndarray) -> tuple[Array, Array | None]:
        """Split standardized whole rows into (x, context) on the device; context may be None."""
        x = jnp.asarray(rows[:, self.modeled_indices], float)
        context = jnp.asarray(rows[:, self.context_indices], float)
        return x, context if self.context_indices else None

    def join(self, x: np.ndarray, context: Array | None) -> np.ndarray:
        """Join x and context to whole rows; the inverse of `split`."""
        rows = np.zeros((len(x), len(self.scale.columns)))
        rows[:, self.modeled_indices] = x
        if context is not None:
            rows[:, self.context_indices] = context
        return rows


class TableRun(NamedTuple):
    """A finished run on a table."""

    path: Path
    flow: Flow
    settings: TableExperiment
    columns: Columns

    @classmethod
    def load(cls, path: Path) -> "TableRun":
        """Load a run of density or tabular.

        **Raises:** `InputError` if it is not one of these, or has not finished training.
        """
        kind = kind_of(path)
        if not issubclass(kind, TableExperiment):
            raise InputError(f"{path} was not trained on a table: give a run of density or tabular")
        flow, settings, notes = load_flow(path, kind)
        scale = Standardizer.from_json(notes["table"])
        return cls(path, flow, settings, Columns.of(scale, settings.table.context))

    def require_all_columns(self, flag: str) -> None:
        """Raise `InputError` that names a flag if the density is of some columns given others."""
        if self.columns.context_indices:
            raise InputError(
                f"{flag} needs the density of all columns, and {self.path} learned one given "
                f"{', '.join(self.settings.table.context)}: give a run trained without --context"
            )

    def load_table(self) -> Table:
        """Return the table that the run was trained on.

        **Raises:** `InputError` if it is missing or has changed.
        """
        source, scale = self.settings.table, self.columns.scale
        require_data(self.path, source.path)
        table = source.load(self.settings.run.seed)
        same = table.scale.columns == scale.columns
        if not same or not np.allclose(table.scale.mean, scale.mean, atol=1e-6 * scale.std):
            raise InputError(
                f"{source.path} has changed since {self.path} was trained on it: restore it"
            )
        return table


def require_data(run: Path, data: Path | None) -> None:
    """Raise `InputError` if the files that a run was trained on are missing."""
    if data is not None and not data.exists():
        raise InputError(
            f"{run} was trained on {data}, which does not exist: restore it, or start from the "
            "folder to which the path is relative"
        )


def sample_rows(
    flow: Flow,
    columns: Columns,
    solve: Solve,
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
    drawn = evaluate.sample(flow, key, count, context=given, solve=solve)
    rows = columns.scale.unstandardize(columns.join(drawn.x[-1], given))
    write_rows(out / SAMPLES, rows, columns.scale.columns)
    print(f"{out / SAMPLES}: {count} samples")
    if drawn.failures:
        warnings.warn(
            f"the solve failed for {drawn.failures} samples, which are nan in {SAMPLES}",
            stacklevel=2,
        )
    return rows


def learn_table(
    name: str,
    settings: TableExperiment,
    table: Table,
    *,
    num_samples: int = NUM_SAMPLES,
    contexts: np.ndarray | None = None,
) -> tuple[Flow, Path]:
    """Train on the training part, keep the parameters best on validation, measure on the test part.

    The `contexts` (rows, context) of the samples are standardized; by default they are those of the
    test part.

    **Returns:** the flow, and the run directory.
    """
    columns = Columns.of(table.scale, settings.table.context)
    dim, context_dim = len(columns.modeled_indices), len(columns.context_indices)
    try:
        settings.trace_objectives(dim, context_dim)
    except ValueError as error:
        raise InputError(str(error)) from None
    gaussian_nll = evaluate.gaussian_nll(table.train, table.test)
    if context_dim:  # p(x | c) = p(x, c) / p(c)
        given = table.take(columns.context_indices)
        gaussian_nll -= evaluate.gaussian_nll(given.train, given.test)
    run_dir = RunDir(name, settings)
    for warning in table.warnings:
        warnings.warn(warning, stacklevel=2)

    rows = evenly_spaced(len(table.val), settings.measure.validation_rows)
    validation, val_context = columns.split(table.val[rows])
    solve, val_solve = settings.measure.make_solve(), settings.measure.make_validation_solve()
    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(dim, context_dim, table.train[:, columns.modeled_indices]),
        make_draw=training.draw_rows,
        data=columns.split(table.train),
        validate=lambda flow: (
            evaluate.log_prob(flow, validation, context=val_context, solve=val_solve).nll
        ),
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {"table": table.scale.to_json(), "warnings": table.warnings})

    test, context = columns.split(table.test)
    if context is not None and contexts is None:
        contexts = np.asarray(context)
    key = jr.fold_in(jr.key(settings.run.seed), 3)
    with progress(f"drawing {num_samples} samples"):
        samples = sample_rows(flow, columns, solve, key, num_samples, contexts, run_dir.path)
    with progress(f"measuring on {len(test)} test rows"):
        report = evaluate.accuracy_report(flow, test, context=context, solve=solve)
    scores = report.scores
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "test_nll_original": scores.nll + columns.modeled.log_scale,
        "gaussian_nll": gaussian_nll,
        "val_nll": fitted.score,
    }
    numerics = report.numerics() | fitted.numerics()
    draw_figures(run_dir, settings, flow, table, samples, scores.nll)
    run_dir.save_figures(
        training=plot.training_curves(fitted.records, loss_units=settings.loss_units)
    )
    run_dir.finish(metrics, numerics, fitted.timing, [*table.warnings, *report.warnings()])
    return flow, run_dir.path


def draw_figures(
    run_dir: RunDir,
    settings: TableExperiment,
    flow: Flow,
    table: Table,
    drawn: np.ndarray,
    test_nll: float,
) -> None:
    """Draw a histogram of one column, the figures of the plane for two, or pair plots of more.

    `drawn` holds whole sampled rows in the units of the data.
    """
    scale, solve = table.scale, settings.measure.make_solve()
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
    elif len(scale.columns) == 2 and not settings.table.context:
        # Draw standardized columns: their units may differ, and both axes have one scale.
        (x0, y0), (x1, y1) = np.quantile(table.test, [0.001, 0.999], axis=0)
        grid = evaluate.grid(flow, (x0 - 0.5, x1 + 0.5, y0 - 0.5, y1 + 0.5), solve=solve)
        save_density_figures(
            run_dir,
            flow,
            table.test,
            scale.standardize(drawn),
            grid,
            key=jr.fold_in(jr.key(settings.run.seed), 4),
            solve=solve,
            title=f"{' and '.join(scale.columns)}, standardized: held-out NLL {test_nll:.3f} nats",
        )
    else:
        run_dir.save_figures(pairs=plot.pairs(data, drawn, scale.columns))
