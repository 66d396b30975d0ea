"""Time jcnf, and with --peers other packages in the same run and on the same work, as ratios.

Suites: step (a training step by likelihood against batched and per-sample diffrax, one of flow
matching against its network's bare passes), pieces (the step, with one more extension of diffrax at
a time), roofline (the step against the same arithmetic
unrolled, and against the machine's matrix products), evaluate and sample (many points at equal
accuracy), scaling (exponents of batch, width, dimension, tolerance), startup (imports, first step),
quality (seconds of training to a gap on 8gaussians; minutes). --peers adds torchdiffeq, torchdyn,
zuko, torchcfm and flowjax's spline flow (`pip install -c constraints.txt -e '.[peers]'`), given our
weights and batches. A step is by one solver and tolerance for all, and each must have our loss
before it is timed; many points are taken by whatever solver and tolerance suits each best.
"""

import dataclasses

import jax

from experiments._runner.cli import main
from experiments._runner.config import MANY, RunSettings
from experiments._runner.run_dir import RunDir
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
from jcnf._checks import InputError

QUICK = ("step", "pieces", "roofline", "evaluate", "sample", "scaling", "startup")
SUITES = (*QUICK, "quality")
EVALUATED = ("toy_trained", "table")
WIDTHS = (64, 256, 1024)  # of the table's layers, against the roofline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(RunSettings):
    """What to time."""

    # step, pieces, roofline, evaluate, sample, scaling, startup, quality (not by default: minutes)
    suites: tuple[str, ...] = QUICK
    # flows of step, pieces and roofline: toy, toy_trained, circles, table; evaluate and sample have
    # the second and the last
    cases: tuple[str, ...] = tuple(CASES)
    # time the other packages too
    peers: bool = False
    # optimiser steps before the "trained" case, and before scaling with the tolerance
    steps: int = 1000
    # timed rounds of each program, in turn
    rounds: int = 15
    # a program that has taken so many seconds sits out the rounds that remain
    seconds: float = 60.0
    # points of evaluate and sample
    points: int = 10_000
    # quality: seconds of training after which a program gives up
    limit: float = 400.0

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        super().check()
        self.at_least(1, "steps", "rounds")
        self.at_least(1, "points", most=MANY)
        self.positive("seconds", "limit")
        self.some_of("suites", SUITES)
        self.some_of("cases", tuple(CASES))
        for suite in {"evaluate", "sample"} & set(self.suites):
            if not set(EVALUATED) & set(self.cases):
                raise InputError(f"--suites {suite} needs one of --cases {', '.join(EVALUATED)}")
        if self.peers:
            peers.require_peers()

    def some_of(self, name: str, known: tuple[str, ...]) -> None:
        """Raise `InputError` where a setting names nothing, something unknown, or a name twice."""
        given = getattr(self, name)
        for value in given:
            if value not in known:
                raise InputError(f"unknown value '{value}' of --{name}: use {', '.join(known)}")
        if not given or len(set(given)) < len(given):
            raise InputError(f"--{name} must be some of {', '.join(known)}, each once")


def run(settings: Benchmark) -> None:
    """Time what was asked for; print tables; write benchmark.json and the figures."""
    # A program loaded from the cache would not show what compiling it takes.
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
        cases += [table(width=width) for width in WIDTHS]
    for case in cases:
        title = f"roofline: {case.title}, batch {case.batch}"
        results = roofline.run(case, settings.rounds, settings.seconds, rate)
        found[title] = _table(title, results, ratios)
    return found


def _points(time_points, what):
    def section(settings, run_dir, ratios):
        found = {}
        for case in _chosen(settings, *EVALUATED):
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
    found = quality.run(settings.limit, settings.peers, settings.seed)
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
