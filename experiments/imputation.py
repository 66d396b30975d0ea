"""Hide entries of a table's test rows, fill them in by a flow, and compare with the truth.

    python -m experiments.imputation --data table.csv --missing-rate 0.2
    python -m experiments.imputation use --from RUN_DIR

The first command trains a density of the table, in the folder density of its run directory; the
second uses a finished run of density or tabular. To fill in entries that are really missing, use
`experiments.density use --impute`.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run, check_reachable
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Points, Positive, Range, Settings, Steps, Whole
from experiments._tasks.tables import TRAINING, TableFile, TableFlow, TableRun, learn_table
from jcnf import Flow, Solve, plot
from jcnf._checks import InputError
from jcnf.data.tables import Table
from jcnf.inference import impute
from jcnf.inference.gaussian import Gaussian

# A row has few effective importance samples below this share of them.
LOW_ESS = 0.1
MAX_LOW_ESS_ROWS = 0.1  # share of such rows above which the run warns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """The entries to hide, and the chains that fill them in."""

    # share of the entries to hide, each independently
    missing_rate: Annotated[float, Range(1e-9, 1 - 1e-9)] = 0.2
    # test rows to fill in, at most
    rows: Points = 1000
    # draws to keep for each row, evenly spaced along its chain
    draws: Steps = 50
    # steps of each chain after the burn-in
    chain_steps: Steps = 100
    # steps of the burn-in
    burn_in: Whole = 50
    # importance samples for the predictive density of each row
    importance: Points = 64
    # relative and absolute tolerance of the solves
    tolerance: Positive = 1e-3

    def check(self) -> None:
        check_reachable("tolerance", self.tolerance)
        if self.draws > self.chain_steps:
            raise ValueError(
                f"--draws {self.draws} is more than --chain-steps {self.chain_steps}: raise "
                "--chain-steps, or keep fewer draws"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imputation(Experiment):
    """A table, and the steps of training its density."""

    # table of numbers
    data: Path
    # number of training steps
    train_steps: Steps = TRAINING.steps

    sampling: Sampling = Sampling()
    run: Run = Run()

    def start(self) -> tuple[RunDir, Flow, Table]:
        """Open the run directory, and return it with a trained flow and its table."""
        source, seed = TableFile(data=self.data), self.run.seed
        table = source.load(seed)
        run_dir = RunDir("imputation", self)
        out = run_dir.path / "density"
        training = dataclasses.replace(TRAINING, steps=self.train_steps)
        settings = TableFlow(table=source, training=training, run=Run(seed=seed, out=out))
        learn_table("density", settings, table)
        return run_dir, TableRun.load(out).flow, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class UseImputation(Experiment):
    """A finished run, whose flow fills in the entries."""

    # finished run of density or tabular, without --context
    from_run: Annotated[Path, tyro.conf.arg(name="from")]

    sampling: Sampling = Sampling()
    run: Run = Run()

    def start(self) -> tuple[RunDir, Flow, Table]:
        """Open the run directory, and return it with the run's flow and table."""
        trained = TableRun.load(self.from_run)
        trained.require_all_columns("imputation")
        table = trained.load_table()
        return RunDir("imputation", self), trained.flow, table


