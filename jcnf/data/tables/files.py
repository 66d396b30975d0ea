"""Read and write tables of numbers: .csv, .csv.gz, .npy and .npz."""

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jcnf._checks import InputError, check_instance
from jcnf.data.tables.csv import read_csv, write_csv

ENDINGS = (".csv", ".csv.gz", ".npy", ".npz")


class CellError(InputError):
    """Error for cells without a finite number; `column` names their column."""

    def __init__(self, message: str, column: str):
        super().__init__(message)
        self.column = column


@dataclasses.dataclass(frozen=True, eq=False)
class RawTable:
    """All numbers of a file: float64 arrays (rows, dim) in its own units, split as in the file."""

    path: Path
    parts: dict[str, np.ndarray]  # {"rows"}, or {"train", "test"} and perhaps "val"
    columns: tuple[str, ...]  # "x1", "x2", ... if the file has no names
    named: bool  # whether the names are the file's own
    texts: dict[int, str]  # a description of the text in each column that has any, which is NaN

    def all_but(self, drop: Iterable[str | int]) -> list[int]:
        """Return the places of all columns but `drop`, given by name or 1-based number.

        **Raises:** `InputError` for unknown columns, and if none is left.
        """
        try:
            gone = set(places_of(self.columns, drop))
        except InputError as error:
            raise InputError(f"{self.path}: {error} (in drop)") from None
        if len(gone) == len(self.columns):
            raise InputError(
                f"{self.path}: drop leaves none of the {len(gone)} columns: drop fewer"
            )
        return [i for i in range(len(self.columns)) if i not in gone]

    def those_of(self, columns: Sequence[str]) -> list[int]:
        """Return the places of `columns`, in this order.

        Columns are found by name, but by place if either side has no names and their number agrees.
        Without names, a column's name is its place ("x3"), so a file that still has the columns
        that were dropped in training is read correctly.

        **Raises:** `InputError` for columns that the file does not have.
        """
        both_named = self.named and not all(c[:1] == "x" and c[1:].isdigit() for c in columns)
        if len(self.columns) == len(columns) and not both_named:
            return list(range(len(columns)))
        if missing := [name for name in columns if name not in self.columns]:
            raise InputError(
                f"{self.path}: no column {missing[0]}: the model needs the {len(columns)} columns "
                f"{', '.join(columns)}, and the file has the {len(self.columns)} "
                f"{', '.join(self.columns)}; name the columns as the model does, or put exactly "
                "these in this order"
            )
        return [self.columns.index(name) for name in columns]

    def take(self, places: Sequence[int], *, missing: bool = False) -> "RawTable":
        """Return a table of the columns at `places`, which must be finite.

        With `missing`, empty and NaN cells may be in them.

        **Raises:** `CellError` for text, infinite values, and missing ones without `missing`.
        """
        columns = tuple(self.columns[i] for i in places)
        for place, name in zip(places, columns, strict=True):
            label = f"column {place + 1}" + ("" if name == f"x{place + 1}" else f" ({name})")
            if place in self.texts:
                found = self.texts[place]
                raise CellError(
                    f"{self.path}: {label} has {found}: correct or encode it as numbers", name
                )
            for part, rows in self.parts.items():
                where = f"{self.path}: {part}" if len(self.parts) > 1 else self.path
                bad = ~np.isfinite(rows[:, place]) & ~(missing & np.isnan(rows[:, place]))
                if bad.any():
                    raise CellError(
                        f"{where}: {label} has missing or infinite values in {bad.sum()} of "
                        f"{len(bad)} rows (first: row {bad.argmax() + 1}): remove or fill them",
                        name,
                    )
        parts = {part: rows[:, places] for part, rows in self.parts.items()}
        return RawTable(self.path, parts, columns, self.named, {})


def places_of(columns: Sequence[str], wanted: Iterable[str | int]) -> list[int]:
    """Return the places of the `wanted` of the columns, given by name or 1-based number.

    **Raises:** `InputError` for an unknown column.
    """
    numbers = {str(i + 1): i for i in range(len(columns))}
    places = numbers | {name: i for i, name in enumerate(columns)}
    wanted = [str(item) for item in wanted]
    if unknown := [item for item in wanted if item not in places]:
        known = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
        raise InputError(
            f"no column {unknown[0]!r}: the columns are {known}, or by number 1 to {len(columns)}"
        )
    return [places[item] for item in wanted]


