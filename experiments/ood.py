"""Detect out-of-distribution data with a finished run, by several scores, and say where they fail.

    python -m experiments.ood --from RUN_DIR --outside other.npz

Inside is the run's own test part. Outside are the files of --outside, uniform noise, and shuffled
test data: images with shuffled pixels, or table rows with each column permuted independently. The
scores are those of jcnf.evaluate.ood: likelihood, typicality, complexity (images only) and ratio
(with --background). An AUROC of 1 separates the sets perfectly, and 1/2 not at all. A point without
a density, because its solve failed, counts as the most unusual one, and the summary counts it.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run, check_reachable
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Points, Positive, Whole
from experiments._tasks.ood_data import (
    INSIDE,
    ImageModel,
    Sets,
    TableModel,
    load_model,
    load_sets,
)
from jcnf import evaluate, plot
from jcnf._checks import InputError
from jcnf.evaluate import Auroc, ood
from jcnf.evaluate.log_prob import bits_per_dim

# Below this AUROC a score does not detect a set: it ranks over a fifth of the pairs wrongly.
MIN_AUROC = 0.8
UNITS = {
    "likelihood": "-log p(x), nats",
    "typicality": "|log p(x) - mean of training points|, nats",
    "complexity": "-log2 P(x) - L(x), bits",
    "ratio": "log p_background(x) - log p(x), nats",
}
Values = dict[str, np.ndarray]  # name of a set: values (n,) of its points


@dataclasses.dataclass(frozen=True, kw_only=True)
class OODRun(Run):
    """The run: its directory, seed and precision."""

    # output directory (by default RUN_DIR/ood)
    out: Path | None = None
    # seed of the noise and shuffling
    seed: Whole = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OOD(Experiment):
    """A finished run, and the data to compare with its own."""

    # finished run of images, density or tabular, or of nice on images
    from_run: Annotated[Path, tyro.conf.arg(name="from")]
    # files of outside data: tables with the run's columns, or images of its size with values from 0
    # (black) to 255, in the formats of --files of experiments.images (the test part is read)
    outside: tuple[Path, ...] = ()
    # run on the same kind of images or columns but perturbed data; adds the score ratio
    background: Path | None = None
    # points in each set, at most
    count: Points = 1000
    # relative and absolute tolerance of the solves; ranks need fewer digits than held-out numbers
    test_tolerance: Positive = 1e-3

    run: OODRun = OODRun()

    def check(self) -> None:
        check_reachable("test_tolerance", self.test_tolerance)


def run(settings: OOD) -> None:
    """Score all sets, compare each with the run's own test part, and draw the scores."""
    source = settings.from_run
    model, trained = load_model(source)
    background = None
    if settings.background is not None:
        background, _ = load_model(settings.background)
        if background.form != model.form:
            raise InputError(
                f"--background {settings.background} does not match {source}: give a run on images "
                "of the same size, or on the same columns"
            )
    seed = settings.run.seed
    sets = load_sets(source, trained, settings.outside, settings.count, seed)
    place = dataclasses.replace(settings.run, out=settings.run.out or source / "ood")
    run_dir = RunDir("ood", dataclasses.replace(settings, run=place))
    start, key = time.monotonic(), jr.fold_in(jr.key(seed), 2)
    log_prob = log_probs(settings, model, sets, key)
    other = None if background is None else log_probs(settings, background, sets, key)
    failures = {f"failures_{name}": int(np.isnan(x).sum()) for name, x in log_prob.items()}
    if other is not None:
        failures |= {f"background_failures_{n}": int(np.isnan(x).sum()) for n, x in other.items()}
    reference = log_prob.pop("training")
    if np.isnan(reference).all():
        raise InputError(
            f"the solve of {source} failed at every training point: try another --test-tolerance, "
            "or train the run again"
        )
    scores = scores_of(sets, log_prob, reference[~np.isnan(reference)], other)
    aurocs = aurocs_of(scores)
    timing = {"score_s": time.monotonic() - start}
    means = {name: mean_of(sets, x) for name, x in log_prob.items()}
    unit = "bits_per_dim" if sets.pixels else "log_prob"
    print_table(unit, means, log_prob, aurocs)

    panels = [
        plot.HistogramPanel(
            f"{score}: {UNITS[score]}",
            values,
            {name: found.value for name, found in aurocs[score].items()},
        )
        for score, values in scores.items()
    ]
    run_dir.save_figures(separation=plot.score_histograms(panels))
    metrics: dict[str, float] = {f"{unit}_{name}": mean for name, mean in means.items()}
    for score, of_sets in aurocs.items():
        for name, found in of_sets.items():
            metrics[f"auroc_{score}_{name}"] = found.value
            metrics[f"auroc_{score}_{name}_stderr"] = found.stderr
    warnings = [*sets.warnings, *lost(log_prob), *verdicts(aurocs)]
    run_dir.finish(metrics, failures, timing, warnings)


