"""Train one flow on a toy density in four ways, and compare them after equal training times.

The ways are likelihood, flow matching, flow matching with pairs by optimal transport, and flow
matching followed by likelihood. A spline flow can be trained beside them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from experiments._runner.cli import main
from experiments._runner.metrics_log import MetricsLog
from experiments._runner.run_dir import RunDir
from experiments._runner.stages import Stage, drawing, step_seconds, train_stages
from experiments._tasks.density2d import PlaneFlow, ToySettings
from experiments._tasks.spline_flow import require_flowjax, train_spline_flow
from jcnf import evaluate
from jcnf._checks import InputError
from jcnf.data.toys import Toy
from jcnf.plot import CurvePanel, scaling

MMD_POINTS = 5000
SAMPLING_TOLERANCE = 1e-3
MAX_BUDGET_SECONDS = 100_000
# Time of an average likelihood step over a first one: trained flows take longer to solve.
LIKELIHOOD_STEP_GROWTH = 3.0
FINETUNE_SHARE = 0.4  # share of the budget for likelihood after flow matching

# Each way to train, with the settings that it changes for its first stage.
WAYS: dict[str, dict[str, Any]] = {
    # Steps are expensive here, so smaller batches at a lower rate make better use of the time.
    "likelihood": {"objective": "likelihood", "batch": 256, "learning_rate": 5e-3, "clip": 2.0},
    "flow_matching": {"objective": "flow_matching", "coupling": "independent"},
    "transport": {"objective": "flow_matching", "coupling": "exact"},
    "finetuned": {"objective": "flow_matching", "coupling": "independent"},
}
PEER = "spline_flow"
# Settings that each way and budget chooses.
SET_BY_WAYS = ("objective", "steps", "finetune_steps", "coupling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(ToySettings, PlaneFlow):
    """A toy density, a flow, the ways to train it, and their budgets of time."""

    # seconds of training; each budget is a separate training, whose schedule ends with it
    budgets: tuple[float, ...] = (5.0, 15.0, 60.0)
    # ways to train: likelihood (batches of 256, learning rate 5e-3), flow_matching, transport (flow
    # matching with optimal-transport pairs), finetuned (flow matching, then likelihood), and
    # spline_flow (a neural spline flow by flowjax)
    ways: tuple[str, ...] = tuple(WAYS)

    def check(self) -> None:
        super().check()
        for way in self.ways:
            if way not in (*WAYS, PEER):
                raise InputError(f"unknown way '{way}' in --ways: use {', '.join(WAYS)}, {PEER}")
        if not self.budgets or not all(0 < b <= MAX_BUDGET_SECONDS for b in self.budgets):
            raise InputError(
                f"--budgets must be seconds above 0 and up to {MAX_BUDGET_SECONDS}, at least one; "
                f"got {self.budgets}"
            )
        if len(set(self.budgets)) < len(self.budgets) or len(set(self.ways)) < len(self.ways):
            raise InputError("--budgets and --ways must not repeat a value")
        if not self.ways:
            raise InputError(f"--ways needs at least one of {', '.join(WAYS)}, {PEER}")
        defaults = FlowMatching()
        given = {n for n in SET_BY_WAYS if getattr(self, n) != getattr(defaults, n)}
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
            raise InputError(f"--budgets and --ways determine {names}: leave out {names}")
        if PEER in self.ways:
            require_flowjax()
        for way in set(WAYS) & set(self.ways):
            dataclasses.replace(self, **WAYS[way]).check_objective(dim=2)

    def uses(self) -> set[str]:
        parts = {WAYS[way]["objective"] for way in self.ways if way in WAYS}
        if "finetuned" in self.ways:
            parts |= {"likelihood", "--finetune-steps"}
        return parts | {self.field}


def run(settings: FlowMatching) -> None:
    """Train in each way for each budget, measure the flows, and draw gap against seconds."""
    density = settings.make_density()
    run_dir = RunDir("flow_matching", settings)
    log = MetricsLog(run_dir.log, [], 0)
    test = density.sample(jr.fold_in(jr.key(settings.seed), 2), settings.test_points)
    true = np.asarray(density.log_prob(test))
    results: dict[str, dict[str, float]] = {}
    for way in settings.ways:
        measure = peer(settings, density) if way == PEER else ours(settings, density, way)
        for budget in sorted(settings.budgets):
            log_prob, figures = measure(budget, test)
            gaps = (true - log_prob)[np.isfinite(log_prob)]
            figures |= {
                "nll_gap": float(np.mean(gaps)),
                "nll_gap_stderr": evaluate.standard_error(gaps),
                "test_nll": float(np.mean(gaps) - np.mean(true))
                if len(gaps) == len(true)
                else np.nan,
            }
            results[f"{way}_{budget:g}"] = figures
            log.add({"step": len(log.records) + 1, "way": way, "budget": budget, **figures})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"{way} {budget:g} s: {shown}")

    def curve(way, name):
        return [results[f"{way}_{budget:g}"][name] for budget in sorted(settings.budgets)]

    curves = {way: (curve(way, "seconds"), curve(way, "nll_gap")) for way in settings.ways}
    panel = CurvePanel(settings.data, "training seconds", "gap (nats)", curves)
    run_dir.save_figures(gaps=scaling([panel]))
    run_dir.write_json("results.json", results)
    gaps = {f"nll_gap_{name}": figures["nll_gap"] for name, figures in results.items()}
    failures = {n: f["solver_failures"] for n, f in results.items() if "solver_failures" in f}
    run_dir.finish(
        gaps,
        {"solver_failures": sum(failures.values())},
        {name: figures["seconds"] for name, figures in results.items()},
    )


Measure = Callable[[float, Any], tuple[np.ndarray, dict[str, float]]]


def ours(settings: FlowMatching, density: Toy, way: str) -> Measure:
    """Return `measure(budget, test) -> (log-densities, figures)` for our flow, trained by `way`."""
    first = dataclasses.replace(settings, **WAYS[way], finetune_steps=0)
    flow = settings.make_flow(2)
    test_solve = settings.make_test_solve()
    quick = dataclasses.replace(test_solve, rtol=SAMPLING_TOLERANCE, atol=SAMPLING_TOLERANCE)

    draw_of = drawing(density.sample)

    def seconds_of(settings):
        by_likelihood = settings.objective == "likelihood"
        steps = 20 if by_likelihood else 200
        seconds = step_seconds(flow, settings.make_stages()[0], draw_of, steps)
        return seconds * (LIKELIHOOD_STEP_GROWTH if by_likelihood else 1)

    likelihood = dataclasses.replace(first, objective="likelihood")
    first_seconds = seconds_of(first)
    share = FINETUNE_SHARE if way == "finetuned" else 0.0
    finetune_seconds = seconds_of(likelihood) if share else math.inf

    def stages(budget) -> list[Stage]:
        steps = max(1, round((1 - share) * budget / first_seconds))
        finetune_steps = round(share * budget / finetune_seconds)
        return dataclasses.replace(first, steps=steps, finetune_steps=finetune_steps).make_stages()

    def measure(budget, test):
        trained = train_stages(flow, stages(budget), draw_of, seed=settings.seed)
        scores = evaluate.log_prob(trained.flow, test, solve=test_solve)
        key, noise_key = jr.split(jr.fold_in(jr.key(settings.seed), 3))
        samples = evaluate.sample(trained.flow, key, MMD_POINTS, solve=quick)
        fresh = density.sample(noise_key, MMD_POINTS)
        return scores.log_prob, {
            "seconds": trained.seconds,
            "steps": trained.steps,
            "skipped_updates": trained.skipped,
            "mmd": mmd_of(samples, fresh),
            "nfe_to_sample": samples.nfe,
            "nfe_forward": scores.nfe,
            "solver_failures": scores.failures + samples.failures,
        }

    return measure


def mmd_of(samples: evaluate.Trajectories, fresh: Array) -> float:
    """MMD of the samples that did not fail to `fresh` data; NaN if fewer than two are left."""
    arrived = samples.x[-1][~samples.failed]
    return evaluate.mmd(jnp.asarray(arrived), fresh) if len(arrived) > 1 else math.nan


def peer(settings: FlowMatching, density: Toy) -> Measure:
    """Return `measure(budget, test) -> (log-densities, figures)` for a neural spline flow."""

    def measure(budget, test):
        trained = train_spline_flow(
            lambda key, _: density.sample(key, settings.batch),
            None,
            seconds=budget,
            seed=settings.seed,
        )
        figures = {"seconds": trained.seconds, "steps": float(trained.steps)}
        return trained.log_prob(test), figures

    return measure


if __name__ == "__main__":
    main(run, FlowMatching)
