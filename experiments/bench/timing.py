"""Programs timed side by side: in rounds, each of every program in turn, with ratios per round."""

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TURN = 0.1  # seconds of a program in a round, if a run takes less
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Program(NamedTuple):
    """Something to time."""

    run: Callable[[], Any]  # does the work, once, and waits for it
    figures: dict[str, float]  # known beforehand: loss, nfe, compile_s, ...
    work: int = 1  # times that `run` does what is reported


def measure(
    programs: Mapping[str, Program], rounds: int, *, seconds: float = np.inf
) -> dict[str, dict[str, float]]:
    """Milliseconds of each program, their quartiles, and ratios to the first.

    Every program is run before. Its turn in a round is as many runs as take `TURN` seconds, after
    one that is not timed, for the program before it has left the caches to its own data. A program
    that has spent `seconds` sits out the rounds that remain; the ratio of two is the median over
    the rounds that both were in.
    """
    results, repeats = {}, {}
    for name, program in programs.items():
        program.run()
        tic = time.perf_counter()
        results[name] = dict(program.figures) | peak_memory(program.run)
        repeats[name] = max(1, round(TURN / (time.perf_counter() - tic)))
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
    """Seconds of so many runs."""
    tic = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - tic


def ratios(times: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Time over the reference's, for each round that both were in."""
    number = min(len(times), len(reference))
    return times[:number] / reference[:number]


def quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    """The median under `name`, and the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_q1": float(low), f"{name}_q3": float(high)}


def peak_memory(run: Callable[[], Any]) -> dict[str, float]:
    """Resident memory that a run takes beyond what is resident before it; {} where not known.

    A lower bound: what earlier runs took and the allocators kept is used again unseen.
    """
    try:
        _CLEAR.write_text("5")  # Linux: the high-water mark starts anew
        before = _resident("VmRSS")
        run()
        return {"memory_mb": max(_resident("VmHWM") - before, 0.0)}
    except OSError:
        return {}


def _resident(key):
    """MiB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
