"""Compare the reverse-mode adjoints: gradient error, memory and time.

    python -m experiments.adjoints --float32-at 1e-5

The flow measured is trained on 8gaussians. Errors cover all parameters and are relative to the
gradient of the exact flow (float64, tolerance 1e-9, itself checked by finite differences). They
are computed in float64, so that they show the adjoint and not rounding; the entries `float32` of
the summary are the errors in float32 at the tolerance --float32-at. Memory is the temporary memory
that XLA plans for the compiled gradient. It is measured on a state of 256 dimensions with a narrow
field, so that stored states make up most of it.
"""

import dataclasses
import functools
import time
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from experiments._runner.cli import main
from experiments._runner.config import Experiment, Run
from experiments._runner.run_dir import RunDir
from experiments._runner.settings import Count, Positive, Range, Whole
from experiments._tasks.pretrained import toy_flow
from jcnf import CNF, Flow, Solve, distributions, evaluate, fields, objectives, plot, training
from jcnf.data.toys import toy
from jcnf.ode import check_tolerance

ADJOINTS = ("checkpoint", "direct", "backsolve", "backsolve_seminorm", "reversible")
STEPS = (20, 80, 320, 1280)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adjoints(Experiment):
    """The flow, the tolerances, and how often to time."""

    # optimizer steps that train the measured flow
    steps: Whole = 1000
    # points in a batch
    batch: Count = 256
    # exponent of the loosest tolerance, 1e-LOOSEST
    loosest: Annotated[int, Range(1, 12)] = 2
    # exponent of the tightest tolerance, 1e-TIGHTEST
    tightest: Annotated[int, Range(1, 12)] = 8
    # tolerance at which gradients are also audited in float32
    float32_at: Positive = 1e-5
    # timed rounds of each adjoint
    rounds: Count = 9

    run: Run = Run()

    def check(self) -> None:
        try:
            check_tolerance(Solve(rtol=self.float32_at, atol=self.float32_at), "float32")
        except ValueError as error:
            raise ValueError(f"--float32-at: {error}") from None
        if not self.loosest <= self.tightest:
            raise ValueError(
                f"--tightest must be at least --loosest ({self.loosest}); got {self.tightest}"
            )


def errors(flow: Flow, x: Array, tolerances: list[float]) -> dict[str, list[float]]:
    """Relative gradient errors of each adjoint, one per tolerance; NaN where a solve failed."""
    reference, _ = evaluate.in_float64(evaluate.loss_gradient, flow, x)
    found: dict[str, list[float]] = {}
    for adjoint in ADJOINTS:
        for tolerance in tolerances:
            solve = Solve(rtol=tolerance, atol=tolerance, adjoint=adjoint, max_steps=4096)
            of = functools.partial(evaluate.loss_gradient, solve=solve)
            gradient, failed = evaluate.in_float64(of, flow, x)
            error = np.nan if failed else evaluate.relative_error(gradient, reference)
            found.setdefault(adjoint, []).append(error)
            print(f"  {adjoint:20} tolerance {tolerance:.0e}: {error:.1e}")
    return found


def seconds(flow: Flow, x: Array, solves: dict[str, Solve], rounds: int) -> dict[str, float]:
    """Median seconds of the compiled gradient under each solve; the solves take turns."""
    for solve in solves.values():
        evaluate.loss_gradient(flow, x, solve=solve)
    series: dict[str, list[float]] = {name: [] for name in solves}
    for _ in range(rounds):
        for name, solve in solves.items():
            tic = time.perf_counter()
            evaluate.loss_gradient(flow, x, solve=solve)
            series[name].append(time.perf_counter() - tic)
    return {name: float(np.median(values)) for name, values in series.items()}


def memory(adjoint: str, steps: int) -> int:
    """Bytes of temporary memory of the compiled gradient over `steps` fixed steps."""
    flow = CNF(fields.MLP(256, (16,), key=jr.key(0)), distributions.StandardNormal(256))
    params, static = training.partition(flow)
    x = jnp.zeros((64, 256))
    solve = Solve(step=flow.bijection.t1 / steps, adjoint=adjoint, max_steps=steps)

    def loss(params, x):
        return objectives.likelihood(eqx.combine(params, static), x, None, solve=solve)[0]

    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    plan: Any = compiled.memory_analysis()
    return plan.temp_size_in_bytes


def run(settings: Adjoints) -> None:
    """Train the flow; measure memory, gradient errors and times; print and draw them."""
    run_dir = RunDir("adjoints", settings)
    flow = toy_flow(settings.steps, settings.run.seed)
    x = toy("8gaussians").sample(jr.fold_in(jr.key(settings.run.seed), 2), settings.batch)

    print(f"bytes of temporary memory for {STEPS} steps, and the exponent of the fit")
    bytes_of, exponents = {}, {}
    for adjoint in ADJOINTS:
        bytes_of[adjoint] = [memory(adjoint, steps) for steps in STEPS]
        exponents[adjoint] = plot.scaling_exponent(STEPS, bytes_of[adjoint])
        print(f"  {adjoint:20} {bytes_of[adjoint]}  {exponents[adjoint]:.2f}")

    print("relative error of the gradient")
    tolerances = [10.0**-k for k in range(settings.loosest, settings.tightest + 1)]
    found = errors(flow, x, tolerances)
    single, ratios = {}, {}
    at = settings.float32_at
    solves = {
        adjoint: Solve(rtol=at, atol=at, adjoint=adjoint, max_steps=4096) for adjoint in ADJOINTS
    }
    taken = seconds(flow, x, solves, settings.rounds)
    for adjoint, solve in solves.items():
        single[adjoint] = evaluate.audit_gradients(flow, x, solve=solve).to_true
        ratios[adjoint] = taken[adjoint] / taken["checkpoint"]
        print(
            f"  {adjoint:20} float32, tolerance {at:.0e}: {single[adjoint]:.1e}, "
            f"{1e3 * taken[adjoint]:.0f} ms, {ratios[adjoint]:.2f} of checkpoint's"
        )

    panels = [
        plot.CurvePanel(
            "error of the gradient",
            "rtol = atol",
            "error relative to the gradient of the exact flow",
            {name: (tolerances, series) for name, series in found.items()},
        ),
        plot.CurvePanel(
            "temporary memory of the gradient",
            "fixed steps",
            "MiB",
            {name: (STEPS, np.array(series) / 2**20) for name, series in bytes_of.items()},
            {name: f"{name}: steps$^{{{round(p, 2) + 0.0:.2f}}}$" for name, p in exponents.items()},
        ),
    ]
    run_dir.save_figures(adjoints=plot.scaling(panels))
    run_dir.write_json(
        "adjoints.json",
        {"tolerances": tolerances, "errors": found, "steps": STEPS, "bytes": bytes_of},
    )
    run_dir.finish(
        {f"memory exponent, {name}": value for name, value in exponents.items()},
        {f"gradient error in float32, {name}": value for name, value in single.items()},
        {f"time over checkpoint's, {name}": value for name, value in ratios.items()},
    )


if __name__ == "__main__":
    main(run, Adjoints)
