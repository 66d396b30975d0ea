"""Compare models of the densities of tables, each given the same rows.

    python -m experiments.tables
    python -m experiments.tables --data FOLDER --models spline maf --seconds 240
    python -m experiments.tables --data FOLDER --tables protein digits --seeds 0 1 2

The tables are the files .csv, .csv.gz and .npz in a folder, and scikit-learn's digits. The models
are our flow (`ours`), a neural spline flow (`spline`) and a masked autoregressive flow (`maf`) of
flowjax, Gaussian mixtures (`mixture`) and kernel density estimates (`kde`) of scikit-learn. Each
gets the training rows and the validation rows. Ours trains for its own number of steps. The others
then have as many seconds as it took on the same table with the same seed, compiling included, or
--seconds; compiling and a last step of theirs come on top. results.json has the seconds that each
model took. Log-densities are in nats, of columns standardized by the training rows.

Each result is saved as soon as it is there, and --resume repeats none of them.
"""

import collections
import dataclasses
import io
import itertools
import json
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run
from experiments._runner.metrics_log import json_ready
from experiments._runner.recorder import digest_of
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import MAX_INT, Positive, Range
from experiments._tasks.autoregressive_flow import require_flowjax
from experiments._tasks.table_models import MODELS
from jcnf import evaluate
from jcnf._checks import InputError
from jcnf.data.images import load_digits_table
from jcnf.data.tables import Table, load_table
from jcnf.plot import gaps_to_best
from jcnf.training.checkpoint import write_atomically

OURS, DIGITS = "ours", "digits"
ENDINGS = (".csv", ".csv.gz", ".npz")
WORST_SHARE = 0.01  # of the rows, left out of the trimmed mean
WORST_ROWS = 3  # rows that are named
METRICS = ("nll", "nll_stderr", "seeds_std", "median", "trimmed", "minus_ours", "minus_ours_stderr")

