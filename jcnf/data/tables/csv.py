"""Read .csv files with pandas: find the separator and the header, and say where text is."""

import gzip
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError


def read_csv(
    path: Path,
) -> tuple[Float[np.ndarray, "rows width"], list[str] | None, dict[int, str]]:
    """Return the numbers of a .csv or .csv.gz, the names in its header (or None), and its texts.

    Cells are separated by commas, semicolons, tabs or blanks; lines that start with # are comments.
    Empty cells, those that a short row lacks at its end, pandas' words for missing values, and
    texts become NaN. The third value maps the position of each column with text to a description.

    **Raises:** `InputError` for a file that is damaged, is not UTF-8 text, has a row that is longer
    than the first, or has no rows; and without pandas.
    """
    pandas = _pandas(path)
    lines = [line.strip(" \n") for line in _lines(path)]
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise InputError(f"{path}: has no rows: a table needs one row per line")
    separator = next((mark for mark in ";\t," if mark in lines[min(1, len(lines) - 1)]), r"\s+")
    if all(line.endswith(separator) for line in lines[1:]):
        lines = [line.removesuffix(separator) for line in lines]
    layout = {"sep": separator, "header": None, "skipinitialspace": True}

    def parse(**options):
        return pandas.read_csv(io.StringIO("\n".join(lines)), **layout, **options)

    def numbers(frame):
        return frame.apply(pandas.to_numeric, errors="coerce")

    try:
        top = parse(nrows=2, dtype=str)
        named = _is_header(top.notna().to_numpy(), numbers(top).notna().to_numpy())
        named = named or _is_numbering(*top.fillna("").to_numpy().tolist())
        if named and len(lines) == 1:
            raise InputError(f"{path}: has a header but no rows: a table needs one row per line")
        cells = parse(skiprows=int(named), low_memory=False)
    except pandas.errors.ParserError as error:
        raise InputError(f"{path}: {_in_words(error)}") from None
    rows = numbers(cells)
    texts = {}
    for column in np.flatnonzero((cells.notna() & rows.isna()).any()).tolist():
        found = cells[column][cells[column].notna() & rows[column].isna()]
        texts[column] = (
            f"text in {len(found)} of {len(rows)} rows (first: row {found.index[0] + 1}, "
            f"{str(found.iloc[0])[:40]!r})"
        )
    header = [name.strip() for name in top.iloc[0].fillna("")] if named else None
    return rows.to_numpy(np.float64), header, texts


def write_csv(path: Path, rows: Float[np.ndarray, "rows width"], columns: Sequence[str]) -> None:
    """Write rows below a header, each number with the fewest digits that read back the same.

    **Raises:** `InputError` without pandas.
    """
    _pandas(path).DataFrame(rows, columns=list(columns)).to_csv(path, index=False, na_rep="nan")


def _pandas(path: Path) -> Any:
    try:
        import pandas
    except ImportError:
        raise InputError(f"{path}: a .csv needs pandas: pip install 'jcnf[tables]'") from None
    return pandas


def _lines(path: Path) -> list[str]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return list(file)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text: save the table as UTF-8 csv") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): download or save it again") from None


def _is_header(filled: np.ndarray, number: np.ndarray) -> bool:
    """Decide from the first two lines, (lines, width), if the first names the columns.

    In a header, at least half of the cells are text, and at least one is above a number. So the
    first row of a column of text, or a typo in a first row of numbers, is not taken for a header
    and lost.
    """
    text = filled & ~number
    above_number = text[0] & ~text[1] if len(text) > 1 else text[0]
    return bool(above_number.any() and 2 * text[0].sum() >= filled[0].sum())


def _is_numbering(first: list[str], second: Sequence[str] = ()) -> bool:
    """Whether the first line has 0, 1, ... above decimals: pandas' names of unnamed columns.

    It is blank above the index that pandas writes beside them.
    """
    numbers = first[int(first[0] == "") :]
    counts = len(numbers) > 1 and numbers == [str(i) for i in range(len(numbers))]
    return counts and any("." in cell for cell in second)


def _in_words(error: Exception) -> str:
    """Return what pandas says of rows of unequal length, or else its own words."""
    if match := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error)):
        expected, line, found = match.groups()
        return (
            f"line {line}, without blank lines and comments, has {found} cells, but the first has "
            f"{expected}: every row needs one cell per column"
        )
    return f"cannot be read ({' '.join(str(error).split())}): save the table again"
