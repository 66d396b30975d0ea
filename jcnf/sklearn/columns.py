"""Choose the support and the transform of each column of a table from its values."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from scipy.special import ndtr, ndtri
from scipy.stats import norm

from jcnf._checks import InputError
from jcnf.data.tables.levels import Levels
from jcnf.evaluate import standard_error
from jcnf.flows import Columns

BINS = (4, 8, 16, 32, 64, 128)  # that a column's spline may have
TAIL_INDICES = (0.1, 0.5, 1.0)
EXPONENTIAL = 0.02  # tail index of columns with a bound, whose logarithms are modeled
MIN_ROWS_PER_BIN = 8
# Nats a row by which a spline must beat a normal distribution. A uniform column gains 0.176, and is
# better left to the flow, so that a spline must gain more for certain, by two standard errors;
# logarithms that open a support do not give a column its true shape.
MIN_GAIN, MIN_GAIN_OPENED, DOUBT = 0.18, 0.01, 2.0
FOLDS = 5
MAX_ROWS = 5000  # that choose the number of bins; all rows fit the spline
MIN_BIN_WIDTH = 1e-6  # relative to the range
MAX_UNREPEATED = 0.5  # distinct values per row; with fewer, a column is rounded
PILE, MIN_PILE = 0.01, 5  # share and number of rows at the largest value that make it a bound


@dataclasses.dataclass(frozen=True)
class Column:
    """The support of one column. Samples never leave it.

    **Arguments:**

    - `lower`, `upper`: bounds of the values, which may be infinite.
    - `step`: distance between the values of a column of whole or rounded numbers; 0 for others.
      Uniform noise of this width is added to the values when they are learned, and samples are
      rounded. The probability of a value is at least its density times the step, on average.
    - `margin`: the density is learned on an interval that is wider by this, at each bound, because
      the logarithm that keeps samples inside has no value at a bound itself. Samples in the margin
      are returned as the bound. It is chosen if values are at a bound; leave it 0.
    - `circular`: whether `lower` and `upper` are the same point, as for angles. The density is then
      the same at both, and smooth there.

    **Raises:** `ValueError` for bounds in the wrong order, a circular column without bounds, and a
    step or a margin that is negative.
    """

    lower: float = -math.inf
    upper: float = math.inf
    step: float = 0.0
    circular: bool = False
    margin: float = 0.0

    def __post_init__(self):
        if not self.lower < self.upper:
            raise ValueError(f"expected lower < upper; got {self.lower} and {self.upper}")
        if self.circular and not (math.isfinite(self.lower) and math.isfinite(self.upper)):
            raise ValueError("a circular column needs both bounds, such as lower=0, upper=360")
        if not 0 <= self.step < math.inf:
            raise ValueError(f"step must be at least 0 and finite; got {self.step}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin must be at least 0 and finite; got {self.margin}")

    def __str__(self) -> str:
        words = {0.0: [], 1.0: ["whole"]}.get(self.step, [f"in steps of {self.step:g}"])
        low, high = math.isfinite(self.lower), math.isfinite(self.upper)
        words += ["circular"] if self.circular else []
        if low and high:
            words.append(f"from {self.lower:g} to {self.upper:g}")
        elif low:
            words.append("positive" if self.lower == 0 else f"above {self.lower:g}")
        elif high:
            words.append(f"below {self.upper:g}")
        return ", ".join(words) or "unbounded"

    @property
    def cells(self) -> "Column":
        """The support of the values with their noise and margin."""
        if self.circular:
            return Column(*self.bounds, circular=True)
        beyond = self.step / 2 + self.margin
        return Column(self.lower - beyond, self.upper + beyond)

    def contains(self, x: Float[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return which values are inside the support; all points are on a circle."""
        if self.step or self.margin:
            return ((x >= self.lower) & (x <= self.upper)) | self.circular
        return ((x > self.lower) & (x < self.upper)) | self.circular

    def finish(self, x: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """Return samples rounded to the steps, and inside the bounds."""
        if self.step:
            origin = next((b for b in self.bounds if math.isfinite(b)), 0.0)
            x = np.clip(origin + self.step * np.round((x - origin) / self.step), *self.bounds)
            x = np.where(self.circular & (x == self.upper), self.lower, x)
            return np.round(x, 12)
        lower, upper = np.array(self.bounds, x.dtype)
        if self.margin:
            return np.clip(x, lower, upper)
        return np.clip(x, np.nextafter(lower, upper), np.nextafter(upper, lower))

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds."""
        return self.lower, self.upper


NAMED = {"unbounded": Column(), "positive": Column(0.0), "whole": Column(step=1.0)}


def choose(x: Float[np.ndarray, " n"]) -> Column:
    """Return the support of a column, by its values alone.

    1. It is whole if all values are whole numbers, and rounded if more than half of the values
       repeat; the step is then a power of ten that divides them all, if there is one.
    2. It is between 0 and 1 if all values are, and they come within a tenth of both.
    3. It is positive if no value is negative.
    4. It has its largest value as a bound if it has steps, and 1 % of the rows, and 5, are there.
       A column of zeros and ones has the bound 1.
    """
    step, low, high = _step(x), float(x.min()), float(x.max())
    if not step and low >= 0 and high <= 1 and low < 0.1 and high > 0.9:
        return _with_margin(Column(0.0, 1.0), x)
    piled = step and np.sum(x == high) >= max(PILE * len(x), MIN_PILE)
    piled = piled or ((x == 0) | (x == 1)).all()
    if low < 0:
        return Column(upper=high if piled else math.inf, step=step)
    return _with_margin(Column(0.0, high if piled else math.inf, step), x)


def _with_margin(support, x):
    """Return the support, with half of the smallest distance as margin if values are at bounds."""
    at = [bound for bound in support.bounds if (x == bound).any()]
    if support.step or support.circular or not at:
        return support
    distance = np.min(np.abs(x[None] - np.array(at)[:, None]), axis=0)
    return dataclasses.replace(
        support, margin=0.5 * float(np.min(distance, where=distance > 0, initial=1.0))
    )


def _step(x):
    if (x == np.round(x)).all():
        return 1.0
    levels = Levels.of(x)
    if levels.variety > MAX_UNREPEATED and levels.largest_atom() is None:
        return 0.0
    for digits in range(1, 7):
        if np.allclose(x * 10**digits, np.round(x * 10**digits), rtol=1e-9, atol=1e-6):
            return 10.0**-digits
    return levels.step


def resolve(
    names: Sequence[str], rows: Float[np.ndarray, "n dim"], given: Mapping[Any, Any] | None
) -> list[Column]:
    """Return the support of each column: as given, by name or number from 0, or by `choose`.

    **Raises:** `InputError` for unknown columns and for values outside the bounds that were given.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise InputError(
            "columns must map names or numbers to 'unbounded', 'positive', 'whole', a pair of "
            f"bounds or a jcnf.sklearn.Column; got {given!r}"
        )
    places = {name: i for i, name in enumerate(names)} | {i: i for i in range(len(names))}
    chosen: dict[int, Column] = {}
    for name, support in given.items():
        if name not in places:
            raise InputError(f"no column {name!r} (in columns): the columns are {_some(names)}")
        chosen[places[name]] = _column(names[places[name]], support, rows[:, places[name]])
    return [chosen[i] if i in chosen else choose(x) for i, x in enumerate(rows.T)]


def _column(name, support, x):
    if isinstance(support, str) and support in NAMED:
        support = NAMED[support]
    elif isinstance(support, tuple | list) and len(support) == 2:
        try:
            support = Column(float(support[0]), float(support[1]))
        except (TypeError, ValueError) as error:
            raise InputError(f"column {name}: bounds {support!r}: {error}") from error
    if not isinstance(support, Column):
        raise InputError(
            f"column {name} must be 'unbounded', 'positive', 'whole', a pair of bounds or a "
            f"jcnf.sklearn.Column; got {support!r}"
        )
    outside = ((x < support.lower) | (x > support.upper)) & (not support.circular)
    advice = "give wider bounds, or remove the row"
    if support.step and not outside.any():
        outside = np.abs(support.finish(x) - x) > 1e-6 * support.step + 1e-9 * np.abs(x)
        outside &= not support.circular
        advice = "give the step between its values, as Column(step=...)"
    if outside.any():
        raise InputError(
            f"column {name} is said to be {support}, but has {x[outside][0]:g} in row "
            f"{int(np.flatnonzero(outside)[0])}: {advice}"
        )
    return _with_margin(support, x)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(str, names[:12])) + (", ..." if len(names) > 12 else "")


