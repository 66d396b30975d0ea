"""Read and write tables of numbers: .csv, .csv.gz, .npy and .npz."""

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
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
    """The numbers of a file: float64 arrays (rows, dim) in its own units, split as in the file."""

    path: Path
    parts: dict[str, np.ndarray]  # {"rows"}, or {"train", "test"} and perhaps "val"
    columns: tuple[str, ...]  # of the kept columns; "x1", "x2", ... if the file has no names
    named: bool  # whether the names are the file's own


# From a file's path, its column names, and whether they are its own: positions of columns to read.
Choose = Callable[[Path, Sequence[str], bool], list[int]]


def read_raw(path: str | os.PathLike, choose: Choose, *, missing: bool = False) -> RawTable:
    """Read the columns that `choose` picks; with `missing`, empty and NaN cells become NaN.

    **Raises:** `InputError` for a missing or damaged file, an unknown ending and ragged rows;
    `CellError` for text and infinite values in the columns that are read, and for missing ones
    without `missing`; whatever `choose` raises.
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
    kept = choose(path, names, given is not None)
    columns = tuple(names[i] for i in kept)
    labels = [_label(i, names[i]) for i in kept]
    if text := [place for place, i in enumerate(kept) if i in texts]:
        raise CellError(
            f"{path}: {labels[text[0]]} has {texts[kept[text[0]]]}: correct or encode it as "
            "numbers",
            columns[text[0]],
        )
    parts = {part: rows[:, kept].astype(np.float64) for part, rows in parts.items()}
    for part, rows in parts.items():
        where = f"{path}: {part}" if len(parts) > 1 else str(path)
        _require_finite(where, rows, labels, columns, missing)
    return RawTable(path, parts, columns, given is not None)


def all_but(drop: Iterable[str | int]) -> Choose:
    """Return a choice of all columns but `drop`, given by name or 1-based number."""
    drop = [str(item) for item in drop]

    def choose(path: Path, names: Sequence[str], named: bool) -> list[int]:
        numbers = {str(i + 1): i for i in range(len(names))}
        places = numbers | {name: i for i, name in enumerate(names)}
        if unknown := [item for item in drop if item not in places]:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise InputError(
                f"{path}: no column {unknown[0]!r} to drop: the columns are {known}, or by number "
                f"1 to {len(names)}"
            )
        gone = {places[item] for item in drop}
        if len(gone) == len(names):
            raise InputError(f"{path}: drop leaves none of the {len(names)} columns: drop fewer")
        return [i for i in range(len(names)) if i not in gone]

    return choose


def those_of(columns: Sequence[str]) -> Choose:
    """Return a choice of these columns, in this order.

    Columns are found by name, but by position if either side has no names and their number agrees.
    Without names, a column's name is its position ("x3"), so a file that still has the columns that
    were dropped in training is read correctly.
    """

    def choose(path: Path, names: Sequence[str], named: bool) -> list[int]:
        both_named = named and not all(name[:1] == "x" and name[1:].isdigit() for name in columns)
        if len(names) == len(columns) and not both_named:
            return list(range(len(names)))
        if missing := [name for name in columns if name not in names]:
            raise InputError(
                f"{path}: no column {missing[0]}: the model needs the {len(columns)} columns "
                f"{', '.join(columns)}, and the file has the {len(names)} {', '.join(names)}; name "
                "the columns as the model does, or put exactly these in this order"
            )
        return [list(names).index(name) for name in columns]

    return choose


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


def _label(position: int, name: str) -> str:
    """Return a column as messages name it: "column 3", with its name if the file has one."""
    return f"column {position + 1}" + ("" if name == f"x{position + 1}" else f" ({name})")


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
    return array[:, None] if array.ndim == 1 else array


def _require_finite(
    where: str, rows: np.ndarray, labels: Sequence[str], columns: Sequence[str], missing: bool
) -> None:
    bad = np.isinf(rows) if missing else ~np.isfinite(rows)
    if bad.any():
        place = int(bad.any(axis=0).argmax())
        some = np.flatnonzero(bad[:, place])
        what = "infinite values" if missing else "missing or infinite values"
        raise CellError(
            f"{where}: {labels[place]} has {what} in {len(some)} of {len(rows)} rows (first: row "
            f"{some[0] + 1}): remove or fill those rows",
            columns[place],
        )
