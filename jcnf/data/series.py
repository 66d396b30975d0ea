"""Time series for neural ODEs: two spirals of known motion, and tables from files."""

import dataclasses
import os
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError, check_int, check_number
from jcnf.data.tables import Standardizer, read_raw

Path = str | os.PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Observations in order of time, in the model's units, float64."""

    times: Float[np.ndarray, " n"]  # from 0 on, strictly increasing
    values: Float[np.ndarray, "n dim"]
    scale: Standardizer  # between the file's units of the values and the model's
    begin: float  # time 0 of `times`, in the file's time
    unit: float  # one unit of `times`, in the file's time
    time_name: str = "t"
    # the true motion at increasing times >= 0, (times,) -> (times, dim), where it is known
    truth: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """A motion dz/dt = velocity(z) from z = `start` at t = 0 to t = `end`."""

    velocity: Callable[[np.ndarray], np.ndarray]
    start: tuple[float, ...]
    end: float

    def __call__(self, times: Float[np.ndarray, " times"]) -> Float[np.ndarray, "times dim"]:
        """Return the states at increasing times >= 0, accurate to 1e-9."""
        from scipy.integrate import solve_ivp

        span, start = (0.0, max(self.end, times[-1])), np.array(self.start)
        settings = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-10}
        return solve_ivp(lambda t, z: self.velocity(z), span, start, t_eval=times, **settings).y.T


_LINEAR = np.array([[-0.1, -1.0], [1.0, -0.1]])
_CUBIC = np.array([[-0.1, 2.0], [-2.0, -0.1]])
TARGETS = {
    # dz/dt = W z: a turn takes 2 pi, and the radius decays as exp(-0.1 t)
    "linear": Target(lambda z: _LINEAR @ z, (0.6, 0.3), 31.45),
    # dz/dt = W' z^3, with z^3 componentwise (torchdiffeq's demo, Chen et al. 2018, which starts
    # from (2, 0)): the motion slows down as it shrinks
    "cubic": Target(lambda z: z**3 @ _CUBIC, (1.0, 0.0), 31.45),
}


def spiral(
    name: str, *, points: int = 200, noise: float = 0.01, irregular: bool = False, seed: int = 0
) -> Series:
    """Observe a target of `TARGETS` at `points` times, with normal noise.

    `noise` is its standard deviation. The times are evenly spaced from 0 to the target's end; with
    `irregular`, those in between are drawn uniformly. `seed` determines times and noise.

    **Raises:** `InputError` for an unknown name, and `ValueError` for numbers out of range.
    """
    if name not in TARGETS:
        raise InputError(f"unknown target '{name}': use one of {', '.join(TARGETS)}")
    check_int(3, points=points)
    check_number("[0, inf)", noise=noise)
    target, rng = TARGETS[name], np.random.default_rng(seed)
    times = np.linspace(0, target.end, points)
    if irregular:
        times[1:-1] = np.sort(rng.uniform(0, target.end, points - 2))
    states = target(times)
    values = states + noise * rng.normal(size=states.shape)
    dim = len(target.start)
    scale = Standardizer(np.zeros(dim), np.ones(dim), tuple(f"z{i + 1}" for i in range(dim)))
    return Series(times, values, scale, begin=0.0, unit=1.0, truth=target)


def load_series(path: Path, *, unit: float | None = None, held_out: int = 0) -> Series:
    """Read a table of a time column and columns of values, and standardize the values.

    **Arguments:**

    - `path`: a file that `jcnf.data.tables.load_table` can read, with the time first.
    - `unit`: one unit of `Series.times`, in the file's time. By default it is the time in which a
      standardized value moves by 1 (root mean square), so that velocities are of the order of 1.
    - `held_out`: number of last rows that affect neither the scale nor the default unit.

    **Raises:** `InputError` for a file that is not a table of numbers (as `load_table` does), for
    times that do not increase, for a constant column, and for fewer than 3 rows or 2 columns;
    `ValueError` for a `unit` or a `held_out` out of range.
    """
    check_int(0, held_out=held_out)
    if unit is not None:
        check_number("(0, inf)", unit=unit)
    table = read_raw(path)
    table = table.take(range(len(table.columns)))
    if set(table.parts) != {"rows"}:
        raise InputError(
            f"{path}: expected one array; got the parts {', '.join(table.parts)}: save them as one"
        )
    rows = table.parts["rows"]
    if len(rows) < 3 or rows.shape[1] < 2:
        raise InputError(
            f"{path}: expected a column of times, at least one column of values, and at least 3 "
            f"rows; got {rows.shape[1]} columns and {len(rows)} rows"
        )
    times, values, names = rows[:, 0], rows[:, 1:], table.columns[1:]
    if not np.all(np.diff(times) > 0):
        row = int(np.argmin(np.diff(times) > 0)) + 2
        raise InputError(
            f"{path}: the first column is the time and must increase; row {row} has "
            f"{times[row - 1]:g} after {times[row - 2]:g}: sort the rows and put the time first"
        )
    if len(rows) - held_out < 3:
        raise InputError(
            f"{path}: held_out={held_out} leaves fewer than 3 of {len(rows)} rows; hold out fewer"
        )
    known = slice(len(rows) - held_out)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, stds = values[known].mean(axis=0), values[known].std(axis=0)
    for name, column, std in zip(names, values[known].T, stds, strict=True):
        if np.all(column == column[0]):
            raise InputError(f"{path}: column {name} is constant: remove it from the file")
        if not 0 < std < np.inf:
            raise InputError(
                f"{path}: column {name} cannot be standardized, its standard deviation is {std:g}: "
                "change its unit"
            )
    scale = Standardizer(mean, stds, names)
    values = (values - scale.mean) / scale.std
    if unit is None:
        speeds = np.diff(values[known], axis=0) / np.diff(times[known])[:, None]
        speed = float(np.sqrt(np.mean(speeds**2)))
        if not 0 < speed < np.inf:
            raise InputError(
                f"{path}: the time unit cannot be chosen from a speed of {speed:g}: pass unit, or "
                "rescale the times"
            )
        unit = 1 / speed
    begin, time_name = float(times[0]), table.columns[0] if table.named else "t"
    return Series((times - begin) / unit, values, scale, begin, unit, time_name)