def fit_columns(
    rows: Float[np.ndarray, "n dim"], supports: Sequence[Column], seed: int = 0
) -> Columns:
    """Return the transform of columns whose noise has been added, in the precision of jax.

    A column gets a spline if one beats a normal distribution in 5-fold cross-validation, by 0.18
    nats a row and two standard errors of the difference; for a column with a bound, by 0.01. The
    number of bins and the tails are those that do best there. Circular columns get none.
    """
    rng = np.random.default_rng(seed)
    maps = [_fit(x, support.cells, rng) for x, support in zip(rows.T, supports, strict=True)]
    most = max(2, *(len(one.u) for one in maps))
    unused = {"u": [0.0, 1.0], "z": [0.0, 1.0], "slope": [1.0, 1.0]}

    def padded(name):
        values = [getattr(one, name) if len(one.u) else np.array(unused[name]) for one in maps]
        return np.array([np.pad(v, (0, most - len(v)), constant_values=np.inf) for v in values])

    def stacked(name):
        return jnp.asarray(np.array([getattr(one, name) for one in maps], np.float64), float)

    scalars = ("lower", "upper", "turn", "loc", "scale", "log_mass", "tail_scale", "tail_index")
    return Columns(
        **{name: stacked(name) for name in scalars},
        **{name: jnp.asarray(padded(name), float) for name in ("u", "z", "slope")},
        knots=jnp.asarray([len(one.u) for one in maps], jnp.int32),
    )


