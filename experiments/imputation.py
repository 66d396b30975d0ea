"""Hide entries of a table's test rows, fill them in by a flow, and hold that against the truth."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from experiments._runner.cli import main
from experiments._runner.config import MANY, RunSettings
from experiments._runner.run_dir import RunDir, kind_of, load_flow
from experiments.density import Density, train_and_measure
from jcnf import Solve, plot
from jcnf._checks import InputError
from jcnf.data.tables import Table, load_table
from jcnf.inference import impute
from jcnf.inference.gaussian import Gaussian

POOR = 0.1  # share of effective importance samples below which a row is counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imputation(RunSettings):
    """A table, the flow that fills it in, and how."""

    # the table; with --from by default that of its run
    data: Path | None = None
    # finished run of density or tabular, without --context; by default density is trained first
    from_run: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    # steps of that training
    train_steps: int = 20_000
    # share of the entries to hide, each by itself
    hide: float = 0.2
    # test rows
    rows: int = 1000
    # draws of each row that are kept, at even distances of its chain
    draws: int = 50
    # steps of the chain after the burn-in, and of the burn-in
    chain_steps: int = 100
    burn_in: int = 50
    # importance samples of each row, for the predictive density
    importance: int = 64
    # both tolerances of the solves
    tolerance: float = 1e-3

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        if self.data is None and self.from_run is None:
            raise InputError("give --data PATH, or --from RUN_DIR, or both")
        if self.from_run is not None and self.train_steps != type(self).train_steps:
            raise InputError("--train-steps would change nothing with --from: drop it")
        self.at_least(1, "train_steps", "draws", "chain_steps")
        self.at_least(2, "rows", "importance", most=MANY)
        self.at_least(0, "burn_in")
        self.reachable("tolerance")
        if not 0 < self.hide < 1:
            raise InputError(f"--hide must be between 0 and 1; got {self.hide}")
        if self.draws > self.chain_steps:
            raise InputError("--draws are of the chain's steps: raise --chain-steps, or keep fewer")


def run(settings: Imputation) -> None:
    """Train or load, hide, fill in, measure."""
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
        raise InputError("no entry was hidden: raise --hide or --rows")

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
        "ess_poor_rows": float(np.mean(found.ess[part] < POOR)) if part.any() else 0.0,
        # What the logarithm of an estimate adds on average to the flow's log-densities.
        "log_prob_bias": float(np.sum(found.stderr**2) / 2 / hidden.sum()),
    }
    warnings = []
    if numerics["failed_rows"]:
        warnings.append(f"{numerics['failed_rows']} rows whose solve failed are left out")
    if numerics["ess_poor_rows"] > POOR:
        warnings.append("many rows have few effective importance samples: raise --importance")
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
    """RMSE of the estimates, mean log-density a hidden entry in nats, and gaps to the Gaussian's.

    All with standard errors over rows, which are what is independent; those of the gaps are paired.
    Positive gaps are in favour of the first named.
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
    """Sum of the rows' values over that of their counts, and its standard error."""
    ratio = values.sum() / count.sum()
    rest = values - ratio * count
    return float(ratio), float(np.sqrt(np.sum(rest**2)) / count.sum())


def _trained(path: Path, data: Path | None) -> tuple:
    """The flow of a run, and the table it was trained on, in its parts."""
    kind = kind_of(path)
    if not issubclass(kind, Density):
        raise InputError(f"{path} is no run of density or tabular: give one of these")
    flow, trained, notes = load_flow(path, kind)
    if trained.context:
        raise InputError(f"{path} is a density given columns: train one without --context")
    if data is not None:
        trained = dataclasses.replace(trained, data=data)
    table: Table = trained.load()
    if table.scale.to_json() != notes["table"]:
        raise InputError(
            f"{trained.data} is not the table that {path} was trained on: give that one by --data"
        )
    return flow, table


if __name__ == "__main__":
    main(run, Imputation)
