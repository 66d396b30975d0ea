"""Log-densities and samples of many points, every program at the accuracy of all others.

Each takes the loosest tolerance at which its root mean square error, on the case's first points
and against a solve in float64 at 1e-9, is at most `ERROR`. Ours takes chunks of its default size;
the others take the points at once, as a call of theirs does, and by chunks too.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from experiments.bench import ours, peers
from experiments.bench.cases import Case
from experiments.bench.report import Results
from experiments.bench.timing import Program, measure
from jcnf import Solve, evaluate
from jcnf.evaluate.doubled import in_float64
from jcnf.flow import log_prob

ERROR = 1e-3  # nats of log-densities, units of x of samples
LADDER = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
REFERENCE = Solve(solver="dopri8", rtol=1e-9, atol=1e-9, norm="worst", max_steps=10_000)
# At this error the cheapest for us; with dopri5 it is 1.3 times as much, and as much for samples.
FOR_LOG_PROBS, FOR_SAMPLES = {"solver": "bosh3"}, {"solver": "tsit5", "norm": "worst"}
Way = Callable[[Case, float], Callable[[np.ndarray], np.ndarray]]  # of a case and a tolerance


def log_probs(case: Case, points: int, rounds: int, seconds: float, with_peers: bool) -> Results:
    """Time log-densities of `points` points of the data."""
    ways: dict[str, Way] = {ours.NAME: _our_log_probs}
    if with_peers:
        torchdiffeq, zuko = peers.load("torchdiffeq", "zuko")
        ways |= {"torchdiffeq": torchdiffeq.log_probs, "zuko": zuko.log_probs}
    x = case.draw(jr.key(8), points)
    return _compare(case, ways, x, _exact_log_prob, rounds, seconds)


def samples(case: Case, points: int, rounds: int, seconds: float, with_peers: bool) -> Results:
    """Time samples from `points` draws of the base, the same for all, by solves of x alone."""
    ways: dict[str, Way] = {ours.NAME: _our_samples}
    if with_peers:
        torchdiffeq, zuko = peers.load("torchdiffeq", "zuko")
        ways |= {"torchdiffeq": torchdiffeq.samples, "zuko": zuko.samples}
    z = case.flow.base.sample(jr.key(9), points)
    return _compare(case, ways, z, _exact_samples, rounds, seconds)


def _compare(case, ways, x, exact, rounds, seconds):
    head = x[: case.head]
    reference = np.asarray(in_float64(exact, case.flow, head))
    programs = {}
    for name, way in ways.items():
        found = loosest(lambda tolerance, way=way: way(case, tolerance), head, reference)
        if found is None:
            print(f"  {name}: not timed, for its error is above {ERROR:g} at every tolerance")
            continue
        tolerance, error = found
        figures = {"tolerance": tolerance, "error": error, "points": len(x)}
        for chunk in (case.chunk,) if name == ours.NAME else (len(x), case.chunk):
            solve = way(dataclasses.replace(case, chunk=chunk), tolerance)
            size = "at once" if chunk == len(x) else f"by {chunk}"
            programs[f"{name}, {size}"] = Program(lambda solve=solve: solve(x), figures)
    return measure(programs, rounds, seconds=seconds)


def loosest(solve_at: Callable, head: np.ndarray, reference: np.ndarray):
    """The loosest tolerance with an error of at most `ERROR`, and that error; or None."""
    for tolerance in LADDER:
        solve = solve_at(tolerance)
        try:
            difference = np.asarray(solve(head), np.float64) - reference
        except AssertionError:  # torchdiffeq, where a step has become too short
            continue
        error = float(np.sqrt(np.mean(difference**2)))
        if error <= ERROR:
            return tolerance, error
    return None


def _our_log_probs(case, tolerance):
    solve = dataclasses.replace(case.solve, rtol=tolerance, atol=tolerance, **FOR_LOG_PROBS)
    return lambda x: evaluate.score(case.flow, x, solve=solve, chunk=case.chunk).log_prob


def _our_samples(case, tolerance):
    solve = dataclasses.replace(case.solve, rtol=tolerance, atol=tolerance, **FOR_SAMPLES)
    return lambda z: evaluate.carry(case.flow, z, "to_data", solve=solve, chunk=case.chunk).x[-1]


def _exact_log_prob(flow, x):
    return log_prob(flow, x, solve=REFERENCE)


def _exact_samples(flow, z):
    return jnp.asarray(evaluate.carry(flow, z, "to_data", solve=REFERENCE).x[-1])
