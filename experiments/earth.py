"""Learn densities of places on the earth: fires, floods, earthquakes, volcanoes, or your own.

    python -m experiments.earth --set flood --folder FOLDER
    python -m experiments.earth --set fire --folder FOLDER --protocol distinct --seeds 5
    python -m experiments.earth --data places.csv

Four densities get the same training and validation rows, a random 80 % and 10 %: a flow on the
sphere, whose base is a mixture of von Mises-Fisher distributions; such a mixture alone; a kernel
estimate; and "combined", a mixture of the flow and of kernels of several widths, with the weights
that are best on the validation rows. NLLs are in nats with respect to the area of the unit sphere,
where the uniform density has log 4 pi = 2.53. The table has columns named latitude and longitude
(or lat, lon), in degrees.

Two things make narrow kernels win. Where rows repeat a place exactly, a random split puts copies of
training rows into the test rows, and the NLL rewards memorizing them. The results say how many
there are, and `--protocol distinct` splits places instead of rows. Where places nearly repeat, as
those of fires do within a kilometer, no protocol prevents it: the NLL then depends on how narrow
the kernels may be, and the narrowest here have a standard deviation of 4 km.

Each result is saved as soon as it is there, and --resume repeats none of them.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np

import jcnf
from experiments._runner.cli import main
from experiments._runner.config import Experiment, Measure, Run
from experiments._runner.fields import ResNet
from experiments._runner.metrics_log import read_json
from experiments._runner.progress import progress
from experiments._runner.recorder import digest_of
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Count, NonNegative, Positive, Settings, Steps, Whole
from experiments._tasks.places import Places, Split, read_places, to_degrees
from experiments._tasks.sphere_combined import Combined, candidates, combine
from experiments._tasks.sphere_flow import LocalField, local_flow, local_matching
from experiments._tasks.sphere_models import SPHERE, Mixture, fit_kernels, fit_mixture
from jcnf import Flow, Solve, evaluate, plot, training
from jcnf._checks import InputError
from jcnf.data.tables import write_rows
from jcnf.evaluate.chunks import evenly_spaced
from jcnf.training import checkpoint
from jcnf.training.checkpoint import write_atomically

FILES = {
    "fire": "fire.csv",
    "flood": "flood.csv",
    "earthquake": "quakes_all.csv",
    "volcano": "volerup.csv",
}
VALIDATIONS, PATIENCE = 10, 3  # validations per training, and how many without improvement end it
WARN_LEAKED = 0.5  # share of test rows that are copies of training rows, above which a run warns
SAMPLING = Solve(rtol=1e-3, atol=1e-3)

Model = Literal["flow", "mixture", "kernels", "combined"]
MODELS: tuple[Model, ...] = ("flow", "mixture", "kernels", "combined")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowTraining(Settings):
    """The training of the flow by flow matching, with AdamW."""

    # number of optimizer steps
    steps: Steps = 1500
    # number of samples per training batch
    batch: Count = 512
    # peak learning rate, after a warm-up and before a cosine decay to zero
    learning_rate: Positive = 1e-3
    # decoupled weight decay
    weight_decay: NonNegative = 0.1
    # number of validation rows, which decide which parameters are kept
    validation_rows: Count = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarthMeasure(Measure):
    """Held-out numbers, samples and figures."""

    # number of samples of the first seed's last model, for samples.csv and the figures
    samples: Count = 5000
    # number of rows of the density grid in the figures; it has twice as many columns
    cells: Count = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Earth(Experiment):
    """The places, the protocol, the models and the flow."""

    # data set to learn, a file in --folder
    set: Literal["fire", "flood", "earthquake", "volcano"] = "fire"
    # folder of the four sets: fire.csv, flood.csv, quakes_all.csv, volerup.csv
    folder: Path = Path("earth")
    # your own table to learn instead: .csv or .csv.gz with columns named latitude and longitude
    data: Path | None = None
    # what is split at random: rows, as in published results, or distinct places
    protocol: Literal["random", "distinct"] = "random"
    # models to compare; without the flow, it is no part of combined either
    models: tuple[Model, ...] = MODELS
    # number of seeds, starting at --seed; each has its own split
    seeds: Count = 1
    # resume the run in --out, without repeating what is saved there
    resume: bool = False

    # number of von Mises-Fisher components of the base, besides a uniform one (0: chosen by
    # validation)
    components: Whole = 0
    # number of features that tell the field which components are near
    features: Count = 32
    field: ResNet = ResNet(width=128, time_frequencies=4, fourier_features=32)
    training: FlowTraining = FlowTraining()
    measure: EarthMeasure = EarthMeasure()
    run: Run = Run()

    @property
    def resumes(self) -> bool:
        return self.resume

    def check(self) -> None:
        super().check()
        if not self.models or len({*self.models}) < len(self.models):
            raise ValueError(f"--models needs at least one value, none twice; got {self.models}")

    @property
    def path(self) -> Path:
        """The table of places."""
        if self.data is not None:
            return self.data
        return self.folder / FILES[self.set]

    def untrained(self, base: Mixture, seed: int) -> Flow:
        """Return the flow before training, which is its base."""
        net_key, key = jr.split(jr.fold_in(jr.key(seed), 0))
        net = self.field.make(base.dim, self.features, net_key)
        return local_flow(LocalField(net, base, self.features, key=key))


class Result(NamedTuple):
    """What one model reached with one seed."""

    log_prob: list[float | None]  # of each test row, in nats; None where the solve failed
    seconds: float  # that fitting took
    chosen: dict[str, Any]

    @property
    def solved(self) -> np.ndarray:
        """The log-densities of the rows that were solved."""
        scores = np.array(self.log_prob, float)
        return scores[~np.isnan(scores)]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the rows that were solved."""
        return -float(np.mean(self.solved))


