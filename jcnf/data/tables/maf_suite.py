"""The five tables of the MAF suite, preprocessed as published, so that NLLs can be compared.

table = load_maf_suite("power", "data")    # the folder that data.tar.gz unpacks to
table.train, table.val, table.test         # (rows, dim) float32, in the space of published NLLs

The preprocessing is that of Papamakarios, Pavlakou & Murray 2017 (Masked Autoregressive Flow,
arXiv:1705.07057), by the code of its data sets (github.com/gpapamak/maf, datasets/), which FFJORD
and Neural Spline Flows kept. What it leaves:

    name       dim       train        val       test
    power        6   1,659,917    184,435    204,928
    gas          8     852,174     94,685    105,206
    hepmass     21     315,123     35,013    174,987
    miniboone   43      29,556      3,284      3,648
    bsds300     63   1,000,000     50,000    250,000
"""

import contextlib
import dataclasses
import difflib
import gzip
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jcnf._checks import InputError
from jcnf.data.tables.table import Standardizer, Table

__all__ = ["MAF_SUITE", "load_maf_suite"]

_SEED = 42
_CORRELATED = 0.98  # of two GAS columns above it, the first goes
_REPEATS = 5  # of a HEPMASS column's smallest value; with more of them the column goes
_GAS_ROWS = (
    "gas: the published rows are a random quarter of UCI's whose seed is not known, and these are "
    "another: NLLs compare up to sampling error"
)
_SIGNALS = (350_136, 174_987)  # events of HEPMASS read from its training and test file

Rows = Float[np.ndarray, "rows dim"]


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a data set's files are, and what makes a table of them."""

    folder: str  # in the archive of the MAF authors
    files: tuple[str, ...]
    origin: str  # where a person gets them
    load: Callable[..., Table]  # from the paths of `files`


def load_maf_suite(name: str, folder: str | os.PathLike) -> Table:
    """Read one of the five data sets and preprocess it as Papamakarios et al. 2017 did.

    A tenth of the rows is int(0.1 * rows), cut from the end; standardizing is by column.

    - power: rows shuffled by numpy's RandomState(42); columns 2 (reactive power) and 4 (intensity)
      of data.npy dropped; uniform noise from the same stream, first [0, 0.01) on the voltage, then
      [0, 0.001) on the active power, then [0, 1) on the three sub-meterings, none on the time;
      test the last tenth, val the last tenth of the rest; standardized by train and val.
    - gas: time and the two concentrations dropped, then of the sensors, from the first on, each
      that has a correlation above 0.98 with one after it; standardized by all rows, test included
      (std with rows - 1); test and val as for power. The published rows are a quarter of UCI's,
      drawn without a published seed: here RandomState(42) draws one of the same size, so that NLLs
      agree with published ones up to sampling error, and are not of the same rows.
    - hepmass: signal events alone (label 1), the label and whatever follows the 27th feature (the
      published test file has a column too many) dropped; then columns dropped whose smallest value
      occurs more than 5 times in the training file; standardized by the training file (train and
      val; std with rows - 1); val the last tenth of it. UCI's files have ten times the rows: the
      first 350,136 and 174,987 signal events are read.
    - miniboone: data.npy has the signal events without outliers and without columns of repeated
      values; test and val as for power, with no shuffle; standardized by train and val.
    - bsds300: 8 x 8 patches in three parts, as stored (noise added, mean subtracted, last pixel
      dropped); not standardized: `scale` has mean 0 and std 1.

    Args:
        name: power, gas, hepmass, miniboone or bsds300, in any case.
        folder: the unpacked archive of the MAF authors (Zenodo record 1161203), the data set's own
            folder, or its file. From UCI: ethylene_CO.txt for gas, and for hepmass 1000_train.csv
            and 1000_test.csv; each also as .gz.

    Returns:
        A `Table` without warnings. `log_prob` of its rows compares with published numbers as it
        is; `scale.log_scale` leads to the units of the file.

    Raises:
        InputError: an unknown name; a missing or damaged file, or one of another shape; a pickle,
            which is never read; bsds300 without h5py.
    """
    source = MAF_SUITE.get(name.lower())
    if source is None:
        near = difflib.get_close_matches(name.lower(), MAF_SUITE, n=1, cutoff=0)[0]
        raise InputError(
            f"no data set {name!r} in the MAF suite; there are {', '.join(MAF_SUITE)}: "
            f"did you mean {near}?"
        )
    return source.load(*_find(Path(folder), source))


