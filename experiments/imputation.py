"""Hide entries of a table's test rows, fill them in by a flow, and compare with the truth."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from experiments._runner.cli import main
from experiments._runner.config import MAX_COUNT, RunSettings
from experiments._runner.run_dir import RunDir, kind_of, load_flow
from experiments.density import Density, train_and_measure
from jcnf import Solve, plot
from jcnf._checks import InputError
from jcnf.data.tables import Table, load_table
from jcnf.inference import impute
from jcnf.inference.gaussian import Gaussian

# A row has few effective importance samples below this share of them.
LOW_ESS = 0.1
MAX_LOW_ESS_ROWS = 0.1  # share of such rows above which the run warns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imputation(RunSettings):
    """A table, the flow that fills it in, and the settings of the sampler."""

    # table of numbers (default with --from: the table of that run)
    data: Path | None = None
    # finished run of density or tabular, without --context (default: train a density first)
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # steps of that training, without --from
    train_steps: int = 20_000
    # share of the entries to hide, each independently
    hide: float = 0.2
    # test rows to fill in, at most
    rows: int = 1000
    # draws to keep for each row, evenly spaced along its chain
    draws: int = 50
    # steps of each chain after the burn-in
    chain_steps: int = 100
    # steps of the burn-in
    burn_in: int = 50
    # importance samples for the predictive density of each row
    importance: int = 64
    # relative and absolute tolerance of the solves
    tolerance: float = 1e-3

    def check(self) -> None:
        super().check()
        if self.data is None and self.from_run is None:
            raise InputError("give --data PATH, --from RUN_DIR, or both")
        if self.from_run is not None and self.train_steps != type(self).train_steps:
            raise InputError("--train-steps has no effect with --from: leave it out")
        self.at_least(1, "train_steps", "draws", "chain_steps")
        self.at_least(2, "rows", "importance", most=MAX_COUNT)
        self.at_least(0, "burn_in")
        self.reachable("tolerance")
        if not 0 < self.hide < 1:
            raise InputError(f"--hide must be between 0 and 1; got {self.hide}")
        if self.draws > self.chain_steps:
            raise InputError(
                f"--draws {self.draws} is more than --chain-steps {self.chain_steps}: raise "
                "--chain-steps, or keep fewer draws"
            )


def run(settings: Imputation) -> None:
    """Train or load a flow, hide entries, fill them in, and measure the errors."""
    if settings.from_run is not None:
        flow, table = _trained(settings.from_run, settings.data)
        run_dir = RunDir("imputation", settings)
    else:
        assert settings.data is not None  # by `check`
        training = dataclasses.replace(
            Density(), data=settings.data, steps=settings.train_steps, seed=settings.seed
        )
        training.check()
        table = load_table(settings.data, seed=settings.seed)
        run_dir = RunDir("imputation", settings)
        training = dataclasses.replace(training, out=run_dir.path / "density")
        train_and_measure("density", training, table)
        flow, table = _trained(run_dir.path / "density", None)
    truth = np.asarray(jnp.asarray(table.test[: settings.rows], float))
    hidden = np.random.default_rng([settings.seed, 2]).random(truth.shape) < settings.hide
    x = np.where(hidden, np.nan, truth).astype(truth.dtype)
    if not hidden.any():
        raise InputError(
            f"--hide {settings.hide} of {len(truth)} rows hid no entry: raise --hide or --rows"
        )

    gaussian = Gaussian.fit(table.train)
    draw_key, weigh_key = jr.split(jr.fold_in(jr.key(settings.seed), 6))
    solve = Solve(rtol=settings.tolerance, atol=settings.tolerance, norm="worst")
    tic = time.perf_counter()
    filled = impute.impute(
        flow,
        x,
        gaussian,
        draw_key,
        draws=settings.draws,
        steps=settings.chain_steps,
        burn_in=settings.burn_in,
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
        samples=settings.importance,
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


def _trained(path: Path, data: Path | None) -> tuple:
    """Load the flow of a run and the table that it was trained on, split into parts."""
    kind = kind_of(path)
    if not issubclass(kind, Density):
        raise InputError(f"{path} is not a run of density or tabular: give --from one of these")
    flow, trained, notes = load_flow(path, kind)
    if trained.context:
        raise InputError(
            f"{path} was trained with --context {' '.join(trained.context)}: give --from a run "
            "without it"
        )
    if data is not None:
        trained = dataclasses.replace(trained, data=data)
    table: Table = trained.load()
    if table.scale.to_json() != notes["table"]:
        raise InputError(
            f"{trained.data} is not the table that {path} was trained on: name that table by --data"
        )
    return flow, table


if __name__ == "__main__":
    main(run, Imputation)