def run(settings: Imputation | UseImputation) -> None:
    """Train or load a flow, hide entries, fill them in, and measure the errors."""
    run_dir, flow, table = settings.start()
    sampling, seed = settings.sampling, settings.run.seed
    truth = np.asarray(jnp.asarray(table.test[: sampling.rows], float))
    hidden = np.random.default_rng([seed, 2]).random(truth.shape) < sampling.missing_rate
    x = np.where(hidden, np.nan, truth).astype(truth.dtype)
    if not hidden.any():
        raise InputError(
            f"--missing-rate {sampling.missing_rate} of {len(truth)} rows hid no entry: raise "
            "--missing-rate or --rows"
        )

    gaussian = Gaussian.fit(table.train)
    draw_key, weigh_key = jr.split(jr.fold_in(jr.key(seed), 6))
    solve = Solve(rtol=sampling.tolerance, atol=sampling.tolerance, norm="worst")
    tic = time.perf_counter()
    filled = impute.impute(
        flow,
        x,
        gaussian,
        draw_key,
        draws=sampling.draws,
        steps=sampling.chain_steps,
        burn_in=sampling.burn_in,
        solve=solve,
    )
    draw_s = time.perf_counter() - tic
    found = impute.predictive(
        flow,
        truth,
        x,
        filled.draws,
        gaussian,
        weigh_key,
        samples=sampling.importance,
        solve=solve,
    )
    conditional, marginal = gaussian.given(x), gaussian.independent.given(x)
    estimates = {
        "mean": marginal.mean,
        "gaussian": conditional.mean,
        "flow": filled.mean,
        "flow_weighted": found.mean,
    }
    log_probs = {
        "mean": marginal.log_prob(truth),
        "gaussian": conditional.log_prob(truth),
        "flow": found.log_prob,
    }
    some, part = hidden.any(axis=1), hidden.any(axis=1) & ~hidden.all(axis=1)
    numerics = {
        "acceptance": float(filled.acceptance[some].mean()),
        "acceptance_min": float(filled.acceptance[some].min()),
        "failed_proposals": int(filled.failed.sum()),
        "failed_rows": int(np.isnan(found.log_prob).sum()),
        "ess": float(np.median(found.ess[part])) if part.any() else 1.0,
        "ess_poor_rows": float(np.mean(found.ess[part] < LOW_ESS)) if part.any() else 0.0,
        # log p(x_known) is subtracted, and its estimate is too low on average by half its variance.
        "log_prob_bias": float(np.sum(found.stderr**2) / 2 / hidden.sum()),
    }
    warnings = []
    if numerics["failed_rows"]:
        warnings.append(f"{numerics['failed_rows']} rows were left out because their solve failed")
    if numerics["ess_poor_rows"] > MAX_LOW_ESS_ROWS:
        warnings.append(
            f"{100 * numerics['ess_poor_rows']:.0f} % of the rows have few effective importance "
            "samples: raise --importance"
        )
    metrics = measure(truth, hidden, estimates, log_probs)
    run_dir.save_figures(
        imputed=plot.scatter_against_truth(
            truth[hidden],
            {
                f"{name}: RMSE {metrics[f'rmse_{name}']:.3f}": estimates[name][hidden]
                for name in ("mean", "gaussian", "flow")
            },
        )
    )
    timing = {"draw_s": draw_s, "whole_s": time.perf_counter() - tic}
    run_dir.finish(metrics, numerics, timing, warnings)


def measure(
    truth: np.ndarray,
    hidden: np.ndarray,
    estimates: dict[str, np.ndarray],
    log_probs: dict[str, np.ndarray],
) -> dict[str, float]:
    """Return RMSE, mean log-density per hidden entry (nats), and the flow's gains on the Gaussian.

    Each has a standard error over rows, which are independent (entries of one row are not); those
    of the gains are paired. Gains are positive where the flow is better.
    """
    good = np.isfinite(np.sum(list(log_probs.values()), axis=0)) & hidden.any(axis=1)
    count = hidden[good].sum(axis=1)
    metrics: dict[str, float] = {"hidden": int(count.sum()), "rows": int(good.sum())}
    squares = {
        name: np.sum(np.where(hidden, estimate - truth, 0.0)[good] ** 2, axis=1)
        for name, estimate in estimates.items()
    }
    influences = {}
    for name, square in squares.items():
        mse, _ = _ratio(square, count)
        metrics[f"rmse_{name}"] = mse**0.5
        influences[name] = (square - mse * count) / (2 * mse**0.5)
        metrics[f"rmse_{name}_stderr"] = _ratio(influences[name], count)[1]
    for name, log_prob in log_probs.items():
        mean, error = _ratio(log_prob[good], count)
        metrics |= {f"log_prob_{name}": mean, f"log_prob_{name}_stderr": error}
    gain, error = _ratio((log_probs["flow"] - log_probs["gaussian"])[good], count)
    metrics |= {"log_prob_gain": gain, "log_prob_gain_stderr": error}
    for name in ("flow", "flow_weighted"):
        metrics[f"rmse_gain_{name}"] = metrics["rmse_gaussian"] - metrics[f"rmse_{name}"]
        difference = influences["gaussian"] - influences[name]
        metrics[f"rmse_gain_{name}_stderr"] = _ratio(difference, count)[1]
    return metrics


def _ratio(values: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """Ratio of the sums of the rows' values and counts, with its standard error over rows."""
    ratio = values.sum() / count.sum()
    rest = values - ratio * count
    return float(ratio), float(np.sqrt(np.sum(rest**2)) / count.sum())


if __name__ == "__main__":
    main(run, {"train": Imputation, "use": UseImputation})