def _power(path: Path) -> Table:
    rows = _read_array(path, 8)
    rng = np.random.RandomState(_SEED)
    order = rng.permutation(len(rows))  # the draws of rng.shuffle(rows), at a fraction of its time
    rows = rows[order[:, None], [0, 2, 4, 5, 6, 7]]
    rows[:, 1] += 0.01 * rng.rand(len(rows))
    rows[:, 0] += 0.001 * rng.rand(len(rows))
    rows[:, 2:5] += rng.rand(len(rows), 3)
    meters = [f"sub_metering_{i}" for i in (1, 2, 3)]
    return _split_and_standardized(path, rows, ["active_power", "voltage", *meters, "time"])


def _gas(path: Path) -> Table:
    with _reading(path):
        total = sum(1 for _ in _lines(path))
        order = np.random.RandomState(_SEED).permutation(total)[: round(0.25 * total)]
        drawn = np.zeros(total, bool)
        drawn[order] = True
        # Only the lines drawn are parsed, in the file's order, and then put in that of the draw.
        rows = _numbers(itertools.compress(_lines(path), drawn), range(3, 19), None)
        rows = rows[np.searchsorted(np.flatnonzero(drawn), order)]
    _require_finite(path, rows)
    train, test = _cut(path, rows)
    train, val = _cut(path, train)
    high = np.corrcoef(rows, rowvar=False) > _CORRELATED
    kept = [i for i in range(16) if not high[i, i + 1 :].any()]
    _require_width(path, len(kept), 8, f"correlations up to {_CORRELATED}")
    train, val, test, rows = (part[:, kept] for part in (train, val, test, rows))
    columns = [f"sensor{i + 1}" for i in kept]
    table = _standardized((train, val, test), *_moments(path, rows, columns, ddof=1), columns)
    return dataclasses.replace(table, warnings=(_GAS_ROWS,))


def _hepmass(train_path: Path, test_path: Path) -> Table:
    fitted, test = (
        _signals(path, count) for path, count in zip((train_path, test_path), _SIGNALS, strict=True)
    )
    train, val = _cut(train_path, fitted)
    kept = np.flatnonzero((fitted == fitted.min(axis=0)).sum(axis=0) <= _REPEATS).tolist()
    _require_width(train_path, len(kept), 21, "a smallest value that hardly repeats")
    train, val, test, fitted = (part[:, kept] for part in (train, val, test, fitted))
    columns = [f"f{i}" for i in kept]
    moments = _moments(train_path, fitted, columns, ddof=1)
    return _standardized((train, val, test), *moments, columns)


def _miniboone(path: Path) -> Table:
    return _split_and_standardized(path, _read_array(path, 43), _numbered(43))


def _bsds300(path: Path) -> Table:
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: needs h5py to be read: pip install h5py") from None
    parts: dict[str, np.ndarray] = {}
    with _reading(path), h5py.File(path, "r") as file:
        for name in ("train", "validation", "test"):
            data = file.get(name)
            if not isinstance(data, h5py.Dataset):
                raise InputError(f"{path}: has no array {name}; fetch it anew")
            _require_array(path, data, 63)
            parts[name] = data.astype(np.float32)[...]
            _require_finite(path, parts[name])
    scale = Standardizer(np.zeros(63), np.ones(63), _numbered(63))
    return Table(parts["train"], parts["validation"], parts["test"], scale, ())


_ARCHIVE = "data.tar.gz of Zenodo record 1161203"
MAF_SUITE = {
    "power": _Source(
        "power",
        ("data.npy",),
        f"{_ARCHIVE} (made of UCI's Individual household electric power consumption)",
        _power,
    ),
    "gas": _Source(
        "gas",
        ("ethylene_CO.txt",),
        "UCI's Gas sensor array under dynamic gas mixtures "
        "(Zenodo record 1161203 has a pickle in its place)",
        _gas,
    ),
    "hepmass": _Source(
        "hepmass",
        ("1000_train.csv", "1000_test.csv"),
        f"{_ARCHIVE}, or UCI's HEPMASS",
        _hepmass,
    ),
    "miniboone": _Source(
        "miniboone",
        ("data.npy",),
        f"{_ARCHIVE} (made of UCI's MiniBooNE particle identification)",
        _miniboone,
    ),
    "bsds300": _Source(
        "BSDS300",
        ("BSDS300.hdf5",),
        f"{_ARCHIVE} (made of Berkeley's BSDS300 images)",
        _bsds300,
    ),
}