@dataclasses.dataclass(frozen=True)
class _Map:
    """One column of `Columns`."""

    lower: float
    upper: float
    turn: float
    loc: float
    scale: float
    u: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    z: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    slope: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    log_mass: tuple[float, float] = (0.0, 0.0)
    tail_scale: tuple[float, float] = (1.0, 1.0)
    tail_index: tuple[float, float] = (1.0, 1.0)


def _fit(x, support, rng):
    if support.circular:
        return _Map(support.lower, support.upper, _cut(x, support), 0.0, 1.0)
    y = _open(x, support)
    loc, scale = float(y.mean()), float(y.std())
    start = _Map(support.lower, support.upper, 0.0, loc, scale)
    u = (y - loc) / scale
    bins, index = _choose_bins(u, support, rng)
    return dataclasses.replace(start, **_spline(u, bins, index)) if bins else start


def _open(x, support):
    low, high = math.isfinite(support.lower), math.isfinite(support.upper)
    if not (low or high):
        return x
    y = np.log(x - support.lower) if low else np.zeros_like(x)
    return y - np.log(support.upper - x) if high else y


def _cut(x, support):
    """Return where Gaussian mixtures may cut the circle.

    It is in the middle of the emptiest of 36 sectors, or of the widest gap.
    """
    period = support.upper - support.lower
    turned = np.sort((x - support.lower) % period)
    sectors = np.histogram(turned, bins=36, range=(0, period))[0]
    if sectors.min():
        return (np.argmin(sectors) + 0.5) * period / 36
    gaps = np.diff(np.append(turned, turned[0] + period))
    # A turn of 0 would say that the column is not a circle.
    return float((turned[np.argmax(gaps)] + gaps.max() / 2) % period) or period