Model = Literal["ours", "spline", "maf", "mixture", "kde"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableBenchmark(Experiment):
    """The tables, the models, and what each is given."""

    # folder with tables (.csv, .csv.gz or .npz; arrays train, val and test keep their split)
    data: Path | None = None
    # models to compare, in this order except that ours comes first
    models: tuple[Model, ...] = ("ours", "spline", "maf", "mixture", "kde")
    # seconds of training of each other model, for each table and seed (by default as many as ours
    # took)
    seconds: Positive | None = None
    # seeds of the models (--seed is that of the split of tables that come without one)
    seeds: Annotated[tuple[int, ...], Range(0, MAX_INT, min_length=1)] = (0, 1, 2)
    # names of the tables, which are those of their files; by default all in --data, and digits
    tables: tuple[str, ...] = ()
    # resume the run in --out, without repeating what is saved there
    resume: bool = False

    run: Run = Run()

    @property
    def resumes(self) -> bool:
        return self.resume

    def check(self) -> None:
        super().check()
        for name in ("models", "seeds", "tables"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not (values or name == "tables"):
                raise ValueError(f"--{name} needs at least one value, none twice; got {values}")
        if self.seconds is None and OURS not in self.models:
            raise ValueError("--seconds is needed if ours is not among --models")

    def trace(self) -> None:
        if {"spline", "maf"} & {*self.models}:
            require_flowjax()


class Result(NamedTuple):
    """What one model with one seed reached on one table."""

    log_prob: np.ndarray  # of each test row, in nats
    seconds: float  # that fitting took
    size: float
    chosen: dict[str, Any]
    note: str

    def save(self, path: Path, digest: str) -> None:
        """Write the result and the digest of the table, whole or not at all."""
        rest = self._asdict() | {"digest": digest}
        log_prob = rest.pop("log_prob")
        buffer = io.BytesIO()
        np.savez(buffer, log_prob=log_prob, rest=np.array(json.dumps(json_ready(rest))))
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, digest: str) -> "Result":
        """Load what `save` wrote.

        **Raises:** `InputError` if it is of another table.
        """
        with np.load(path) as content:
            log_prob, rest = content["log_prob"], json.loads(str(content["rest"]))
        if rest.pop("digest") != digest:
            raise InputError(
                f"the table of {path} has changed since: restore it, or choose another --out"
            )
        rest["size"] = np.nan if rest["size"] is None else rest["size"]
        return cls(log_prob, **rest)

    def figures(self) -> dict[str, Any]:
        """Return the figures of one seed."""
        found = figures_of(self.log_prob)
        return found | {"seconds": self.seconds, "size": self.size} | self.chosen


Results = dict[str, dict[str, dict[int, Result]]]  # by table, model and seed


def run(settings: TableBenchmark) -> None:
    """Fit each model to each table with each seed; compare, and draw gaps to the best."""
    tables = load_tables(settings)
    run_dir = RunDir("tables", settings)
    doubts = [f"{name}: {text}" for name, table in tables.items() for text in table.warnings]
    results, notes, failures = fit_all(settings, tables, run_dir)
    report = {name: compare(by_model) for name, by_model in results.items()}

    def column(model, figure):
        return [report[name].get(model, {}).get(figure, np.nan) for name in tables]

    gaps = {model: (column(model, "gap"), column(model, "gap_stderr")) for model in settings.models}
    run_dir.save_figures(gaps=gaps_to_best([*tables], gaps))
    run_dir.write_json("results.json", report)
    text = as_markdown(settings.models, tables, report)
    write_atomically(run_dir.path / "results.md", text.encode())
    each = {f"{model}_{name}": f for name, found in report.items() for model, f in found.items()}
    run_dir.finish(
        {f"{place}_{n}": f[n] for place, f in each.items() for n in METRICS if n in f},
        {"failed": len(failures)},
        {place: figures["seconds"] for place, figures in each.items()},
        [*doubts, *notes, *failures],
    )
    print(f"\n{text}", end="")


def fit_all(
    settings: TableBenchmark, tables: dict[str, Table], run_dir: RunDir
) -> tuple[Results, list[str], list[str]]:
    """Fit each model to each table with each seed, and save each result, unless it is saved.

    **Returns:** the results, notes on how trainings differ from what was asked for, and failures.
    """
    folder = run_dir.path / "log_probs"
    folder.mkdir(exist_ok=True)
    digests = {name: digest_of((t.train, t.val, t.test)) for name, t in tables.items()}
    results: Results = {name: {model: {} for model in settings.models} for name in tables}
    notes, failures = [], []
    # One seed after the other, so that a run that is stopped has all models and tables.
    models = sorted(settings.models, key=lambda model: model != OURS)
    places = list(itertools.product(settings.seeds, tables, models))
    for number, (seed, name, model) in enumerate(places, 1):
        where = f"[{number}/{len(places)}] {name}, {model}, seed {seed}"
        path = folder / f"{name}-{model}-{seed}.npz"
        if path.exists():
            result = Result.load(path, digests[name])
        else:
            try:
                seconds = seconds_of(model, settings.seconds, results[name].get(OURS, {}).get(seed))
                result = fit_and_score(model, tables[name], seconds, seed)
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                failures.append(f"{name}, {model}, seed {seed} failed: {reason or repr(error)}")
                print(f"{where}: failed, see failures.txt: {reason or repr(error)}", flush=True)
                with open(run_dir.path / "failures.txt", "a") as file:
                    file.write(f"{where}\n{traceback.format_exc()}\n")
                continue
            result.save(path, digests[name])
        results[name][model][seed] = result
        print(f"{where}: {in_words(result.figures())}", flush=True)
        if result.note:
            notes.append(f"{name}, {model}: {result.note}")
    return results, [*dict.fromkeys(notes)], failures


def seconds_of(model: str, seconds: float | None, ours: Result | None) -> float:
    """Return the seconds that a model has: as many as were asked for, or as ours took.

    **Raises:** `InputError` if ours failed.
    """
    if seconds is not None:
        return seconds
    if model == OURS:
        return np.inf  # it trains for its own number of steps
    if ours is None:
        raise InputError("ours failed, so it is unknown how long it takes: give --seconds")
    return ours.seconds


def load_tables(settings: TableBenchmark) -> dict[str, Table]:
    """Return the tables of a benchmark by name.

    **Raises:** `InputError` for a missing folder, an unknown name, and a table that is unsuitable.
    """
    folder = settings.data
    if folder is not None and not folder.is_dir():
        raise InputError(f"--data must be a folder of tables; {folder} is not one")
    paths = sorted(folder.iterdir()) if folder is not None else []
    paths = [path for path in paths if stem_of(path) and path.is_file()]
    times = collections.Counter([DIGITS, *map(stem_of, paths)])
    # Files that would share a name keep their endings.
    known = {stem_of(p) if times[stem_of(p)] == 1 else p.name: p for p in paths} | {DIGITS: None}
    if unknown := [name for name in settings.tables if name not in known]:
        raise InputError(f"--tables: no table {unknown[0]}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in settings.tables or known}
    return {
        name: load_digits_table() if path is None else load_table(path, seed=settings.run.seed)
        for name, path in chosen.items()
    }


def stem_of(path: Path) -> str:
    """Return the name of a file of a table without its ending, or "" if it is another file."""
    found = [path.name.removesuffix(e) for e in ENDINGS if path.name.endswith(e)]
    return found[0] if found else ""


def fit_and_score(model: str, table: Table, seconds: float, seed: int) -> Result:
    """Fit a model to a table and return the log-densities of the test rows.

    **Raises:** `ValueError` if some of them are not finite, beside whatever the model raises.
    """
    begun = time.perf_counter()
    fitted = MODELS[model](table, seconds, seed)
    spent = time.perf_counter() - begun
    log_prob = np.asarray(fitted.log_prob(table.test), np.float64)
    bad = np.flatnonzero(~np.isfinite(log_prob))
    if len(bad):
        raise ValueError(
            f"the log-density is not finite in {len(bad)} of {len(log_prob)} test rows (first: row "
            f"{bad[0]})"
        )
    return Result(log_prob, spent, float(fitted.size), fitted.chosen, fitted.note)


def figures_of(log_prob: np.ndarray) -> dict[str, Any]:
    """Return the NLL of rows with its standard error, and how much its worst rows matter."""
    order = np.argsort(log_prob)
    kept = order[int(np.ceil(WORST_SHARE * len(order))) :]
    return {
        "nll": float(-np.mean(log_prob)),
        "nll_stderr": evaluate.standard_error(log_prob),
        "median": float(-np.median(log_prob)),
        "trimmed": float(-np.mean(log_prob[kept])),
        "worst_rows": order[:WORST_ROWS].tolist(),
    }


def compare(by_model: dict[str, dict[int, Result]]) -> dict[str, dict[str, Any]]:
    """Return the figures of each model on one table, by the mean of each row over the seeds."""
    rows = {
        model: np.mean([result.log_prob for result in by_seed.values()], axis=0)
        for model, by_seed in by_model.items()
        if by_seed
    }
    report: dict[str, dict[str, Any]] = {}
    if not rows:
        return report
    best = max(rows.values(), key=np.mean)
    for model, log_prob in rows.items():
        results = by_model[model].values()
        nlls = [-result.log_prob.mean() for result in results]
        report[model] = figures_of(log_prob) | {
            "size": float(np.mean([result.size for result in results])),
            "seconds": float(np.mean([result.seconds for result in results])),
            **difference("gap", best, log_prob),
            "seeds": {str(seed): result.figures() for seed, result in by_model[model].items()},
        }
        if len(nlls) > 1:
            report[model]["seeds_std"] = float(np.std(nlls, ddof=1))
        if OURS in rows and model != OURS:
            report[model] |= difference("minus_ours", rows[OURS], log_prob)
    return report


def difference(name: str, reference: np.ndarray, log_prob: np.ndarray) -> dict[str, float]:
    """Return the NLL above that of a reference on the same rows, and its standard error."""
    each = reference - log_prob
    return {name: float(each.mean()), f"{name}_stderr": evaluate.standard_error(each)}


def in_words(figures: dict[str, Any]) -> str:
    """Return the figures of one seed in a line."""
    head = (
        "nll {nll:.4g} ± {nll_stderr:.2g}, median {median:.4g}, without the worst 1 % {trimmed:.4g}"
    )
    tail = "worst rows {worst_rows}, {seconds:.0f} s, size {size:.0f}"
    return f"{head}, {tail}".format(**figures)


def as_markdown(models, tables: dict[str, Table], report) -> str:
    """Return a table of NLLs in Markdown, the best of each line in bold."""
    lines = [f"| table | columns | rows | {' | '.join(models)} |", "|---" * (3 + len(models)) + "|"]
    for name, table in tables.items():
        cells = [name, str(table.train.shape[1]), str(len(table.train))]
        for model in models:
            figures = report[name].get(model)
            if figures is None:
                cells.append("failed")
                continue
            cell = "{nll:.3f} ± {nll_stderr:.3f}".format(**figures)
            cell = f"**{cell}**" if figures["gap"] == 0 else cell
            if "minus_ours" in figures:
                cell += " ({minus_ours:+.3f} ± {minus_ours_stderr:.3f})".format(**figures)
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Test NLL in nats of the standardized columns, mean over the seeds, ± its standard error "
        "over the rows"
    )
    if OURS in models:
        note += "; in brackets the NLL above ours, ± the standard error of the paired difference"
    return "\n".join([*lines, "", f"{note}.", ""])


if __name__ == "__main__":
    main(run, TableBenchmark)
