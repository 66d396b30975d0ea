"""The five tables of the MAF suite, preprocessed as published, so that NLLs can be compared.

table = load_maf_suite("power", "data")    # the folder that data.tar.gz unpacks to
table.train, table.val, table.test         # (rows, dim) float32, in the space of published NLLs

The preprocessing follows Papamakarios, Pavlakou & Murray 2017 (Masked Autoregressive Flow,
arXiv:1705.07057) and the code of its data sets (github.com/gpapamak/maf, datasets/), which FFJORD
and Neural Spline Flows also use. The number of rows after preprocessing:

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

_SEED = 42
_MAX_GAS_CORRELATION = 0.98  # of two columns with more, the first is dropped
_MAX_HEPMASS_REPEATS = 5  # a column that has its smallest value more often is dropped
_GAS_WARNING = (
    "gas: the published rows are a random quarter of UCI's, drawn with an unknown seed; these are "
    "another random quarter: NLLs are comparable up to sampling error"
)
_HEPMASS_SIGNALS = (350_136, 174_987)  # signal events read from the training and the test file

Rows = Float[np.ndarray, "rows dim"]


@dataclasses.dataclass(frozen=True)
class _Source:
    """The files of a data set, and the function that reads them."""

    folder: str  # in the archive of the MAF authors
    files: tuple[str, ...]
    origin: str  # where to download the files
    load: Callable[..., Table]  # takes the paths of `files`


def load_maf_suite(name: str, folder: str | os.PathLike) -> Table:
    """Read one of the five data sets and preprocess it as Papamakarios et al. 2017 did.

    A tenth of the rows means the last int(0.1 * rows) of them. Standardizing is by column.

    - power: the rows are shuffled by numpy's RandomState(42), and columns 2 (reactive power) and 4
      (intensity) of data.npy are dropped. Uniform noise is added from the same stream: first
      [0, 0.01) to the voltage, then [0, 0.001) to the active power, then [0, 1) to the three
      sub-meterings, and none to the time. Test is the last tenth, val the last tenth of the rest;
      standardized by train and val.
    - gas: the time and the two concentrations are dropped; then, from the first sensor on, each
      sensor whose correlation with a later one is above 0.98. Standardized by all rows, including
      test (std with rows - 1); test and val as for power. The published rows are a quarter of
      UCI's, drawn with an unpublished seed; here RandomState(42) draws another quarter, so NLLs
      agree with published ones up to sampling error, but are not of the same rows.
    - hepmass: only signal events (label 1) are kept. The label is dropped, and so is anything after
      the 27th feature (the published test file has an extra column); then the columns whose
      smallest value occurs more than 5 times in the training file. Standardized by the training
      file (train and val; std with rows - 1), whose last tenth is val. UCI's files have ten times
      the rows: the first 350,136 and 174,987 signal events are read.
    - miniboone: data.npy has the signal events without outliers and without columns of repeated
      values. Test and val as for power, without a shuffle; standardized by train and val.
    - bsds300: 8 x 8 patches in three parts, as stored (noise added, mean subtracted, last pixel
      dropped). Not standardized: `scale` has mean 0 and std 1.

    **Arguments:**

    - `name`: power, gas, hepmass, miniboone or bsds300, in upper or lower case.
    - `folder`: the unpacked archive of the MAF authors (Zenodo record 1161203), the data set's own
      folder, or its file. Files from UCI work too: ethylene_CO.txt for gas, and 1000_train.csv and
      1000_test.csv for hepmass; each may be a .gz.

    **Returns:** a `Table`; only gas has a warning, about its rows. `log_prob` of the rows can be
    compared directly with published numbers; `scale.log_scale` converts it to the file's units.

    **Raises:** `InputError` for an unknown name; a file that is missing or damaged or has another
    shape; a pickle, which is never read; and bsds300 without h5py.
    """
    source = MAF_SUITE.get(name.lower())
    if source is None:
        near = difflib.get_close_matches(name.lower(), MAF_SUITE, n=1, cutoff=0)[0]
        raise InputError(
            f"no data set {name!r} in the MAF suite, which has {', '.join(MAF_SUITE)}: did you "
            f"mean {near}?"
        )
    return source.load(*_find(Path(folder), source))


def _power(path: Path) -> Table:
    rows = _read_array(path, 8)
    rng = np.random.RandomState(_SEED)
    order = rng.permutation(len(rows))  # the same draws as rng.shuffle(rows), but faster
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
        # Only the drawn lines are parsed: in the order of the file, then put in the order drawn.
        rows = _numbers(itertools.compress(_lines(path), drawn), range(3, 19), None)
        rows = rows[np.searchsorted(np.flatnonzero(drawn), order)]
    _require_finite(path, rows)
    train, test = _cut(path, rows)
    train, val = _cut(path, train)
    high = np.corrcoef(rows, rowvar=False) > _MAX_GAS_CORRELATION
    kept = [i for i in range(16) if not high[i, i + 1 :].any()]
    _require_width(path, len(kept), 8, f"correlations up to {_MAX_GAS_CORRELATION}")
    train, val, test, rows = (part[:, kept] for part in (train, val, test, rows))
    columns = [f"sensor{i + 1}" for i in kept]
    table = _standardized((train, val, test), *_moments(path, rows, columns, ddof=1), columns)
    return dataclasses.replace(table, warnings=(_GAS_WARNING,))


def _hepmass(train_path: Path, test_path: Path) -> Table:
    fitted, test = (
        _signals(path, count)
        for path, count in zip((train_path, test_path), _HEPMASS_SIGNALS, strict=True)
    )
    train, val = _cut(train_path, fitted)
    kept = np.flatnonzero(
        (fitted == fitted.min(axis=0)).sum(axis=0) <= _MAX_HEPMASS_REPEATS
    ).tolist()
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
        raise InputError(f"{path}: reading it needs h5py: pip install h5py") from None
    parts: dict[str, np.ndarray] = {}
    with _reading(path), h5py.File(path, "r") as file:
        for name in ("train", "validation", "test"):
            data = file.get(name)
            if not isinstance(data, h5py.Dataset):
                raise InputError(f"{path}: has no array {name}: download it again")
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
    """Find a data set's files in `path` or in its folder there; `path` may also be a file."""
    if path.suffix in (".pickle", ".pkl"):
        raise _pickle_error(path, source)
    if path.is_file():
        if len(source.files) == 1:
            return [path]
        path = path.parent  # one of two files; the other is next to it
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
                f"{path}: there is no {source.folder}/{name} or {name}: download it from "
                f"{source.origin}"
            )
        found.append(place)
    return found


