"""Time programs side by side: every program in turn in each round, with ratios per round."""

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TURN_SECONDS = 0.1  # minimum time that a program runs in a round
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Program(NamedTuple):
    """A program to time."""

    run: Callable[[], Any]  # does the work once and waits for it
    figures: dict[str, float]  # known beforehand: loss, nfe, compile_s, ...
    work: int = 1  # units of work in one `run`; times are reported per unit


def measure(
    programs: Mapping[str, Program], rounds: int, *, seconds: float = np.inf
) -> dict[str, dict[str, float]]:
    """Measure the milliseconds of each program, with quartiles and ratios to the first program.

    Every program is warmed up first. Its turn in a round consists of enough runs to take
    `TURN_SECONDS`, after a run that is not timed, because the program before it has filled the
    caches with its own data. A program that has spent `seconds` sits out the remaining rounds; the
    ratio of two programs is the median over the rounds in which both took part.
    """
    results, repeats = {}, {}
    for name, program in programs.items():
        program.run()
        tic = time.perf_counter()
        results[name] = dict(program.figures) | peak_memory(program.run)
        repeats[name] = max(1, round(TURN_SECONDS / (time.perf_counter() - tic)))
    times: dict[str, list[float]] = {name: [] for name in programs}
    gc.collect()
    for _ in range(rounds):
        going = {n: p for n, p in programs.items() if sum(times[n]) <= seconds}
        if not going:
            break
        for name, program in going.items():
            if repeats[name] > 1:
                program.run()
            times[name].append(time_of(program.run, repeats[name]))
    work = {name: program.work * repeats[name] for name, program in programs.items()}
    per_unit = {name: np.array(times[name]) / work[name] for name in programs}
    for name, series in per_unit.items():
        results[name] |= quartiles("ms", 1e3 * series)
        results[name] |= quartiles("ratio", ratios(series, next(iter(per_unit.values()))))
        results[name]["rounds"] = len(series)
    return results


def time_of(run: Callable[[], Any], repeats: int) -> float:
    """Return the seconds that `repeats` runs take."""
    tic = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - tic


def ratios(times: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return time over reference time, for each round in which both took part."""
    number = min(len(times), len(reference))
    return times[:number] / reference[:number]


def quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    """Return the median, under `name`, and the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_q1": float(low), f"{name}_q3": float(high)}


def peak_memory(run: Callable[[], Any]) -> dict[str, float]:
    """Return the resident memory (MiB) that a run adds at its peak; {} where it is not known.

    It is a lower bound, because a run may reuse memory that allocators kept from earlier runs.
    """
    try:
        _CLEAR.write_text("5")  # Linux: resets the high-water mark
        before = _resident("VmRSS")
        run()
        return {"memory_mb": max(_resident("VmHWM") - before, 0.0)}
    except OSError:
        return {}


def _resident(key):
    """Read an entry of /proc/self/status, in MiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
