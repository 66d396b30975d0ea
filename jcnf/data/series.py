"""Series in time for neural ODEs: two spirals of known motion, and a person's own table."""

import dataclasses
import os
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError, check_int, check_number
from jcnf.data.tables import Standardizer, all_but, read_raw

Path = str | os.PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """Observations in the order of time, in the model's units; float64."""

    times: Float[np.ndarray, " n"]  # from 0 on, strictly increasing
    values: Float[np.ndarray, "n dim"]
    scale: Standardizer  # to the file's units of the values
    begin: float  # the file's time at 0, and how much of it is a unit of `times`
    unit: float
    time_name: str = "t"
    # the true motion at increasing times from 0 on, (times,) -> (times, dim), where it is known
    truth: Callable[[np.ndarray], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """A motion dz/dt = velocity(z) from `start`, from t = 0 to `end`."""

    velocity: Callable[[np.ndarray], np.ndarray]
    start: tuple[float, ...]
    end: float

    def __call__(self, times: Float[np.ndarray, " times"]) -> Float[np.ndarray, "times dim"]:
        """Its states at increasing times from 0 on, to 1e-9."""
        from scipy.integrate import solve_ivp

        span, start = (0.0, max(self.end, times[-1])), np.array(self.start)
        settings = {"method": "DOP853", "rtol": 1e-10, "atol": 1e-10}
        return solve_ivp(lambda t, z: self.velocity(z), span, start, t_eval=times, **settings).y.T


_LINEAR = np.array([[-0.1, -1.0], [1.0, -0.1]])
_CUBIC = np.array([[-0.1, 2.0], [-2.0, -0.1]])
TARGETS = {
    # dz/dt = W z: a turn takes 2 pi, and the radius falls as exp(-0.1 t)
    "linear": Target(lambda z: _LINEAR @ z, (0.6, 0.3), 31.45),
    # dz/dt = W' z^3, of each component (torchdiffeq's demo, Chen et al. 2018; there from (2, 0)):
    # it slows down as it shrinks
    "cubic": Target(lambda z: z**3 @ _CUBIC, (1.0, 0.0), 31.45),
}


def spiral(
    name: str, *, points: int = 200, noise: float = 0.01, irregular: bool = False, seed: int = 0
) -> Series:
    """A target of `TARGETS`, observed at `points` times with normal noise of that deviation.

    The times are evenly spaced from 0 to the end; `irregular` ones are uniform between these two.

    **Raises:** `InputError` for an unknown name, `ValueError` for numbers out of range.
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
    """A table whose first column is the time, and the others values, which are standardised.

    `unit` is the file's time that is a unit of `Series.times`; by default that in which a
    standardised value moves by 1, root mean square, so that the velocity is of the order of 1. The
    last `held_out` rows have no part in any of that.

    **Raises:** `InputError` as `jcnf.data.tables.load_table` does for what is no table of numbers,
    for times that do not increase, for a constant column, and for fewer than 3 rows or 2 columns.
    """
    table = read_raw(path, all_but(()))
    if set(table.parts) != {"rows"}:
        raise InputError(f"{path}: a series is one table, not parts of one")
    rows = table.parts["rows"]
    if len(rows) < 3 or rows.shape[1] < 2:
        raise InputError(
            f"{path}: expected a column of times, one of values or more, and at least 3 rows; "
            f"got {rows.shape[1]} columns and {len(rows)} rows"
        )
    times, values, names = rows[:, 0], rows[:, 1:], table.columns[1:]
    if not np.all(np.diff(times) > 0):
        row = int(np.argmin(np.diff(times) > 0)) + 2
        raise InputError(
            f"{path}: the first column is the time and must increase; row {row} has "
            f"{times[row - 1]:g} after {times[row - 2]:g}: sort the rows, and put the time first"
        )
    if len(rows) - held_out < 3:
        raise InputError(f"{path}: {held_out} rows held out leave fewer than 3 of {len(rows)}")
    known = slice(len(rows) - held_out)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, stds = values[known].mean(axis=0), values[known].std(axis=0)
    for name, column, std in zip(names, values[known].T, stds, strict=True):
        if np.all(column == column[0]):
            raise InputError(f"{path}: column {name} is constant: leave it out")
        if not 0 < std < np.inf:
            raise InputError(f"{path}: column {name} cannot be standardised: change its unit")
    scale = Standardizer(mean, stds, names)
    values = (values - scale.mean) / scale.std
    if unit is None:
        speeds = np.diff(values[known], axis=0) / np.diff(times[known])[:, None]
        speed = float(np.sqrt(np.mean(speeds**2)))
        if not 0 < speed < np.inf:
            raise InputError(f"{path}: nothing moves in these times: give --time-unit, or others")
        unit = 1 / speed
    begin, time_name = float(times[0]), table.columns[0] if table.named else "t"
    return Series((times - begin) / unit, values, scale, begin, unit, time_name)