def run(settings: Earth) -> None:
    """Fit each model with each seed; compare, and draw the last model of the first seed."""
    places = read_places(settings.path)
    seeds = range(settings.run.seed, settings.run.seed + settings.seeds)
    splits = {seed: places.split(settings.protocol, seed) for seed in seeds}
    leaked = float(np.mean([places.leaked(split) for split in splits.values()]))
    doubts = []
    if leaked > WARN_LEAKED:
        doubts.append(
            f"{leaked:.0%} of the test rows repeat the very place of a training row: these NLLs "
            "reward memorizing, so do not quote them without this number, and see --protocol "
            "distinct"
        )
    run_dir = RunDir("earth", settings)
    (run_dir.path / "results").mkdir(exist_ok=True)
    models = sorted(settings.models, key=MODELS.index)
    results = {model: {} for model in models}
    # One seed after the other, so that a run that is stopped has all models.
    for seed, split in splits.items():
        for model in models:
            found = fit_or_load(run_dir, settings, places, split, model, seed)
            results[model][seed] = found
            if failures := len(found.log_prob) - len(found.solved):
                doubts.append(
                    f"seed {seed}, {model}: the NLL leaves out {failures} of {len(split.test)} "
                    "test rows, which could not be solved: loosen --test-tolerance"
                )
            print(
                f"seed {seed}, {model}: test NLL {found.nll:.3f}, {found.seconds:.0f} s, "
                f"{found.chosen}",
                flush=True,
            )
    first, drawn = seeds[0], models[-1]
    title = f"{settings.path.stem}, {drawn}: held-out NLL {results[drawn][first].nll:.3f} nats"
    density = load_density(run_dir, settings, drawn, first)
    numerics = draw(run_dir, settings, density, places.points[splits[first].test], title)
    if "flow" in models:
        chosen = results["flow"][first].chosen
        numerics |= {name: chosen[name] for name in ("nfe_score", "nfe_sample")}
    report = {model: summarize(list(by_seed.values())) for model, by_seed in results.items()}
    sizes = dict(zip(Split._fields, map(len, splits[seeds[0]]), strict=True))
    shares = {"leaked_test_rows": leaked}
    run_dir.write_json("results.json", report | {"rows": sizes} | shares)
    text = as_markdown(settings, report, leaked, sizes)
    write_atomically(run_dir.path / "results.md", text.encode())
    names = ("test_nll", "test_nll_std", "test_nll_stderr")
    metrics = {f"{m}_{name}": f[name] for m, f in report.items() for name in names if name in f}
    timing = {f"{model}_s": figures["seconds"] for model, figures in report.items()}
    run_dir.finish(metrics | shares, numerics, timing, doubts)
    print(f"\n{text}", end="")


