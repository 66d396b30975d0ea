"""Train one flow on a toy density by four methods, and compare them after equal training times.

    python -m experiments.flow_matching --data 8gaussians --budgets 5 15 60

The methods are likelihood, flow matching, flow matching with pairs by optimal transport, and flow
matching followed by likelihood. A spline flow can be trained beside them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax.random as jr
import numpy as np

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run, Training
from experiments._runner.fields import FlowSettings
from experiments._runner.metrics_log import MetricsLog
from experiments._runner.objectives import (
    Finetuning,
    FlowMatching,
    Likelihood,
    Matching,
    NoFinetuning,
)
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Positive, Range
from experiments._runner.stages import fresh_batches, step_seconds, train_stages
from experiments._tasks.autoregressive_flow import require_flowjax, train_autoregressive_flow
from experiments._tasks.density2d import PlaneMeasure, ToyFlow, ToyName, reference_points
from experiments._tasks.figures import mmd_of
from jcnf import evaluate
from jcnf.data.toys import Toy, toy
from jcnf.plot import CurvePanel, scaling

MMD_POINTS = 5000
SAMPLING_TOLERANCE = 1e-3
# Time of an average likelihood step over a first one: trained flows take longer to solve.
LIKELIHOOD_STEP_GROWTH = 3.0
FINETUNE_SHARE = 0.4  # share of the budget for likelihood after flow matching

PEER = "spline_flow"
METHODS = ("likelihood", "flow_matching", "transport", "finetuned")
Budgets = Annotated[tuple[float, ...], Range(1e-3, 1e5, min_length=1)]
Method = Literal["likelihood", "flow_matching", "transport", "finetuned", "spline_flow"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodComparison(Experiment):
    """A toy density, a flow, the methods that train it, and their budgets of time."""

    # toy density
    data: ToyName = "8gaussians"
    # seconds of training; each budget is a separate training, whose schedule ends with it
    budgets: Budgets = (5.0, 15.0, 60.0)
    # methods of training: likelihood (batches of 256, learning rate 5e-3), flow_matching, transport
    # (flow matching with optimal-transport pairs), finetuned (flow matching, then likelihood), and
    # spline_flow (a neural spline flow by flowjax)
    methods: tuple[Method, ...] = METHODS
    # peak learning rate of the fine-tuning by likelihood
    finetune_learning_rate: Positive = 1e-3

    matching: Matching = Matching()
    likelihood: Likelihood = Likelihood()
    flow: FlowSettings = FlowSettings()
    training: Training = Training()
    measure: PlaneMeasure = PlaneMeasure()
    run: Run = Run()

    def check(self) -> None:
        repeated = [len(set(v)) < len(v) or not v for v in (self.budgets, self.methods)]
        if any(repeated):
            raise ValueError("--budgets and --methods need at least one value, and none twice")
        self.likelihood.solve.check_interval(self.flow.t1)

    def trace(self) -> None:
        if PEER in self.methods:
            require_flowjax()
        for method in {*METHODS} & {*self.methods}:
            self.for_method(method, 1, 1).trace_objectives(2)

    def for_method(self, method: str, steps: int, finetune_steps: int = 0) -> ToyFlow:
        """Return the settings of one training."""
        training = dataclasses.replace(self.training, steps=steps)
        objective = self.likelihood
        if method == "likelihood":
            # Steps are expensive here, so smaller batches at a lower rate use the time better.
            training = dataclasses.replace(training, batch=256, learning_rate=5e-3, clip=2.0)
        else:
            coupling = "exact" if method == "transport" else "independent"
            finetuning = NoFinetuning()
            if finetune_steps:
                finetuning = Finetuning(
                    likelihood=self.likelihood,
                    finetune_steps=finetune_steps,
                    finetune_learning_rate=self.finetune_learning_rate,
                )
            objective = FlowMatching(matching=self.matching, coupling=coupling, finetune=finetuning)
        parts = {"flow": self.flow, "measure": self.measure, "run": self.run}
        return ToyFlow(objective=objective, training=training, **parts)


def run(settings: MethodComparison) -> None:
    """Train by each method for each budget, measure the flows, and draw gap against seconds."""
    density = toy(settings.data)
    run_dir = RunDir("flow_matching", settings)
    log = MetricsLog(run_dir.log, [], 0)
    test = density.sample(jr.fold_in(jr.key(settings.run.seed), 2), settings.measure.test_points)
    true = np.asarray(density.log_prob(test))
    results: dict[str, dict[str, float]] = {}
    for method in settings.methods:
        measure = peer(settings, density) if method == PEER else ours(settings, density, method)
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
            results[f"{method}_{budget:g}"] = figures
            log.add({"step": len(log.records) + 1, "method": method, "budget": budget, **figures})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"{method} {budget:g} s: {shown}")

    def curve(method, name):
        return [results[f"{method}_{budget:g}"][name] for budget in sorted(settings.budgets)]

    curves = {m: (curve(m, "seconds"), curve(m, "nll_gap")) for m in settings.methods}
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


def ours(settings: MethodComparison, density: Toy, method: str) -> Measure:
    """Return `measure(budget, test) -> (log-densities, figures)` for our flow, by `method`."""
    data = reference_points(density.sample, settings.run.seed)
    flow = settings.for_method(method, 1).make_flow(2, data=data)
    test_solve = settings.measure.make_solve()
    sampling_solve = dataclasses.replace(
        test_solve, rtol=SAMPLING_TOLERANCE, atol=SAMPLING_TOLERANCE
    )
    make_draw = fresh_batches(density.sample)

    def seconds_of(method):
        steps = 20 if method == "likelihood" else 200
        first, *_ = settings.for_method(method, 2 * steps).make_stages()
        seconds = step_seconds(flow, first, make_draw, steps)
        return seconds * (LIKELIHOOD_STEP_GROWTH if method == "likelihood" else 1)

    first_seconds = seconds_of(method)
    share = FINETUNE_SHARE if method == "finetuned" else 0.0
    finetune_seconds = seconds_of("likelihood") if share else math.inf

    def measure(budget, test):
        steps = max(1, round((1 - share) * budget / first_seconds))
        finetune_steps = round(share * budget / finetune_seconds)
        stages = settings.for_method(method, steps, finetune_steps).make_stages()
        trained = train_stages(flow, stages, make_draw, seed=settings.run.seed)
        scores = evaluate.log_prob(trained.flow, test, solve=test_solve)
        key, noise_key = jr.split(jr.fold_in(jr.key(settings.run.seed), 3))
        samples = evaluate.sample(trained.flow, key, MMD_POINTS, solve=sampling_solve)
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


def peer(settings: MethodComparison, density: Toy) -> Measure:
    """Return `measure(budget, test) -> (log-densities, figures)` for a neural spline flow."""

    def measure(budget, test):
        trained = train_autoregressive_flow(
            lambda key, _: density.sample(key, settings.training.batch),
            None,
            transformer="spline",
            seconds=budget,
            seed=settings.run.seed,
        )
        figures = {"seconds": trained.seconds, "steps": float(trained.steps)}
        return trained.log_prob(test), figures

    return measure


if __name__ == "__main__":
    main(run, MethodComparison)