def _pickle_error(path: Path, source: _Source) -> InputError:
    return InputError(
        f"{path}: a pickle is not read, because it can run arbitrary code: download "
        f"{' and '.join(source.files)} from {source.origin}"
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into an error that names the file."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): download it again") from None


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, gzipped or not, without a header and blank lines."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            header = number == 0 and not line.lstrip(" +-.")[:1].isdigit()
            if line.strip() and not header:
                yield line


def _numbers(lines: Iterable[str], columns: Sequence[int], separator: str | None) -> np.ndarray:
    """Return the columns at these positions as float64; raise ValueError without rows."""
    lines = iter(lines)
    first = next(lines, None)
    if first is None:
        raise ValueError("no rows")
    lines = itertools.chain([first], lines)
    return np.loadtxt(lines, usecols=columns, delimiter=separator, comments=None, ndmin=2)


def _signals(path: Path, count: int) -> Rows:
    """Read the 27 features of the first `count` signal events of a HEPMASS file."""
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
    """Check shape and type of a numpy or HDF5 array."""
    if array.dtype.kind not in "iuf" or array.ndim != 2 or array.shape[1] != width:
        raise InputError(
            f"{path}: expected numbers of shape (rows, {width}); got {array.dtype} "
            f"{array.shape}: use the published file"
        )


def _require_finite(path: Path, rows: np.ndarray) -> None:
    if not np.isfinite(rows).all():
        raise InputError(f"{path}: has NaN or infinite values: download it again")


def _require_width(path: Path, found: int, published: int, what: str) -> None:
    if found != published:
        raise InputError(
            f"{path}: expected {published} columns with {what}; got {found}, so that NLLs would "
            "not be comparable: use the published file"
        )


def _cut(path: Path, rows: Rows) -> tuple[Rows, Rows]:
    """Split off the last tenth of the rows, rounded down."""
    size = len(rows) - int(0.1 * len(rows))
    if size == len(rows):
        raise InputError(f"{path}: {len(rows)} rows are too few to split: use the complete file")
    return rows[:size], rows[size:]


def _moments(
    path: Path, rows: Rows, columns: Sequence[str], *, ddof: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, with divisor rows - ddof."""
    if (fixed := (rows == rows[0]).all(axis=0)).any():
        raise InputError(
            f"{path}: column {columns[int(fixed.argmax())]} is constant: use the published file"
        )
    return rows.mean(axis=0), rows.std(axis=0, ddof=ddof)


def _split_and_standardized(path: Path, rows: Rows, columns: Sequence[str]) -> Table:
    """Cut off test as the last tenth, then val as a tenth of the rest; standardize by the rest."""
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
    """Return (part - mean) / std for each part, computed in float64 and then rounded."""
    train, val, test = (((part - mean) / std).astype(np.float32) for part in parts)
    return Table(train, val, test, Standardizer(mean, std, tuple(columns)), ())


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"x{i + 1}" for i in range(count))
