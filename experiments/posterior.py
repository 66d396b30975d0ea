"""Learn the posterior of a simulator's parameters, and check it.

    python -m experiments.posterior --task two_moons --simulations 10000
    python -m experiments.posterior --task slcp --budgets 1000 10000 100000 --folder FOLDER
    python -m experiments.posterior --simulator module:function --prior module:name

The posterior is learned from simulations alone by `jcnf.sbi.fit_posterior`, and holds for any data.
The tasks are the ten of the benchmark sbibm (Lueckmann et al. 2021). If --folder has their
reference posteriors, the C2ST of an observation is how often a classifier tells samples from
reference samples, 1/2 at best. Published values are means over ten observations, those here over
the observations in the file.

Your own simulator takes a key and parameters (n, dim), and returns data (n, ...). The posterior of
each number of simulations is saved, and `jcnf.sbi.Posterior.load` reads it.

Held-out simulations check the posterior without references. SBC ranks each true parameter among
posterior draws, expected coverage ranks its density, and TARP its distance to random points; the
ranks are uniform if the posterior is exact. The bands are such that an exact posterior is inside
all of them in 95 % of runs. All three overlook a posterior that has learned nothing
and is the prior, which gains 0 nats over the prior.

Each number of simulations is saved as soon as it is done, and --resume repeats none of them.
"""

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run
from experiments._runner.metrics_log import read_json
from experiments._runner.progress import progress
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import MAX_COUNT, Count, Range, Steps, Whole
from experiments._tasks.posterior_checks import (
    Verdict,
    check_posterior,
    finite_rows,
    score_samples,
)
from experiments._tasks.simulators import TASKS
from jcnf import evaluate, plot, sbi
from jcnf._checks import InputError, import_named, in_a_line
from jcnf.training.checkpoint import write_atomically

MIN_CHECKS = 20
TRIED = 2  # parameters for which a simulator is tried first
SIMULATIONS = Range(100, MAX_COUNT)

TaskName = Literal[
    "two_moons",
    "gaussian_mixture",
    "gaussian_linear",
    "gaussian_linear_uniform",
    "bernoulli_glm",
    "bernoulli_glm_raw",
    "slcp",
    "slcp_distractors",
    "sir",
    "lotka_volterra",
]
DEFAULT_TASK: TaskName = "two_moons"

