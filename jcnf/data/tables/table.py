"""Tables of numbers for density estimation: read, split by seed, standardized by training rows.

table = load_table("depths.csv", drop=["id"], dequantize=True)
table.train, table.val, table.test      # (rows, dim) float32, zero mean and unit variance
log_p = log_p_standardized - table.scale.log_scale    # nats, in the file's own units
"""

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Float32, Int

from jcnf._checks import InputError
from jcnf.data.tables import checks, levels
from jcnf.data.tables.files import CellError, RawTable, places_of, read_raw

Path = str | os.PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class Standardizer:
    """The map (x - mean) / std, by column, from a file's own units to the model's, and back."""

    mean: Float[np.ndarray, " dim"]  # float64, in the file's own units
    std: Float[np.ndarray, " dim"]
    columns: tuple[str, ...]

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == len(self.columns):
            raise ValueError(
                f"expected a mean and a std for each of the {len(self.columns)} columns; got "
                f"{len(self.mean)} and {len(self.std)}"
            )
        bad = ~(np.isfinite(self.mean) & np.isfinite(self.std) & (np.asarray(self.std) > 0))
        if bad.any():
            raise InputError(
                f"column {self.columns[np.argmax(bad)]} cannot be standardized: its std must be "
                "positive and finite, and its mean finite; leave the column out"
            )

    @property
    def log_scale(self) -> float:
        """Sum of log std, in nats: log p(x) = log p(standardize(x)) - log_scale."""
        return float(np.log(self.std).sum())

    def standardize(self, rows: Float[np.ndarray, "rows dim"]) -> Float32[np.ndarray, "rows dim"]:
        """Convert rows from the file's own units to the model's.

        **Raises:** `InputError` for rows of another shape, or with values that float32 cannot hold.
        """
        scaled = (self._rows(rows) - self.mean) / self.std
        beyond = np.argwhere(~(np.abs(scaled) <= np.finfo(np.float32).max))
        if len(beyond):
            row, column = beyond[0]
            raise InputError(
                f"row {row + 1}, column {self.columns[column]}: the value is NaN, or too large for "
                "float32 when standardized; remove the row, or leave out the column"
            )
        return scaled.astype(np.float32)

    def unstandardize(self, rows: Float[np.ndarray, "rows dim"]) -> Float[np.ndarray, "rows dim"]:
        """Convert standardized rows (samples of a model) to the file's own units, float64.

        **Raises:** `InputError` for rows of another shape.
        """
        return self._rows(rows) * self.std + self.mean

    def _rows(self, rows: np.ndarray) -> np.ndarray:
        try:
            rows = np.asarray(rows, np.float64)
        except (TypeError, ValueError):
            raise InputError("expected rows of numbers; got values that are not numbers") from None
        if rows.ndim != 2 or rows.shape[1] != len(self.columns):
            raise InputError(
                f"expected rows of shape (rows, {len(self.columns)}), the columns "
                f"{', '.join(self.columns[:8])}; got {rows.shape}"
            )
        return rows

    def positions(self, wanted: Iterable[str | int]) -> list[int]:
        """Return the positions, in ascending order, of columns given by name or 1-based number.

        **Raises:** `InputError` for an unknown column, or one that is named twice.
        """
        found = sorted(places_of(self.columns, wanted))
        if twice := [i for i, j in itertools.pairwise(found) if i == j]:
            raise InputError(f"column {self.columns[twice[0]]} is named twice: name it once")
        return found

    def take(self, places: Sequence[int]) -> "Standardizer":
        """Return the standardizer of the columns at `places`."""
        names = tuple(self.columns[i] for i in places)
        return Standardizer(self.mean[places], self.std[places], names)

    def to_json(self) -> dict[str, list]:
        """Return the content as lists, which `from_json` restores exactly."""
        return {"mean": list(self.mean), "std": list(self.std), "columns": list(self.columns)}

    @classmethod
    def from_json(cls, content: dict[str, list]) -> "Standardizer":
        """Return the standardizer from the output of `to_json`."""
        mean, std = np.array(content["mean"]), np.array(content["std"])
        return cls(mean, std, tuple(content["columns"]))


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table in three parts, standardized by the training part."""

    train: Float32[np.ndarray, "train dim"]
    val: Float32[np.ndarray, "val dim"]
    test: Float32[np.ndarray, "test dim"]
    scale: Standardizer
    warnings: tuple[str, ...]  # one line for each way in which the table is unsuitable

    def take(self, places: Sequence[int]) -> "Table":
        """Return a table of the columns at `places`; the warnings are those of all columns."""
        train, val, test = (part[:, places] for part in (self.train, self.val, self.test))
        return Table(train, val, test, self.scale.take(places), self.warnings)


def load_table(
    path: Path,
    *,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    drop: Iterable[str | int] = (),
    dequantize: bool = False,
) -> Table:
    """Read a table, split it, check it and standardize it by its training part.

    **Arguments:**

    - `path`: a .csv or .csv.gz (separated by commas, semicolons, tabs or blanks, with or without a
      header; # comments; needs pandas), a 2-D .npy, or an .npz. An .npz has one 2-D array or the
      arrays train and test (and val), whose split is kept (val is cut from train if it is missing),
      and may have the names of the `columns`.
    - `seed`: determines the split and the noise, by independent streams: the split depends only on
      the seed and the number of rows.
    - `val_fraction`: share of the rows (of train, for an .npz without val) in `val`.
    - `test_fraction`: share of the rows in `test`.
    - `drop`: columns to leave out, by name or by 1-based number. An index that pandas wrote as the
      first column is left out without being named.
    - `dequantize`: whether to add uniform noise, one step wide, to the columns whose values repeat,
      before the split (see `levels.jitter`). Duplicate rows become distinct, but stay in.

    **Returns:** a `Table`, whose `warnings` tell what is doubtful but not an error.

    **Raises:** `InputError` for a file that cannot be read (see `files.read_raw`), fractions that
    leave a part empty, data that no model can fit (see `checks.require_usable`), and values that
    float32 cannot hold once standardized.
    """
    raw = read_raw(path)
    places, warnings = raw.all_but(drop), []
    if checks.is_index(raw, places):
        index = raw.columns[places[0]]
        warnings = [f"{index} is left out: it is an index, which only counts the rows"]
        places = places[1:]
    try:
        raw = raw.take(places)
    except CellError as error:
        raise InputError(f"{error}, or leave the column out with drop=[{error.column!r}]") from None
    rows, columns = np.concatenate(list(raw.parts.values())), raw.columns
    train, val, test = _split(raw, seed, val_fraction, test_fraction)
    checks.require_usable(raw.path, rows[train], columns)
    steps = levels.resolutions(rows) if dequantize else None
    warnings += checks.warnings(rows, columns, steps)
    if steps is not None:
        rows = levels.jitter(rows, steps, np.random.default_rng([seed, 1]))
    scale = Standardizer(*_moments(rows[train]), columns)
    try:
        scaled = scale.standardize(rows)
    except InputError as error:
        parts = f" (of {' + '.join(raw.parts)})" if len(raw.parts) > 1 else ""
        raise InputError(f"{raw.path}{parts}: {error}") from None
    return Table(scaled[train], scaled[val], scaled[test], scale, tuple(warnings))


def read_rows(
    path: Path, columns: Sequence[str], *, missing: bool = False
) -> Float[np.ndarray, "rows dim"]:
    """Read rows to score: float64, in the file's own units, with the columns in the given order.

    A file that names its columns must have `columns` among them, in any order; in one without
    names, they are found by number. Rows are never dequantized. With `missing`, empty and NaN cells
    become NaN; otherwise they are errors.

    **Raises:** `InputError` for a file that cannot be read, or that has other columns.
    """
    raw = read_raw(path)
    raw = raw.take(raw.those_of(columns), missing=missing)
    if len(raw.parts) > 1:
        raise InputError(
            f"{raw.path}: has the parts {', '.join(raw.parts)}: save the one to score in a file "
            "with one 2-D array"
        )
    if not len(raw.parts["rows"]):
        raise InputError(f"{raw.path}: has no rows: give at least one")
    return raw.parts["rows"]


def _split(raw: RawTable, seed: int, val: float, test: float) -> tuple[np.ndarray, ...]:
    """Return the indices of the training, validation and test rows in the concatenated parts."""
    if not (val > 0 and test > 0 and val + test < 1):
        raise InputError(
            f"val_fraction={val} and test_fraction={test} leave a part empty: use positive "
            "fractions with a sum below 1"
        )
    sizes = [len(rows) for rows in raw.parts.values()]
    indices = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    given = dict(zip(raw.parts, indices, strict=True))
    rng = np.random.default_rng([seed, 0])
    if "val" in given:
        train, held, last = given["train"], given["val"], given["test"]
    elif "train" in given:
        (train, held), last = _cut(rng.permutation(given["train"]), val), given["test"]
    else:
        order = rng.permutation(given["rows"])
        rest, last = _cut(order, test)
        train, held = _cut(rest, val * len(order) / max(len(rest), 1))
    if not (len(held) and len(last)):
        raise InputError(
            f"{raw.path}: {sum(sizes)} rows are too few for a validation and a test part: add "
            "rows, or use a larger val_fraction and test_fraction"
        )
    return train, held, last


def _cut(order: Int[np.ndarray, " rows"], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split off the last `fraction` of the indices."""
    size = len(order) - round(fraction * len(order))
    return order[:size], order[size:]


def _moments(rows: Float[np.ndarray, "rows dim"]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, even if squares of its values overflow."""
    unit = np.abs(rows).max(axis=0)
    return unit * (rows / unit).mean(axis=0), unit * (rows / unit).std(axis=0)
