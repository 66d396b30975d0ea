"""Log-densities and samples of many points, timed with all programs at the same accuracy.

Errors are root mean squares on the first points of a case, against a float64 solve at tolerance
1e-9. For each of `ERRORS`, a program uses the fastest of its methods and tolerances that reach it.
All programs control the root mean square over the batch. Ours takes chunks of its default size; the
others take all points at once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.bench import ours, peers
from experiments.bench.cases import Case
from experiments.bench.peers import diffrax_solves
from experiments.bench.report import Results
from experiments.bench.timing import Program, measure, time_of
from jcnf import evaluate
from jcnf.evaluate.chunks import CHUNK
from jcnf.evaluate.precision import in_float64
from jcnf.flows import log_prob, transform
from jcnf.ode import Solve

ERRORS = (1e-3, 1e-4)  # nats for log-densities, units of x for samples
TOLERANCES = tuple(d * 10.0**e for e in range(-2, -8, -1) for d in (10, 5, 2))  # 0.1, 0.05, ...
REFERENCE = Solve(solver="dopri8", rtol=1e-9, atol=1e-9, norm="worst", max_steps=10_000)
OUR_SOLVERS = ("bosh3", "tsit5", "dopri8")
MAX_SECONDS = 10.0  # a run that takes longer is not tried at tighter tolerances
TRIALS = 3  # runs of a method, of which the fastest counts; slow methods run once
# (case, solver, tolerance) -> a function of the points
Way = Callable[[Case, str, float], Callable[[np.ndarray], np.ndarray]]


class Found(NamedTuple):
    """The error and time of a solver at one tolerance."""

    solver: str
    tolerance: float
    error: float  # on the first points
    seconds: float  # for all points; infinite if the error exceeds all of `ERRORS`


def log_probs(
    case: Case, points: int, rounds: int, seconds: float, with_peers: bool
) -> dict[float, Results]:
    """Time the log-densities of `points` data points; return {error: results}."""
    ways = _ours(_our_log_probs) | _theirs("log_probs", with_peers)
    x = case.draw(jr.key(8), points)
    return _compare(case, ways, x, _exact_log_prob, rounds, seconds)


def samples(
    case: Case, points: int, rounds: int, seconds: float, with_peers: bool
) -> dict[float, Results]:
    """Time samples from `points` base draws, the same for all programs, by solves of x alone."""
    ways = _ours(_our_samples) | _theirs("samples", with_peers)
    z = case.flow.base.sample(jr.key(9), points)
    return _compare(case, ways, z, _exact_samples, rounds, seconds)


def _ours(make) -> dict[str, tuple[Way, tuple[str, ...]]]:
    """Return our ways: a plain call, and a call with the step plan of an earlier one."""
    again = functools.partial(make, again=True)
    return {ours.NAME: (make, OUR_SOLVERS), f"{ours.NAME}, step plan known": (again, OUR_SOLVERS)}


def _theirs(what, with_peers) -> dict[str, tuple[Way, tuple[str, ...]]]:
    """Return each peer's way and its solvers; diffrax is always among them."""
    modules = {"batched diffrax": diffrax_solves}
    if with_peers:
        modules |= peers.load("torchdiffeq", "zuko")
    return {name: (getattr(module, what), module.SOLVERS) for name, module in modules.items()}


def _compare(case, ways, x, exact, rounds, seconds) -> dict[float, Results]:
    head = x[: case.head]
    reference = np.asarray(in_float64(exact, case.flow, head))
    found = {
        name: list(_tried(case, way, solvers, x, head, reference))
        for name, (way, solvers) in ways.items()
    }
    results = {}
    for error in ERRORS:
        programs = {}
        for name, (way, _) in ways.items():
            chosen = fastest(found[name], error)
            if chosen is None:
                print(f"  {name}: not timed: no tolerance tried gives an error of {error:g}")
                continue
            run = way(case, chosen.solver, chosen.tolerance)
            figures = {"error": chosen.error, "tolerance": chosen.tolerance, "points": len(x)}
            title = f"{name}, {chosen.solver}"
            programs[title] = Program(lambda run=run: run(x), figures)
        results[error] = measure(programs, rounds, seconds=seconds)
    return results


def _tried(case, way, solvers, x, head, reference):
    """Yield each solver at ever smaller tolerances, until its error is below all `ERRORS`."""
    for solver in solvers:
        for tolerance in TOLERANCES:
            run = way(case, solver, tolerance)
            try:
                difference = np.asarray(run(head), np.float64) - reference
            except AssertionError:  # torchdiffeq, when a step becomes too short
                continue
            error = float(np.sqrt(np.mean(difference**2)))
            seconds = _seconds(lambda run=run: run(x)) if error <= max(ERRORS) else np.inf
            yield Found(solver, tolerance, error, seconds)
            if error <= min(ERRORS) or MAX_SECONDS < seconds < np.inf:
                break


def _seconds(run):
    """Return the seconds of the fastest of some runs, after one that compiles."""
    run()
    first = time_of(run, 1)
    return first if first > 1 else min(first, *(time_of(run, 1) for _ in range(TRIALS - 1)))


def fastest(found: list[Found], error: float) -> Found | None:
    """Return the fastest of those with at most this error, or None."""
    return min((f for f in found if f.error <= error), key=lambda f: f.seconds, default=None)


def _solve(case, solver, tolerance):
    return dataclasses.replace(case.solve, solver=solver, rtol=tolerance, atol=tolerance)


def _our_log_probs(case, solver, tolerance, *, again=False):
    solve = _solve(case, solver, tolerance)
    if again:
        stats = transform(case.flow, case.draw(jr.key(7), CHUNK), solve=solve).stats
        solve = dataclasses.replace(solve, step_plan=stats.step_plan)
    return lambda x: evaluate.log_prob(case.flow, x, solve=solve).log_prob


def _our_samples(case, solver, tolerance, *, again=False):
    solve = _solve(case, solver, tolerance)
    if again:
        z = case.flow.base.sample(jr.key(7), CHUNK)
        solve = dataclasses.replace(
            solve, step_plan=case.flow.bijection.forward(z, None, solve)[1].step_plan
        )
    return lambda z: evaluate.transform(case.flow, z, "to_data", solve=solve).x[-1]


def _exact_log_prob(flow, x):
    return log_prob(flow, x, solve=REFERENCE)


def _exact_samples(flow, z):
    return jnp.asarray(evaluate.transform(flow, z, "to_data", solve=REFERENCE).x[-1])
