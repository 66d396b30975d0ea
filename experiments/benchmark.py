"""Time jcnf and, with --peers, other packages on the same work in the same run, as ratios.

    python -m experiments.benchmark --suites step --peers

The suites:

- step: a training step by likelihood, against batched and per-sample diffrax; a step of flow
  matching, against the bare passes of its network
- pieces: the training step, adding one extension of diffrax at a time
- roofline: the training step, against the same arithmetic unrolled and against the machine's
  matrix products
- evaluate, sample: log-densities and samples of many points at equal accuracy
- scaling: exponents of the step time in batch, width, dimension and tolerance
- startup: imports and the first training step
- quality: seconds of training until a gap on 8gaussians (takes minutes; not run by default)

The flag --peers adds torchdiffeq, torchdyn, zuko, torchcfm and flowjax's spline flow, with the
weights and batches of jcnf (install them by `pip install -c constraints.txt -e '.[peers]'`). For a
training step all packages use one solver and tolerance, and a peer is timed only if its loss equals
ours. For many points each package uses the solver and tolerance that suit it best.
"""

import dataclasses
from typing import Literal

import jax

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Count, Positive, Steps
from experiments.bench import (
    evaluate,
    matching,
    peers,
    pieces,
    quality,
    report,
    roofline,
    scaling,
    startup,
    step,
)
from experiments.bench.cases import CASES, table
from jcnf import plot

Suite = Literal["step", "pieces", "roofline", "evaluate", "sample", "scaling", "startup", "quality"]
DEFAULT_SUITES: tuple[Suite, ...] = (
    *("step", "pieces", "roofline", "evaluate", "sample", "scaling", "startup"),
)
CaseName = Literal["toy", "toy_trained", "circles", "table"]
DEFAULT_CASES: tuple[CaseName, ...] = ("toy", "toy_trained", "circles", "table")
EVALUATED_CASES = ("toy_trained", "table")
ROOFLINE_TABLE_WIDTHS = (64, 256, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(Experiment):
    """The suites, the cases, and how long to time each program."""

    # suites to run (quality takes minutes, and is not run by default)
    suites: tuple[Suite, ...] = DEFAULT_SUITES
    # flows to time (evaluate and sample time only toy_trained and table)
    cases: tuple[CaseName, ...] = DEFAULT_CASES
    # also time the other packages
    peers: bool = False
    # optimizer steps that train toy_trained and the flow of scaling with the tolerance
    steps: Steps = 1000
    # timed rounds; in each round the programs take turns
    rounds: Steps = 15
    # seconds after which a program skips its remaining rounds
    seconds: Positive = 60.0
    # points in the suites evaluate and sample
    points: Count = 10_000
    # quality: seconds of training after which a program stops without the target gap
    limit: Positive = 400.0

    run: Run = Run()

    def check(self) -> None:
        for name, given in {"suites": self.suites, "cases": self.cases}.items():
            if not given or len(set(given)) < len(given):
                raise ValueError(f"--{name} must name at least one, none twice; got {given}")
        points = {"evaluate", "sample"} & set(self.suites)
        if points and not set(EVALUATED_CASES) & set(self.cases):
            raise ValueError(
                f"--suites {min(points)} needs at least one of --cases {', '.join(EVALUATED_CASES)}"
            )

    def trace(self) -> None:
        if self.peers:
            peers.require_peers()


def run(settings: Benchmark) -> None:
    """Run the chosen suites; print tables; write `benchmark.json` and the figures."""
    # A program loaded from the cache would not show how long it takes to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    run_dir = RunDir("benchmark", settings)
    conditions = report.conditions()
    print(", ".join(f"{name} {value}" for name, value in conditions.items()))
    found: dict = {"conditions": conditions}
    ratios: dict[str, float] = {}
    for name in settings.suites:
        found[name] = SECTIONS[name](settings, run_dir, ratios)
        run_dir.write_json("benchmark.json", found)
    run_dir.finish(ratios, {}, {})


def _table(title, results, ratios):
    report.show(title, results)
    ratios |= report.ratios(title, results)
    return results


def _chosen(settings, *names):
    return [CASES[n](settings.steps) for n in settings.cases if not names or n in names]


def _step(settings, run_dir, ratios):
    found = {}
    for case in _chosen(settings):
        title = f"step: {case.title}, batch {case.batch}"
        results = step.run(case, settings.rounds, settings.seconds, settings.peers)
        found[title] = _table(title, results, ratios)
    limits = (settings.rounds, settings.seconds)
    for case in (matching.residual(2, 96), matching.residual(8, 128), matching.residual(8, 256)):
        title = f"flow matching: {case.title}, batch {case.batch}"
        found[title] = _table(title, matching.run(case, *limits), ratios)
    if settings.peers:
        for case in (matching.dense(2, 64), matching.dense(8, 256)):
            title = f"flow matching: {case.title}, batch {case.batch}"
            found[title] = _table(title, matching.against_torchcfm(case, *limits), ratios)
    return found


def _pieces(settings, run_dir, ratios):
    found = {}
    for case in _chosen(settings):
        title = f"pieces: {case.title}, batch {case.batch}"
        results = pieces.run(case, settings.rounds, settings.seconds)
        found[title] = _table(title, results, ratios)
    return found


def _roofline(settings, run_dir, ratios):
    products = roofline.gemm(settings.rounds, settings.seconds)
    report.show("roofline: products of square matrices", products)
    rate = max(r["gflop_per_s"] for r in products.values())
    print(f"  the highest rate is {rate:.0f} GFLOP/s")
    found = {"gemm": products}
    cases = _chosen(settings, "toy", "toy_trained", "circles")
    if "table" in settings.cases:
        cases += [table(width=width) for width in ROOFLINE_TABLE_WIDTHS]
    for case in cases:
        title = f"roofline: {case.title}, batch {case.batch}"
        results = roofline.run(case, settings.rounds, settings.seconds, rate)
        found[title] = _table(title, results, ratios)
    return found


def _points(time_points, what):
    def section(settings, run_dir, ratios):
        found = {}
        for case in _chosen(settings, *EVALUATED_CASES):
            limits = (settings.rounds, settings.seconds)
            by_error = time_points(case, settings.points, *limits, settings.peers)
            for error, results in by_error.items():
                title = f"{settings.points} {what}, error {error:g}: {case.title}"
                found[title] = _table(title, results, ratios)
        return found

    return section


def _scaling(settings, run_dir, ratios):
    found = scaling.run(settings.rounds, settings.seconds, settings.peers, settings.steps)
    run_dir.save_figures(scaling=plot.scaling(scaling.panels(found)))
    exponents = scaling.exponents(found)
    ratios |= exponents
    return {"ms": found, "exponents": exponents}


def _startup(settings, run_dir, ratios):
    return _table("startup", startup.run(min(settings.rounds, 5)), ratios)


def _quality(settings, run_dir, ratios):
    found = quality.run(settings.limit, settings.peers, settings.run.seed)
    run_dir.save_figures(quality=plot.scaling([quality.panel(found)]))
    return found


SECTIONS = {
    "step": _step,
    "pieces": _pieces,
    "roofline": _roofline,
    "evaluate": _points(evaluate.log_probs, "log-densities"),
    "sample": _points(evaluate.samples, "samples"),
    "scaling": _scaling,
    "startup": _startup,
    "quality": _quality,
}


if __name__ == "__main__":
    main(run, Benchmark)