def fit_or_load(
    run_dir: RunDir, settings: Earth, places: Places, split: Split, model: Model, seed: int
) -> Result:
    """Fit a model to the training rows and score the test rows, unless that is saved."""
    train, val, test = (places.points[part] for part in split)
    path = run_dir.path / "results" / f"{model}-{seed}.json"
    digest = digest_of((train, val, test))
    if path.exists():
        saved = read_json(path)
        if saved.pop("digest") != digest:
            raise InputError(f"{settings.path} has changed since {path}: choose another --out")
        return Result(**saved)
    begun = time.perf_counter()
    density, chosen = fit_model(run_dir, settings, train, val, model, seed)
    seconds = time.perf_counter() - begun
    save_density(run_dir, density, model, seed)
    with progress(f"measuring on {len(test)} test rows"):
        log_prob = density.score(test, settings.measure.make_solve())
    scores = [None if np.isnan(score) else float(score) for score in log_prob]
    result = Result(scores, seconds, chosen)
    run_dir.write_json(f"results/{path.name}", result._asdict() | {"digest": digest})
    return result


def fit_model(
    run_dir: RunDir, settings: Earth, train: np.ndarray, val: np.ndarray, model: Model, seed: int
) -> tuple[Combined, dict[str, Any]]:
    """Return the model fitted to the training rows, and what was chosen on the validation rows."""
    if model == "mixture":
        mixture = fit_mixture(train, val, seed)
        return Combined(mixture), {"components": len(mixture.means) - 1}
    if model == "kernels":
        mixture = fit_kernels(train, val)
        return Combined(mixture), {"concentration": float(mixture.concentrations[0])}
    if model == "flow":
        flow, chosen = fit_flow(settings, train, val, seed)
        return Combined(None, flow, 1.0), chosen
    flow = None
    if "flow" in settings.models:
        flow = load_density(run_dir, settings, "flow", seed).flow
    solve = settings.measure.make_validation_solve()
    combined, weights = combine(candidates(train), flow, val, solve)
    return combined, {"weights": weights}


def save_density(run_dir: RunDir, density: Combined, model: Model, seed: int) -> None:
    """Save a density to a file that `load_density` reads."""
    sizes = [
        0 if mixture is None else len(mixture.means)
        for mixture in (density.mixture, getattr(density.flow, "base", None))
    ]
    notes = {"components": sizes, "share": density.share}
    checkpoint.save(run_dir.path / "results" / f"{model}-{seed}.jcnf", density[:2], notes)


def load_density(run_dir: RunDir, settings: Earth, model: Model, seed: int) -> Combined:
    """Return the density that `save_density` wrote."""
    path = run_dir.path / "results" / f"{model}-{seed}.jcnf"
    notes = checkpoint.read_notes(path)
    blank, base = (
        Mixture(np.ones((size, 3)), np.ones(size), np.ones(size)) if size else None
        for size in notes["components"]
    )
    flow = None if base is None else settings.untrained(base, seed)
    (mixture, flow), _ = checkpoint.load(path, (blank, flow))
    return Combined(mixture, flow, notes["share"])


