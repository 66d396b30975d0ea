"""Startup of a fresh process: imports, and the first training step, cold and from the cache."""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np

from experiments.bench.report import Results
from experiments.bench.timing import quartiles, ratios

IMPORTS = {
    "jax, equinox, diffrax, optax": "import jax, equinox, diffrax, optax",
    "jcnf": "import jcnf",
}
TIMED = """
import json, time
tic = time.perf_counter()
{body}
print(json.dumps(time.perf_counter() - tic))
"""
FIRST_STEP = """
from experiments.bench import cases, ours
case = cases.CASES["toy"](0)
ours.training_step(case)
"""


def run(rounds: int) -> Results:
    """Time each import in turn, in separate processes, and then the first training step.

    The first step runs once without cached compiled programs and `rounds` times with them. Times
    are in milliseconds; those of the first step include its imports.
    """
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds + 1):
        for name, body in IMPORTS.items():
            times[name].append(_seconds(body))
    results, first = {}, np.array(times[next(iter(times))][1:])
    for name, series in times.items():  # without the first round, which reads from disk
        results[f"import {name}"] = _figures(np.array(series[1:]), first)
    with tempfile.TemporaryDirectory() as cache:
        cold = _seconds(FIRST_STEP, cache)
        warm = np.array([_seconds(FIRST_STEP, cache) for _ in range(rounds)])
    results["first step, cold"] = _figures(np.array([cold]), first[:1])
    results["first step, from the compile cache"] = _figures(warm, first)
    return results


def _figures(seconds, first):
    return quartiles("ms", 1e3 * seconds) | quartiles("ratio", ratios(seconds, first))


def _seconds(body, cache=None):
    environment = dict(os.environ)
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(body=body)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
