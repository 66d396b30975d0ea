"""Learn the density of a table of numbers; score rows and draw samples, now or from a saved run."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Key

from experiments.figures import plane
from experiments.harness import main
from experiments.loop import fit
from experiments.rundir import RunDir, load_flow
from experiments.settings import FlowSettings
from jcnf import CNF, evaluate, plot
from jcnf.data.tables import Standardizer, Table, load_table, read_rows, write_rows
from jcnf.errors import InputError

SAMPLES = "samples.csv"
SCORES = "log_prob.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Density(FlowSettings):
    """A table, the flow that learns it, and what is wanted of it."""

    # the table: .csv, .csv.gz, .npy, or .npz (arrays train, val and test keep their split)
    data: Path | None = None
    # columns to leave out, by name or number
    drop: tuple[str, ...] = ()
    # add uniform noise of one step to columns whose values repeat
    dequantise: bool = False
    # table whose rows' log-densities go to log_prob.csv, in the units of the data
    score: Path | None = None
    # rows to sample to samples.csv, others for another --seed (default: 10000 after training)
    samples: int | None = None
    # finished run to score with and sample from, without training
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # rows of the validation part by which the parameters to keep are chosen
    validation_rows: int = 4000

    # hidden widths of the field
    widths: tuple[int, ...] = (128, 128)
    # optimiser steps
    steps: int = 6000
    # samples in a training batch
    batch: int = 512
    # gradient norm above which gradients are scaled down
    clip: float = 10.0
    # steps between validations; the parameters with the best one are kept
    validate_every: int = 500

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        super().check()
        if (self.data is None) == (self.from_run is None):
            raise InputError("give --data PATH to train, or --from RUN_DIR to use a trained run")
        self.at_least(1, "validation_rows", *(["samples"] if self.samples is not None else []))
        if self.from_run is not None and self.score is None and self.samples is None:
            raise InputError("--from needs --score PATH or --samples N: say what is wanted")


def run(settings: Density) -> None:
    """Train and measure, or load a trained run; then score and sample."""
    if settings.from_run is None:
        train_and_measure(settings)
        return
    flow, trained, notes = load_flow(settings.from_run, Density)
    out = settings.out or settings.from_run
    for name, wanted in ((SCORES, settings.score), (SAMPLES, settings.samples)):
        if wanted and (out / name).exists():
            raise InputError(f"{out / name} exists: give another directory with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {out} ({error.strerror}): choose another --out"
        ) from None
    scale = Standardizer.from_json(notes["table"])
    if settings.score is not None:
        score_rows(trained, flow, scale, read_rows(settings.score, scale.columns), out)
    if settings.samples is not None:
        # Not the key of training's samples: these are others.
        key = jr.fold_in(jr.key(settings.seed), 5)
        sample_rows(trained, flow, scale, key, settings.samples, out)


def score_rows(
    settings: Density, flow: CNF, scale: Standardizer, rows: np.ndarray, out: Path
) -> None:
    """Write each row's log-density, nats in the units of the data, to log_prob.csv."""
    x = jnp.asarray(scale.standardize(rows), float)
    scores = evaluate.score(flow, x, solve=settings.make_test_solve())
    log_prob = scores.log_prob - scale.log_scale
    write_rows(out / SCORES, log_prob[:, None], ["log_prob"])
    print(f"{out / SCORES}: {len(rows)} log-densities, mean {np.mean(log_prob):.4f} nats")
    if scores.failures:
        print(
            f"warning: the solve failed for {scores.failures} rows: nan in "
            f"{SCORES}; leave out rows far outside the training data"
        )


def sample_rows(
    settings: Density, flow: CNF, scale: Standardizer, key: Key[Array, ""], count: int, out: Path
) -> evaluate.Transport:
    """Write `count` samples, in the units of the data, to samples.csv; consumes `key`."""
    samples = evaluate.draw(flow, key, count, solve=settings.make_test_solve())
    write_rows(out / SAMPLES, scale.unstandardize(samples.x[-1]), scale.columns)
    print(f"{out / SAMPLES}: {count} samples")
    return samples


