"""Read numbers from delimited text of any common layout; errors name the row and the column."""

import csv
import dataclasses
import gzip
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError

_MISSING = {"", "na", "n/a", "#n/a", "nan", "-nan", "null", "none", "<na>"}


class CellError(InputError):
    """Error for a cell without a finite number; `column` names its column, which may be dropped."""

    def __init__(self, message: str, column: str):
        super().__init__(message)
        self.column = column


@dataclasses.dataclass(frozen=True)
class Text:
    """The data lines of a file (no comments, blank lines or header) and their layout."""

    path: Path
    separator: str  # ",", ";", a tab, or " " for any run of spaces and tabs
    header: tuple[str, ...] | None
    width: int
    lines: tuple[str, ...]
    numbers: tuple[int, ...]  # number of each line in the file, from 1

    def rows(
        self, kept: Sequence[int], names: Sequence[str], missing: bool = False
    ) -> Float[np.ndarray, "rows kept"]:
        """Return the columns at the positions `kept` as float64; `names` has all `width` names.

        With `missing`, missing values become NaN.

        **Raises:** `InputError` for rows of unequal length; `CellError` for text and infinite
        values in `kept`, and for missing values without `missing`.
        """
        self._require_equal_lengths()
        blanks = self.separator == " "
        layout = {"delimiter": None if blanks else self.separator, "quotechar": '"'}
        try:
            rows = np.loadtxt(self.lines, usecols=kept, comments=None, ndmin=2, **layout)
        except ValueError:
            return self._rows_one_by_one(kept, names, missing)
        if np.isfinite(rows).all():
            return rows
        return self._rows_one_by_one(kept, names, missing)

    def _require_equal_lengths(self) -> None:
        for row, line in enumerate(self.lines):
            if (length := _length(line, self.separator)) != self.width:
                raise InputError(
                    f"{self.path}: row {row + 1} (line {self.numbers[row]}) has {length} cells, "
                    f"expected {self.width}: every row needs one cell per column"
                )

    def _rows_one_by_one(
        self, kept: Sequence[int], names: Sequence[str], missing: bool
    ) -> np.ndarray:
        """Read slowly what `np.loadtxt` cannot read, and raise an error for the first bad cell."""
        rows = np.empty((len(self.lines), len(kept)))
        bad = []
        for row, line in enumerate(self.lines):
            cells = cells_of(line, self.separator)
            for place, column in enumerate(kept):
                where = f"row {row + 1} (line {self.numbers[row]}), {label(column, names)}"
                rows[row, place] = value = _number(cells[column])
                if np.isfinite(value):
                    continue
                if not _is_missing(cells[column]) and np.isnan(value):
                    raise CellError(
                        f"{self.path}: {where} holds the text {cells[column][:40]!r}: make it a "
                        "number",
                        names[column],
                    )
                if not (missing and _is_missing(cells[column])):
                    bad.append((where, cells[column], names[column]))
        if bad:
            raise missing_error(self.path, *bad[0], count=len(bad))
        return rows


def read_text(path: Path) -> Text:
    """Open a .csv or .csv.gz and detect its layout; `Text.rows` then reads the numbers.

    **Raises:** `InputError` for a file that is damaged, is not UTF-8 text, or has no data rows.
    """
    numbered = [
        (number, line.strip(" \n"))
        for number, line in enumerate(_read_lines(path), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not numbered:
        raise InputError(f"{path}: has no rows: a table needs one row per line")
    numbers, lines = zip(*numbered, strict=True)
    separator = _separator(lines[min(1, len(lines) - 1)])
    head = cells_of(lines[0], separator)
    named = _is_header(head, cells_of(lines[1], separator) if len(lines) > 1 else [])
    numbers, lines = numbers[named:], lines[named:]
    if not lines:
        raise InputError(f"{path}: has a header but no rows: a table needs one row per line")
    if separator != " " and all(line.endswith(separator) for line in lines):
        lines = tuple(line[:-1] for line in lines)
        head = head if head[-1] else head[:-1]
    width = _length(lines[0], separator)
    if len(head) != width:
        raise InputError(
            f"{path}: the header has {len(head)} names, but the row below it (line {numbers[0]}) "
            f"has {width} cells: give every column one name"
        )
    return Text(path, separator, tuple(head) if named else None, width, lines, numbers)


def label(position: int, names: Sequence[str]) -> str:
    """Return a column as messages name it: "column 3", with its name if the file has one."""
    name = names[position]
    return f"column {position + 1}" + ("" if name == f"x{position + 1}" else f" ({name})")


def missing_error(path: Path, where: str, found: str, name: str, count: int) -> CellError:
    """Return the error for an empty, NaN or infinite cell, the first of `count` such cells."""
    what = f"'{found}' is not a finite number" if found else "is an empty cell"
    message = f"{path}: {where}: {what} ({count} in total): remove or fill those rows"
    return CellError(message, name)


def cells_of(line: str, separator: str) -> list[str]:
    """Return the cells of one line without quotes and surrounding spaces."""
    text = " ".join(line.split()) if separator == " " else line
    cells = next(csv.reader([text], delimiter=separator, skipinitialspace=True))
    return [cell.strip() for cell in cells]


def _read_lines(path: Path) -> list[str]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return list(file)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text: save the table as UTF-8 csv") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): download or save it again") from None


def _separator(line: str) -> str:
    return next((candidate for candidate in (";", "\t", ",") if candidate in line), " ")


def _length(line: str, separator: str) -> int:
    if '"' in line:
        return len(cells_of(line, separator))
    return len(line.split()) if separator == " " else line.count(separator) + 1


def _number(cell: str) -> float:
    """Return the number in a cell, or NaN if there is none."""
    try:
        return np.nan if "_" in cell else float(cell)
    except ValueError:
        return np.nan


def _is_missing(cell: str) -> bool:
    return cell.lower() in _MISSING


def _is_text(cell: str) -> bool:
    return bool(np.isnan(_number(cell))) and not _is_missing(cell)


def _is_header(first: Sequence[str], second: Iterable[str]) -> bool:
    """Decide if the first line names the columns.

    In a header, at least half of the cells are text, and at least one is above a number. So the
    first row of a column of text, or a typo in a first row of numbers, is not taken for a header
    and lost.
    """
    texts = [_is_text(cell) for cell in first]
    below = [not _is_text(cell) for cell in second] or [True] * len(texts)
    over_number = any(text and number for text, number in zip(texts, below, strict=False))
    return over_number and 2 * sum(texts) >= sum(cell != "" for cell in first)