def read_raw(path: str | os.PathLike) -> RawTable:
    """Read a table whole.

    **Raises:** `InputError` for a missing or damaged file, an unknown ending and ragged rows.
    """
    check_instance((str, os.PathLike), "a path", path=path)
    path = _existing(Path(path))
    texts: dict[int, str] = {}
    if ".csv" in path.name.lower():
        rows, given, texts = read_csv(path)
        parts = {"rows": rows}
    else:
        parts, given = _read_numpy(path)
    names = _column_names(path, given, next(iter(parts.values())).shape[1])
    return RawTable(path, parts, tuple(names), given is not None, texts)


def write_rows(path: str | os.PathLike, rows: np.ndarray, columns: Sequence[str]) -> None:
    """Write rows (rows, dim) to .csv or .csv.gz with a header, .npy, or .npz (rows, columns).

    The file is written completely or not at all.

    **Raises:** `InputError` for an unknown ending, or rows without `len(columns)` columns.
    """
    path, rows = _known(Path(path)), np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        raise InputError(f"{path}: expected rows of shape (rows, {len(columns)}); got {rows.shape}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if path.suffix.lower() == ".npy":
            np.save(temporary, rows)
        elif path.suffix.lower() == ".npz":
            np.savez_compressed(temporary, rows=rows, columns=np.array(columns, dtype=str))
        else:
            write_csv(temporary, rows, columns)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of a .npy or .npz. Pickles are never read: they can run arbitrary code.

    **Raises:** `InputError` for a damaged file, and for object arrays, which are pickles.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return {"array": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except ValueError as error:
        if "Object arrays" in str(error):
            raise InputError(
                f"{path}: has an object array (mixed types or ragged rows), which is not read: "
                "save plain numbers, np.save(path, np.asarray(x, dtype=float))"
            ) from None
        raise InputError(f"{path}: is not a complete numpy file: save it again") from None
    # A damaged header can name an unknown compression, version or cipher.
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read ({error}): download or save it again") from None


def _known(path: Path) -> Path:
    if not path.name.lower().endswith(ENDINGS):
        raise InputError(f"{path}: unknown ending: use one of {', '.join(ENDINGS)}")
    return path


def _existing(path: Path) -> Path:
    if path.is_file():
        return _known(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory: give the path of a table in it")
    stems = {path.name, path.name.split(".")[0]}
    others = (path.with_name(stem + ending) for stem in stems for ending in ENDINGS)
    near = next((other for other in others if other.is_file()), None)
    hint = f"did you mean {near}?" if near else "check the path"
    raise InputError(f"{path}: no such file: {hint}")


def _column_names(path: Path, given: Sequence[str] | None, width: int) -> list[str]:
    """Return the names. A number is always a position, so that a name that is one gets an x."""
    if given is None:
        return [f"x{i + 1}" for i in range(width)]
    if len(given) != width:
        raise InputError(f"{path}: {len(given)} names for {width} columns: name each column once")
    names = [
        f"x{name}" if name.isdigit() else name or f"Unnamed: {i}"  # as pandas calls it
        for i, name in enumerate(given)
    ]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InputError(f"{path}: two columns are named '{twice[0]}': rename one of them")
    return names


def _read_numpy(path: Path) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Return the arrays (rows, dim) of a table in a .npy or .npz, and its column names."""
    arrays = load_arrays(path)
    given = arrays.pop("columns", None)
    parts = {name: _table(path, name, arrays[name]) for name in _parts(path, arrays)}
    widths = {name: part.shape[1] for name, part in parts.items()}
    if len(set(widths.values())) > 1:
        raise InputError(
            f"{path}: the parts have unequal numbers of columns, {widths}: save the same columns"
        )
    parts = parts if len(parts) > 1 else {"rows": next(iter(parts.values()))}
    return parts, None if given is None else [str(name) for name in np.ravel(given)]


def _parts(path: Path, arrays: dict[str, np.ndarray]) -> list[str]:
    """Return the names of the arrays of the table: train, val and test, or the only 2-D one."""
    if {"train", "test"} <= arrays.keys():
        return [name for name in ("train", "val", "test") if name in arrays]
    tables = [name for name, array in arrays.items() if array.ndim == 2]
    if len(tables) == 1:
        return tables
    if len(arrays) == 1:
        return list(arrays)
    found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
    raise InputError(
        f"{path}: has the arrays {found}: save arrays train and test (and val), or one 2-D array"
    )


def _table(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: the array {name} has type {array.dtype}, not real numbers: save it as float "
            "or integer"
        )
    if array.ndim not in (1, 2):
        raise InputError(
            f"{path}: the array {name} has shape {array.shape}; expected (rows, columns): "
            "save x.reshape(len(x), -1)"
        )
    return (array[:, None] if array.ndim == 1 else array).astype(np.float64)