def train_and_measure(settings: Density) -> None:
    """Train on the table's training part, keep the best of validation, measure on the test."""
    assert settings.data is not None  # by `check`
    table = load_table(
        settings.data, seed=settings.seed, drop=settings.drop, dequantise=settings.dequantise
    )
    rows, dim = table.train.shape
    if rows < settings.batch:
        raise InputError(
            f"{settings.data} has {rows} training rows, fewer than a batch of {settings.batch}: "
            f"give --batch {max(rows // 4, 1)}"
        )
    settings.check_objective(dim)
    # Read before training: a table that cannot be scored is better known now.
    to_score = read_rows(settings.score, table.scale.columns) if settings.score else None
    gaussian_nll = evaluate.gaussian_nll(table.train, table.test)
    run_dir = RunDir("density", settings, resume=settings.resume)
    for warning in table.warnings:
        print(f"warning: {warning}")

    count = min(settings.validation_rows, len(table.val))
    evenly = np.linspace(0, len(table.val) - 1, count).astype(int)
    validation = jnp.asarray(table.val[evenly], float)
    solve = settings.make_test_solve()
    fitted = fit(
        run_dir,
        settings,
        settings.make_flow(dim),
        draw_batch=lambda key, data: data[jr.randint(key, (settings.batch,), 0, rows)],
        data=jnp.asarray(table.train, float),
        validate=lambda flow: evaluate.score(flow, validation, solve=solve).nll,
    )
    flow = fitted.flow
    run_dir.save_flow(flow, {"table": table.scale.to_json(), "warnings": table.warnings})

    if to_score is not None:
        score_rows(settings, flow, table.scale, to_score, run_dir.path)
    key, count = jr.fold_in(jr.key(settings.seed), 3), settings.samples or 10_000
    samples = sample_rows(settings, flow, table.scale, key, count, run_dir.path)
    test = jnp.asarray(table.test, float)
    # The chunk of the validation, so that one compiled program serves both.
    certificate = evaluate.certify(flow, test, solve=solve, chunk=len(validation))
    scores = certificate.scores
    metrics = {
        "test_nll": scores.nll,
        "test_nll_stderr": scores.stderr,
        "test_nll_original": scores.nll + table.scale.log_scale,
        "gaussian_nll": gaussian_nll,
        "val_nll": fitted.val_nll,
    }
    numerics = certificate.numerics() | {"skipped_updates": fitted.skipped}
    draw_figures(run_dir, settings, flow, table, samples.x[-1], scores.nll)
    run_dir.save_figures(training=plot.training_curves(fitted.records))
    run_dir.finish(metrics, numerics, fitted.timing, [*table.warnings, *certificate.warnings()])


def draw_figures(
    run_dir: RunDir,
    settings: Density,
    flow: CNF,
    table: Table,
    samples: np.ndarray,
    test_nll: float,
) -> None:
    """One column: a histogram; two: the figures of the plane; more: pair plots of samples."""
    scale, solve = table.scale, settings.make_test_solve()
    data, drawn = scale.unstandardize(table.test), scale.unstandardize(samples)
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
    elif len(scale.columns) == 2:
        # Standardized: equal axes suit columns of unequal units.
        (x0, y0), (x1, y1) = np.quantile(table.test, [0.001, 0.999], axis=0)
        grid = evaluate.grid(flow, (x0 - 0.5, x1 + 0.5, y0 - 0.5, y1 + 0.5), solve=solve)
        plane(
            run_dir,
            flow,
            table.test,
            samples,
            grid,
            key=jr.fold_in(jr.key(settings.seed), 4),
            solve=solve,
            title=f"{' and '.join(scale.columns)}, standardized: held-out NLL {test_nll:.3f} nats",
        )
    else:
        run_dir.save_figures(pairs=plot.pairs(data, drawn, scale.columns))


if __name__ == "__main__":
    main(run, Density)