def _find(path: Path, source: _Source) -> list[Path]:
    """The paths of a data set's files, in `path` or in its folder there, or `path` itself."""
    if path.suffix in (".pickle", ".pkl"):
        raise _pickle_error(path, source)
    if path.is_file():
        if len(source.files) == 1:
            return [path]
        path = path.parent  # one of two files: the other lies beside it
    folders = (path / source.folder, path)
    found = []
    for name in source.files:
        endings = ("", ".gz") if name.endswith((".csv", ".txt")) else ("",)
        places = [folder / (name + ending) for folder in folders for ending in endings]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            for pickle in (folder / (Path(name).stem + ".pickle") for folder in folders):
                if pickle.is_file():
                    raise _pickle_error(pickle, source)
            raise InputError(
                f"{path}: there is no {source.folder}/{name}, nor {name}; get it from "
                f"{source.origin}"
            )
        found.append(place)
    return found


def _pickle_error(path: Path, source: _Source) -> InputError:
    return InputError(
        f"{path}: a pickle is not read, since that can run its author's code; get "
        f"{' and '.join(source.files)} from {source.origin}"
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a damaged file raises, as an error that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch it anew") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, gzipped or not, but for a header and blanks."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            header = number == 0 and not line.lstrip(" +-.")[:1].isdigit()
            if line.strip() and not header:
                yield line


def _numbers(lines: Iterable[str], columns: Sequence[int], separator: str | None) -> np.ndarray:
    """The columns at these positions, float64; raises ValueError where there are none."""
    lines = iter(lines)
    first = next(lines, None)
    if first is None:
        raise ValueError("no rows")
    lines = itertools.chain([first], lines)
    return np.loadtxt(lines, usecols=columns, delimiter=separator, comments=None, ndmin=2)


def _signals(path: Path, count: int) -> Rows:
    """The 27 features of the first `count` signal events of a HEPMASS file."""
    with _reading(path):
        signals = (line for line in _lines(path) if float(line.split(",", 1)[0]) == 1)
        rows = _numbers(itertools.islice(signals, count), range(1, 28), ",")
    _require_finite(path, rows)
    return rows


def _read_array(path: Path, width: int) -> Rows:
    with _reading(path), path.open("rb") as file:
        rows = np.lib.format.read_array(file, allow_pickle=False)
    _require_array(path, rows, width)
    return rows.astype(np.float64, copy=False)


def _require_array(path: Path, array, width: int) -> None:
    """Shape and type of a numpy array or an HDF5 one."""
    if array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] != width:
        raise InputError(
            f"{path}: expected numbers of shape (rows, {width}); got {array.dtype} "
            f"{array.shape}: give the file as published"
        )


def _require_finite(path: Path, rows: np.ndarray) -> None:
    if not np.isfinite(rows).all():
        raise InputError(f"{path}: has values that are not finite; fetch it anew")


def _require_width(path: Path, found: int, published: int, what: str) -> None:
    if found != published:
        raise InputError(
            f"{path}: {found} columns with {what}, where {published} are published: NLLs would not "
            "compare; give the file as published"
        )


def _cut(path: Path, rows: Rows) -> tuple[Rows, Rows]:
    """All rows but the last tenth, which is rounded down, and those."""
    size = len(rows) - int(0.1 * len(rows))
    if size == len(rows):
        raise InputError(f"{path}: too few rows to split, {len(rows)}; give the whole file")
    return rows[:size], rows[size:]


def _moments(
    path: Path, rows: Rows, columns: Sequence[str], *, ddof: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, over rows - ddof."""
    if (fixed := (rows == rows[0]).all(axis=0)).any():
        raise InputError(
            f"{path}: column {columns[int(fixed.argmax())]} is constant; give the file as published"
        )
    return rows.mean(axis=0), rows.std(axis=0, ddof=ddof)


def _split_and_standardized(path: Path, rows: Rows, columns: Sequence[str]) -> Table:
    """Test the last tenth, val the last tenth of the rest, standardized by that rest."""
    _require_finite(path, rows)
    fitted, test = _cut(path, rows)
    train, val = _cut(path, fitted)
    return _standardized((train, val, test), *_moments(path, fitted, columns, ddof=0), columns)


def _standardized(
    parts: tuple[Rows, Rows, Rows],
    mean: Float[np.ndarray, " dim"],
    std: Float[np.ndarray, " dim"],
    columns: Sequence[str],
) -> Table:
    """The parts less `mean`, over `std`: in float64, and then rounded."""
    train, val, test = (((part - mean) / std).astype(np.float32) for part in parts)
    return Table(train, val, test, Standardizer(mean, std, tuple(columns)), ())


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"x{i + 1}" for i in range(count))