# Mean C2ST of neural posterior estimation by a spline flow, by Lueckmann et al. 2021.
PUBLISHED_BUDGETS = (1_000, 10_000, 100_000)
PUBLISHED = {
    "two_moons": (0.725, 0.606, 0.542),
    "gaussian_mixture": (0.716, 0.615, 0.548),
    "gaussian_linear": (0.694, 0.552, 0.506),
    "gaussian_linear_uniform": (0.696, 0.553, 0.509),
    "bernoulli_glm": (0.863, 0.678, 0.559),
    "bernoulli_glm_raw": (0.900, 0.765, 0.607),
    "slcp": (0.975, 0.901, 0.831),
    "slcp_distractors": (0.982, 0.970, 0.863),
    "sir": (0.815, 0.680, 0.585),
    "lotka_volterra": (0.999, 0.997, 0.981),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PosteriorExperiment(Experiment):
    """The simulator, its prior, the numbers of simulations, and the checks."""

    # task of the benchmark sbibm (two_moons, unless --simulator is given)
    task: TaskName | None = None
    # your own simulator instead, as module:function; it maps (key, theta (n, dim)) to x (n, ...)
    simulator: str | None = None
    # its prior, as module:name: what jcnf.sbi.as_prior takes, or a function that returns it
    prior: str | None = None

    # number of simulations to learn from
    simulations: Annotated[int, SIMULATIONS] = 10_000
    # several numbers of simulations in its place, one after the other
    budgets: Annotated[tuple[int, ...], SIMULATIONS] = ()
    # largest number of training steps (by default that of jcnf.sbi.fit_posterior)
    steps: Steps | None = None

    # folder with the task's observations and reference samples, for C2ST: two_moons.npz, ...
    folder: Path | None = None
    # number of observations to score by C2ST (by default all in the file)
    observations: Count | None = None
    # number of samples of each posterior, for C2ST and the figure
    samples: Annotated[int, Range(2, 10_000)] = 10_000
    # number of held-out simulations for the checks (0 for no checks)
    checks: Whole = 500
    # number of posterior draws for each of them; their log-densities take most of the checks' time
    draws: Annotated[int, Range(9, 100_000)] = 99

    # number of parameters in one call of the simulator
    batch: Count = 1000
    # resume the run in --out, without repeating what is saved there
    resume: bool = False
    run: Run = Run()

    @property
    def resumes(self) -> bool:
        return self.resume

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of simulations."""
        return self.budgets or (self.simulations,)

    def check(self) -> None:
        super().check()
        if self.task not in (None, *TASKS):
            raise ValueError(f"--task must be one of {', '.join(TASKS)}; got {self.task!r}")
        if (self.simulator is None) != (self.prior is None):
            given, missing = ("--simulator", "--prior")[:: 1 if self.prior is None else -1]
            raise ValueError(f"{given} needs {missing}: give both, or neither and a --task")
        for name in ("task", "folder"):
            if self.simulator is not None and getattr(self, name) is not None:
                raise ValueError(f"--{name} does not go with --simulator: leave one of them out")
        for name in ("simulator", "prior"):
            value = getattr(self, name)
            if value is not None and not all(value.partition(":")):
                raise ValueError(f"--{name} must be module:name; got {value!r}")
        if len({*self.budgets}) < len(self.budgets):
            raise ValueError(f"--budgets must not have a number twice; got {self.budgets}")
        if 0 < self.checks < MIN_CHECKS:
            raise ValueError(f"--checks must be 0 or at least {MIN_CHECKS}; got {self.checks}")
        if self.observations is not None and self.folder is None:
            raise ValueError("--observations needs --folder, the folder of their reference samples")


class Known(NamedTuple):
    """Observations with samples of their true posteriors."""

    observations: Float[np.ndarray, "m data"]
    references: Float[np.ndarray, "m samples dim"]


class Problem(NamedTuple):
    """A prior, a simulator, and observations whose posteriors are known, if there are any."""

    name: str
    prior: sbi.Prior
    simulator: sbi.Simulator
    batch: int  # of parameters in one call
    known: Known | None = None

    def simulate(self, n: int, key: Key[Array, ""]) -> sbi.Simulations:
        """Draw parameters and simulate data.

        **Raises:** `InputError` if the simulator fails.
        """
        try:
            return sbi.simulate(
                self.prior, self.simulator, n, key=key, batch=self.batch, progress=n > TRIED
            )
        except sbi.SimulatorError as error:
            raise InputError(f"{self.name}: {in_a_line(error).partition(': ')[2]}") from error

    def published(self, simulations: int) -> float | None:
        """Return the mean C2ST published for this number of simulations, or None."""
        if self.name not in PUBLISHED or simulations not in PUBLISHED_BUDGETS:
            return None
        return PUBLISHED[self.name][PUBLISHED_BUDGETS.index(simulations)]


def run(settings: PosteriorExperiment) -> None:
    """Learn a posterior from each number of simulations, score it, check it and draw it."""
    problem = load_problem(settings)
    run_dir = RunDir("posterior", settings)
    (run_dir.path / "results").mkdir(exist_ok=True)
    rows, text = [], ""
    for number in settings.numbers:
        path = run_dir.path / "results" / f"{number}.json"
        if not path.exists():
            row = learn(settings, problem, number, run_dir)
            run_dir.write_json(f"results/{path.name}", row)
        rows.append(read_json(path))
        print(in_words(rows[-1]), flush=True)
        run_dir.write_json("results.json", {"problem": problem.name, "rows": rows})
        text = as_markdown(problem.name, rows)
        write_atomically(run_dir.path / "results.md", text.encode())
    metrics, numerics, timing = {}, {}, {}
    for row in rows:
        number = row["simulations"]
        metrics |= {f"{name}_{number}": value for name, value in metrics_of(row).items()}
        numerics[f"left_out_{number}"] = row["left_out"]
        timing |= {f"{name}_{number}_s": value for name, value in row["seconds"].items()}
    run_dir.finish(metrics, numerics, timing, [doubt for row in rows for doubt in doubts_of(row)])
    print(f"\n{text}", end="")


def load_problem(settings: PosteriorExperiment) -> Problem:
    """Return the task of the settings, or your own prior and simulator once they were tried.

    **Raises:** `InputError` for a file, module or name that is missing, and for a simulator that
    fails or returns data of a wrong shape.
    """
    if settings.simulator is not None and settings.prior is not None:
        problem = load_own(settings.simulator, settings.prior, settings.batch)
        problem.simulate(TRIED, jr.key(settings.run.seed))
        return problem
    name = settings.task or DEFAULT_TASK
    task = TASKS[name]
    problem = Problem(name, sbi.as_prior(task.prior), task.simulator, settings.batch)
    if settings.folder is None:
        return problem
    path = settings.folder / f"{task.file}.npz"
    if not path.is_file():
        raise InputError(f"no file {path}: give the folder that has it by --folder")
    with np.load(path) as content:
        missing = [n for n in (task.observations, "reference") if n not in content]
        if missing:
            raise InputError(f"{path} has no array {missing[0]!r}; it has {', '.join(content)}")
        observations, references = content[task.observations], content["reference"]
    dim = problem.prior.dim
    shape = problem.simulate(TRIED, jr.key(settings.run.seed)).x.shape[1:]
    fits = observations.shape[1:] == shape and references.shape[2:] == (dim,)
    if not fits or len(references) != len(observations) or not references.size:
        raise InputError(
            f"{path}: expected observations (m, {', '.join(map(str, shape))}) and reference "
            f"samples (m, n, {dim}); got shapes {observations.shape} and {references.shape}"
        )
    first = slice(settings.observations)
    return problem._replace(known=Known(observations[first], references[first]))


def load_own(simulator: str, prior: str, batch: int) -> Problem:
    """Import a simulator and a prior, each named as module:name."""
    function = import_named(*simulator.split(":", 1))
    if not callable(function) or isinstance(function, type):
        raise InputError(f"--simulator needs a function (key, theta) -> x; {simulator} is a value")
    made = import_named(*prior.split(":", 1))
    if inspect.isfunction(made):
        try:
            made = made()
        except Exception as error:
            raise InputError(f"--prior: {prior}() failed: {in_a_line(error)}") from error
    try:
        return Problem(simulator, sbi.as_prior(made), function, batch)
    except ValueError as error:
        raise InputError(f"--prior {prior}: {error}") from error


def learn(
    settings: PosteriorExperiment, problem: Problem, number: int, run_dir: RunDir
) -> dict[str, Any]:
    """Learn a posterior from this number of simulations, draw it, and return its results."""
    seconds: dict[str, float] = {}
    base = jr.key(settings.run.seed)
    simulate_key, train_key, sample_key, check_key = jr.split(jr.fold_in(base, number), 4)
    with timed(seconds, "simulate"):
        simulations = problem.simulate(number, simulate_key)
    with timed(seconds, "train"):
        posterior = sbi.fit_posterior(
            problem.prior, simulations, key=train_key, steps=settings.steps
        )
    posterior.save(run_dir.path / "results" / f"posterior-{number}.jcnf")
    finite = np.isfinite(simulations.x.reshape(number, -1)).all(axis=1)
    row = {"simulations": number, "left_out": int(number - finite.sum())}

    # All posteriors are checked on the same simulations, so that they can be compared.
    count = max(settings.checks, MIN_CHECKS)
    held_out, figures = finite_rows(problem.simulate(count, jr.fold_in(base, 0))), {}
    if settings.checks:
        with timed(seconds, "check"):
            checks = check_posterior(posterior, held_out, check_key, settings.draws)
        row |= {"checks": checks.row()}
        figures |= checks.figures

    known = problem.known
    given = held_out.x[:1] if known is None else known.observations
    with timed(seconds, "sample"), progress(f"drawing samples of {len(given)} posteriors"):
        samples = posterior.sample(sample_key, settings.samples, given)
    if known is not None:
        with timed(seconds, "c2st"):
            scores = score_samples(samples, known.references)
        row |= scores._asdict() | {"published_npe": problem.published(number)}
        beside = {"reference": known.references[0]}
    else:
        beside = {"truth": held_out.theta[0]}
    title = f"{problem.name}: posterior of one observation, from {number:,} simulations"
    figures["posterior"] = plot.corner(samples[0], problem.prior.names, title=title, **beside)
    suffix = f"-{number}" if len(settings.numbers) > 1 else ""
    run_dir.save_figures(**{f"{name}{suffix}": figure for name, figure in figures.items()})
    return row | {"seconds": seconds}


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the context takes by this name."""
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


def mean_of(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for one value."""
    error = evaluate.standard_error(np.array(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def metrics_of(row: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a row for the summary."""
    found = {}
    if "c2st" in row:
        found["c2st"], found["c2st_stderr"] = mean_of(row["c2st"])
        found["published_npe"] = row["published_npe"]
    if checks := row.get("checks"):
        found |= {n: checks[n] for n in ("nll", "nll_stderr", "gain", "gain_stderr")}
        for each in verdicts_of(row):
            found[f"{each.name.replace(' ', '_')}_p_value"] = each.p_value
    return {name: value for name, value in found.items() if value is not None}


def verdicts_of(row: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts of the checks of a row."""
    return [Verdict(**each) for each in row.get("checks", {}).get("verdicts", [])]


def doubts_of(row: dict[str, Any]) -> list[str]:
    """Return reasons not to trust the posterior of a row."""
    where = f"{row['simulations']} simulations"
    found = [f"{where}: {v.in_words()}" for v in verdicts_of(row) if not v.inside]
    if failed := row.get("failed"):
        found.append(f"{where}: {failed} samples could not be solved, and C2ST leaves them out")
    if failed := row.get("checks", {}).get("failed"):
        found.append(f"{where}: {failed} held-out simulations could not be solved")
    return found


def in_words(row: dict[str, Any]) -> str:
    """Return the results of a row in lines."""
    head = [f"{row['simulations']} simulations"]
    if row["left_out"]:
        head.append(f"{row['left_out']} left out, whose data are not finite")
    if "c2st" in row:
        head.append(f"C2ST {c2st_in_words(row)} over {len(row['c2st'])} observations")
        if row["published_npe"]:
            head.append(f"published NPE {row['published_npe']:.3f}")
    checks = row.get("checks")
    if checks:
        head.append("{gain:.3f} ± {gain_stderr:.3f} nats over the prior".format(**checks))
    spent = ", ".join(f"{name} {value:.3g} s" for name, value in row["seconds"].items())
    lines = [", ".join(head), f"  {spent}"]
    if checks:
        lines.append(f"  checks on {checks['simulations']} held-out simulations:")
    return "\n".join([*lines, *(f"    {each.in_words()}" for each in verdicts_of(row))])


def c2st_in_words(row: dict[str, Any]) -> str:
    """Return the mean C2ST of a row with its error, or a dash."""
    if "c2st" not in row:
        return "-"
    mean, error = mean_of(row["c2st"])
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def as_markdown(name: str, rows: list[dict[str, Any]]) -> str:
    """Return a table of the results in Markdown."""
    parts = ("simulate", "train", "sample")
    titles = ["simulations", "C2ST", "published NPE", "nats over the prior", "smallest p of SBC"]
    titles += ["p of coverage", "p of TARP", *(f"{part} (s)" for part in parts)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        published, checks = row.get("published_npe"), row.get("checks")
        cells = [f"{row['simulations']}", c2st_in_words(row)]
        cells.append(f"{published:.3f}" if published else "-")
        if checks:
            cells.append("{gain:.3f} ± {gain_stderr:.3f}".format(**checks))
            *sbc, coverage, tarp = verdicts_of(row)
            p_values = min(v.p_value for v in sbc), coverage.p_value, tarp.p_value
            cells += [f"{p:.2g}" for p in p_values]
        else:
            cells += ["-"] * 4
        cells += [f"{row['seconds'][part]:.3g}" for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    note = f"{name}."
    if any("c2st" in row for row in rows):
        note += " C2ST: mean over observations, ± its standard error over them."
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main(run, PosteriorExperiment)
