"""The growth of a training step's time with batch, width, dimension and tolerance."""

import dataclasses
import functools
from collections.abc import Callable

from experiments.bench import ours, peers
from experiments.bench.cases import CASES, Case, table
from experiments.bench.step import agreeing
from experiments.bench.timing import measure
from jcnf.plot import CurvePanel, scaling_exponent

GRID: dict[str, tuple[float, ...]] = {
    "batch": (64, 256, 1024, 4096),
    "width": (32, 64, 128, 256, 512),
    "dim": (2, 8, 32, 128),
    "tolerance": (1e-3, 1e-4, 1e-5, 1e-6),
}
DIM, WIDTH, BATCH = 8, 64, 256
trained = functools.cache(CASES["toy_trained"])  # a function of the number of pretraining steps
Curves = dict[str, dict[str, tuple[list[float], list[float]]]]  # {axis: {program: (values, ms)}}


def case_at(axis: str, value: float, steps: int) -> Case:
    """Return a case with two hidden layers of softplus, one size of which is `value`.

    For tolerances it is the toy after `steps` optimizer steps, because an untrained flow takes one
    solver step at any tolerance.
    """
    if axis != "tolerance":
        return table(**{"dim": DIM, "width": WIDTH, "batch": BATCH} | {axis: int(value)})
    case = trained(steps)
    return dataclasses.replace(case, solve=dataclasses.replace(case.solve, rtol=value, atol=value))


def run(
    rounds: int,
    seconds: float,
    with_peers: bool,
    steps: int,
    grid: dict[str, tuple[float, ...]] = GRID,
    say: Callable[[str], None] = print,
) -> Curves:
    """Time steps along each axis; peers leave an axis once a step takes `seconds`."""
    curves: Curves = {}
    for axis, values in grid.items():
        curves[axis] = {}
        slow = False
        for value in values:
            case = case_at(axis, value, steps)
            programs = {ours.NAME: ours.training_step(case)}
            for peer in peers.load("torchdiffeq").values() if with_peers and not slow else ():
                make = functools.partial(peer.training_steps, ways=("direct",))
                programs |= agreeing(case, make, {})
            for name, r in measure(programs, rounds, seconds=seconds).items():
                x, y = curves[axis].setdefault(name, ([], []))
                x.append(value)
                y.append(r["ms"])
                slow = slow or r["ms"] > 1e3 * seconds
        for name, (x, y) in curves[axis].items():
            power = f", exponent {scaling_exponent(x, y):.2f}" if len(x) > 1 else ""
            shown = "  ".join(f"{a:g}: {b:.1f}" for a, b in zip(x, y, strict=True))
            say(f"{axis}, {name}: {shown} ms{power}")
    return curves


def panels(curves: Curves) -> list[CurvePanel]:
    """Return a panel for each axis."""
    return [
        CurvePanel(f"against {axis}", axis, "training step (ms)", series)
        for axis, series in curves.items()
    ]


def exponents(curves: Curves) -> dict[str, float]:
    """Return each program's exponent along each axis, by least squares over all values."""
    return {
        f"{name}, exponent of {axis}": scaling_exponent(x, y)
        for axis, series in curves.items()
        for name, (x, y) in series.items()
        if len(x) > 1
    }