def _choose_bins(u, support, rng):
    """Return the number of bins, 0 for none, and the tail index that do best on held-out rows."""
    some = rng.permutation(len(u))[:MAX_ROWS]
    u, opened = u[some], math.isfinite(support.lower) or math.isfinite(support.upper)
    indices = (EXPONENTIAL,) if opened else TAIL_INDICES
    candidates = [(b, i) for b in BINS if len(u) >= b * MIN_ROWS_PER_BIN for i in indices]
    if len(u) < 2 * FOLDS or not candidates:
        return 0, 1.0
    folds = np.arange(len(u)) % FOLDS
    parts = [(u[folds != fold], u[folds == fold]) for fold in range(FOLDS)]
    normal = np.concatenate([norm.logpdf(v, k.mean(), max(k.std(), 1e-300)) for k, v in parts])
    gains = {}
    for bins, index in candidates:
        found = [_log_density(v, **_spline(kept, bins, index)) for kept, v in parts]
        gains[bins, index] = np.concatenate(found) - normal
    best = max(gains, key=lambda candidate: gains[candidate].mean())
    least = MIN_GAIN_OPENED if opened else MIN_GAIN
    if not opened:
        least += DOUBT * standard_error(gains[best])
    return best if gains[best].mean() > least else (0, 1.0)


def _spline(u, bins, index):
    """Return the knots between quantiles of `u` and normal ones, and the tails beyond."""
    # Bins of equal mass, of which the outermost are halved as long as they have rows enough.
    masses = [0.5 / bins]
    while masses[-1] * len(u) >= 2 * MIN_ROWS_PER_BIN:
        masses.append(masses[-1] / 2)
    inner = np.arange(1, bins) / bins
    outer = np.array(masses[::-1])
    p = np.concatenate([outer, inner, 1 - outer[::-1]])
    u = np.sort(u)
    ends = np.interp(p * len(u) - 0.5, np.arange(len(u)), u)
    # Knots must be apart: repeated values would make a slope infinite.
    least, kept = MIN_BIN_WIDTH * (u[-1] - u[0]), [0]
    for place in range(1, len(ends)):
        if ends[place] - ends[kept[-1]] > least:
            kept.append(place)
    knots, z = ends[kept], ndtri(p[kept])
    mass = ndtr(z[0]), ndtr(-z[-1])
    scale = (
        _tail_scale(knots[0] - u[u < knots[0]], index, least),
        _tail_scale(u[u > knots[-1]] - knots[-1], index, least),
    )
    # The density is continuous where the tails begin.
    first, last = (m / s / norm.pdf(e) for m, s, e in zip(mass, scale, z[[0, -1]], strict=True))
    slopes = np.diff(z) / np.diff(knots)
    slope = np.concatenate([[first], np.sqrt(slopes[1:] * slopes[:-1]), [last]])
    return {
        "u": knots,
        "z": z,
        "slope": slope,
        "log_mass": tuple(np.log(mass)),
        "tail_scale": scale,
        "tail_index": (index, index),
    }


def _tail_scale(excess, index, least):
    """Return the scale of the generalized Pareto distribution with the median of the excesses."""
    median = float(np.median(excess)) if len(excess) else 0.0
    return max(median * index / math.expm1(index * math.log(2)), least)


def _log_density(v, u, z, slope, log_mass, tail_scale, tail_index):
    """Return the log-density of values by a spline, as `jcnf.flows.Columns` computes it."""
    k = np.clip(np.searchsorted(u, v, side="right") - 1, 0, len(u) - 2)
    width, height = u[k + 1] - u[k], z[k + 1] - z[k]
    mean, share = height / width, np.clip((v - u[k]) / width, 0, 1)
    product = share * (1 - share)
    bottom = mean + (slope[k + 1] + slope[k] - 2 * mean) * product
    value = z[k] + height * (mean * share**2 + slope[k] * product) / bottom
    top = slope[k + 1] * share**2 + 2 * mean * product + slope[k] * (1 - share) ** 2
    found = norm.logpdf(value) + np.log(mean**2 * top / bottom**2)
    for side, sign, end in ((0, -1, u[0]), (1, 1, u[-1])):
        excess = np.maximum(sign * (v - end), 0)
        growth = np.log1p(tail_index[side] * excess / tail_scale[side])
        tail = log_mass[side] - growth * (1 + 1 / tail_index[side]) - np.log(tail_scale[side])
        found = np.where(sign * (v - end) > 0, tail, found)
    return found