def log_probs(
    settings: OOD, model: ImageModel | TableModel, sets: Sets, key: Key[Array, ""]
) -> Values:
    """Log-densities, nats, of each set and of "training", the reference; consumes `key`."""
    tolerance = settings.test_tolerance
    solve = dataclasses.replace(evaluate.ACCURATE, rtol=tolerance, atol=tolerance)
    every = {"training": sets.reference, **sets.x}
    return {
        name: model.log_prob(x, jr.fold_in(key, i), solve)
        for i, (name, x) in enumerate(every.items())
    }


def scores_of(
    sets: Sets,
    log_prob: Values,
    reference: np.ndarray,
    background: Values | None = None,
) -> dict[str, Values]:
    """Values of each score, by score and set; infinite where a point has no density."""
    scores: dict[str, Values] = {score: {} for score in UNITS}
    for name, x in log_prob.items():
        scores["likelihood"][name] = ood.likelihood(x)
        scores["typicality"][name] = ood.typicality(x, reference)
        if sets.pixels:
            pixels = sets.pixels[name]
            length = evaluate.code_length(pixels, sets.shape, sets.levels)
            scores["complexity"][name] = ood.complexity(x, length, pixels.shape[1], sets.levels)
        if background is not None:
            scores["ratio"][name] = ood.ratio(x, background[name])
    return {
        score: {name: np.where(np.isnan(x), np.inf, x) for name, x in values.items()}
        for score, values in scores.items()
        if values
    }


def aurocs_of(scores: Mapping[str, Values]) -> dict[str, dict[str, Auroc]]:
    """AUROC of each score for every outside set against the inside one, by score and set."""
    return {
        score: {
            name: evaluate.auroc(values[INSIDE], x) for name, x in values.items() if name != INSIDE
        }
        for score, values in scores.items()
    }


def mean_of(sets: Sets, log_prob: np.ndarray) -> float:
    """Mean over points with a density: bits per dimension of images, log-density (nats) of rows."""
    known = log_prob[~np.isnan(log_prob)]
    mean = float(known.mean()) if len(known) else float("nan")
    return bits_per_dim(mean, math.prod(sets.shape), sets.levels) if sets.pixels else mean


def lost(log_prob: Values) -> list[str]:
    """Return a warning for each set with points that have no density."""
    return [
        f"the solve failed for {np.isnan(x).sum()} of {len(x)} points of {name}: they have no "
        "density and count as the most unusual"
        for name, x in log_prob.items()
        if np.isnan(x).any()
    ]


def verdicts(aurocs: Mapping[str, Mapping[str, Auroc]]) -> list[str]:
    """Return a warning for each set that likelihood does not detect, with the best other score."""
    lines = []
    for name, found in aurocs["likelihood"].items():
        if found.value >= MIN_AUROC:
            continue
        others = {s: sets[name].value for s, sets in aurocs.items() if s != "likelihood"}
        best = max(others, key=lambda score: others[score])
        remedy = f"{best} can ({others[best]:.2f})"
        if others[best] < MIN_AUROC:
            remedy = f"no other score can (the best is {best}, {others[best]:.2f})"
        if found.value + 2 * found.stderr < 0.5:
            lines.append(
                f"likelihood ranks {name} as MORE likely than the run's own test data (AUROC "
                f"{found.value:.2f}): it cannot tell them apart; {remedy}"
            )
        else:
            lines.append(
                f"likelihood can hardly tell {name} from the run's own test data (AUROC "
                f"{found.value:.2f}); {remedy}"
            )
    return lines


def print_table(
    unit: str,
    means: Mapping[str, float],
    log_prob: Values,
    aurocs: Mapping[str, Mapping[str, Auroc]],
) -> None:
    """Print a row for each set: its number of points, mean log-density, and AUROC by each score."""
    width = max(map(len, means))
    print(f"{'AUROC':{width}} {'points':>7} {unit:>13}" + "".join(f"{s:>16}" for s in aurocs))
    for name, mean in means.items():
        row = f"{name:{width}} {len(log_prob[name]):7} {mean:13.4g}"
        for found in (sets[name] for sets in aurocs.values() if name in sets):
            row += f"{found.value:10.3f} ±{found.stderr:.3f}"
        print(row)


if __name__ == "__main__":
    main(run, OOD)