def fit_flow(
    settings: Earth, train: np.ndarray, val: np.ndarray, seed: int
) -> tuple[Flow, dict[str, Any]]:
    """Fit the base, then train the flow; keep the parameters that are best on validation rows."""
    wanted = settings.training
    every = -(-wanted.steps // VALIDATIONS)
    held_out = as_rows(val[evenly_spaced(len(val), wanted.validation_rows)])
    solve = settings.measure.make_validation_solve()
    base = fit_mixture(train, val, seed, settings.components)
    fitted = jcnf.fit(
        settings.untrained(base, seed),
        as_rows(train),
        key=jr.fold_in(jr.key(seed), 1),
        objective=local_matching,
        steps=wanted.steps,
        batch=wanted.batch,
        optimizer=training.make_optimizer(
            wanted.learning_rate,
            wanted.steps,
            warmup=min(200, wanted.steps // 10),
            weight_decay=wanted.weight_decay,
            clip=10.0,
        ),
        validation=lambda flow: evaluate.log_prob(flow, held_out, solve=solve).nll,
        every=every,
        patience=PATIENCE,
    )
    best = min(fitted.history, key=lambda record: record["score"])
    with progress("counting evaluations of the field"):
        key, test = jr.fold_in(jr.key(seed), 2), settings.measure.make_solve()
        scored = evaluate.log_prob(fitted.flow, held_out, solve=test)
        drawn = evaluate.sample(fitted.flow, key, len(held_out), solve=SAMPLING)
    return fitted.flow, {
        "components": len(base.means) - 1,
        "base_val_nll": -float(base.score(val).mean()),
        "val_nll": best["score"],
        "step": int(best["step"]),
        "nfe_score": scored.nfe,
        "nfe_sample": drawn.nfe,
    }


def draw(
    run_dir: RunDir, settings: Earth, density: Combined, test: np.ndarray, title: str
) -> dict[str, float]:
    """Write samples of a density and draw it; return the numerics of the summary."""
    measure = settings.measure
    with progress(f"drawing {measure.samples} samples"):
        key = jr.fold_in(jr.key(settings.run.seed), 2)
        x = density.sample(key, measure.samples, SAMPLING)
    write_rows(run_dir.path / "samples.csv", to_degrees(x), ["latitude", "longitude"])
    with progress("measuring the density for the figures"):
        grid = SPHERE.quadrature(measure.cells)
        assert grid is not None
        scores = density.score(np.asarray(grid[0]), measure.make_validation_solve())
    # The mass is not reported: components may be far narrower than the cells of a figure.
    # The quadrature's longitudes begin at 0, those of the figures at -180.
    image = np.roll(scores.reshape(measure.cells, -1), measure.cells, axis=1)
    middle = to_degrees(test.mean(axis=0, keepdims=True))[0].tolist()
    run_dir.save_figures(
        globe=plot.globe(test, x, image, title=title, center=(middle[0], middle[1])),
        map=plot.world_map(test, x, image, title=title, center=(0, middle[1])),
    )
    return {"grid_failures": int(np.isnan(scores).sum())}


def as_rows(points: np.ndarray):
    """Return points in jax's precision."""
    return jnp.asarray(points, float)


def summarize(results: list[Result]) -> dict[str, Any]:
    """Return the mean and the standard deviation of the test NLL over seeds.

    With one seed there is the standard error over test rows instead.
    """
    nlls = [result.nll for result in results]
    if len(nlls) > 1:
        spread = {"test_nll_std": float(np.std(nlls, ddof=1))}
    else:
        spread = {"test_nll_stderr": evaluate.standard_error(results[0].solved)}
    return {
        "test_nll": float(np.mean(nlls)),
        **spread,
        "seconds": float(np.mean([result.seconds for result in results])),
        "seeds": [{"test_nll": result.nll, **result.chosen} for result in results],
    }


def as_markdown(settings: Earth, report: dict, leaked: float, sizes: dict[str, int]) -> str:
    """Return a table of the test NLLs in Markdown."""
    several = settings.seeds > 1
    spread = "standard deviation over seeds" if several else "standard error over test rows"
    lines = ["| model | test NLL | seconds |", "|---|---|---|"]
    for model, figures in report.items():
        error = figures["test_nll_std" if several else "test_nll_stderr"]
        cells = [model, f"{figures['test_nll']:.3f} ± {error:.3f}", f"{figures['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    rows = ", ".join(f"{number} {part}" for part, number in sizes.items())
    note = (
        f"{settings.path.stem}, {settings.protocol} split ({rows}), seeds {settings.run.seed} to "
        f"{settings.run.seed + settings.seeds - 1}: nats with respect to the area of the unit "
        f"sphere (uniform: {np.log(4 * np.pi):.3f}), ± {spread}. {leaked:.1%} of the test rows "
        "repeat the place of a training row."
    )
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    main(run, Earth)
