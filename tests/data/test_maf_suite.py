"""Tests of the MAF suite's preprocessing, on small files of the published formats.

The expected tables are computed here a second time, step by step as published.
"""

import gzip
import sys
from collections import Counter

import numpy as np
import pytest
from refusal import fails

from jcnf.data.tables import load_maf_suite, maf_suite


def normal(rows, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim))


def saved(folder, name, rows):
    """Save rows as .npy or text, and make the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npy"):
        np.save(path, rows)
    else:
        path.write_bytes(rows.encode())
    return path


def same(table, train, val, test, columns):
    """Assert that the table has these parts, to the last bit of float32."""
    pairs = (table.train, train), (table.val, val), (table.test, test)
    for found, expected in pairs:
        assert found.dtype == np.float32
        np.testing.assert_array_max_ulp(found, expected.astype(np.float32), 1)
    assert table.scale.columns == tuple(columns)


def tenths(rows):
    """Split into train, val and test: test is the last tenth, val the last tenth of the rest."""
    rest, test = np.split(rows, [len(rows) - len(rows) // 10])
    return (*np.split(rest, [len(rest) - len(rest) // 10]), test)


# POWER


POWER = np.round(normal(437, 8) * [1, 1, 3, 5, 1, 1, 1, 100] + 240, 2)
POWER_COLUMNS = ["active_power", "voltage", "sub_metering_1", "sub_metering_2", "sub_metering_3"]
POWER_COLUMNS += ["time"]


def power_as_published():
    """Return the rows shuffled, without dropped columns and with noise, not yet standardized."""
    rng = np.random.RandomState(42)
    rows = POWER.copy()
    rng.shuffle(rows)
    rows = np.delete(rows, [1, 3], axis=1)
    voltage, active, meters = rng.rand(437, 1), rng.rand(437, 1), rng.rand(437, 3)
    return rows + np.hstack([0.001 * active, 0.01 * voltage, meters, np.zeros((437, 1))])


def test_power(tmp_path):
    saved(tmp_path, "power/data.npy", POWER)
    table = load_maf_suite("power", tmp_path)
    assert [len(part) for part in (table.train, table.val, table.test)] == [355, 39, 43]
    rows = power_as_published()
    fitted = rows[:394]  # train and val
    z = (rows - fitted.mean(axis=0)) / fitted.std(axis=0)
    same(table, *tenths(z), POWER_COLUMNS)
    np.testing.assert_allclose(table.scale.unstandardize(table.test), rows[394:], rtol=1e-6)


def test_the_noise_of_power(tmp_path):
    """Each column has noise of its published width, added upwards; the time has none."""
    saved(tmp_path, "power/data.npy", POWER)
    table = load_maf_suite("power", tmp_path)
    rows = table.scale.unstandardize(np.concatenate([table.train, table.val, table.test]))
    order = np.random.RandomState(42).permutation(437)
    noise = rows - POWER[order][:, [0, 2, 4, 5, 6, 7]]
    np.testing.assert_allclose(noise.mean(axis=0), [5e-4, 5e-3, 0.5, 0.5, 0.5, 0], atol=0.04)
    np.testing.assert_allclose(noise.max(axis=0), [1e-3, 1e-2, 1, 1, 1, 0], rtol=0.05, atol=5e-5)
    assert noise.min() > -5e-5


def test_a_folder_its_parent_or_the_file_itself(tmp_path):
    path = saved(tmp_path, "power/data.npy", POWER)
    tables = [load_maf_suite("POWER", place) for place in (tmp_path, path.parent, path, str(path))]
    for table in tables[1:]:
        np.testing.assert_array_equal(table.test, tables[0].test)
    # The data set's own folder takes precedence over a file of the same name next to it.
    saved(tmp_path, "data.npy", normal(437, 8, seed=1))
    np.testing.assert_array_equal(load_maf_suite("Power", tmp_path).test, tables[0].test)


# GAS


def gas_rows(rows=2000):
    """Make time, two concentrations and 16 sensors; the published rules keep those of GAS_KEPT."""
    z, jitter = normal(rows, 6), 0.02 * normal(rows, 16, seed=1)
    step = 0.17 * normal(rows, 6, seed=2)  # two steps away, the correlation is below 0.98
    a, b, c, d, e, f = z.T
    chain = [a, a + step[:, 0], a + step[:, 0] + step[:, 1]]  # goes, goes, stays
    middle_first = [b + step[:, 2], b, b + step[:, 2] + step[:, 3]]  # goes, stays, stays
    sensors = np.stack([*chain, *middle_first, c, -c, c, c, d, d, e, e, f, f], axis=1)
    sensors[:, 6:] += jitter[:, 6:]
    times = np.arange(rows)[:, None] / 100
    levels = np.random.default_rng(3).integers(0, 500, (rows, 2))
    return np.round(np.hstack([times, levels, 1000 * sensors + 3000]), 2)


GAS_KEPT = [2, 4, 5, 7, 9, 11, 13, 15]


def gas_text(rows, header=True):
    lines = [" ".join(f"{value:.2f}" for value in row) for row in rows]
    first = ["Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)"]
    return "\r\n".join(first * header + lines) + "\r\n"


def gas_as_published(rows):
    """Sample rows, drop columns one by one (recomputing the correlations), and standardize."""
    sample = rows[np.random.RandomState(42).choice(len(rows), len(rows) // 4, replace=False), 3:]
    names = list(range(16))
    while True:
        crowd = (np.corrcoef(sample[:, names].T) > 0.98).sum(axis=1)
        if not (crowd > 1).any():
            break
        names.pop(int(np.argmax(crowd > 1)))
    sample = sample[:, names]
    n = len(sample)
    mean = sample.sum(axis=0) / n
    return names, (sample - mean) / np.sqrt(((sample - mean) ** 2).sum(axis=0) / (n - 1))


def test_gas(tmp_path):
    rows = gas_rows()
    path = saved(tmp_path, "gas/ethylene_CO.txt", gas_text(rows))
    table = load_maf_suite("gas", tmp_path)
    assert [len(part) for part in (table.train, table.val, table.test)] == [405, 45, 50]
    names, z = gas_as_published(rows)
    assert names == GAS_KEPT
    same(table, *tenths(z), [f"sensor{i + 1}" for i in GAS_KEPT])
    assert "another" in table.warnings[0]
    whole = np.concatenate([table.train, table.val, table.test])
    np.testing.assert_allclose(whole.mean(axis=0), 0, atol=1e-6)  # over all rows, including test
    np.testing.assert_allclose(whole.std(axis=0, ddof=1), 1, rtol=1e-6)
    bare = saved(tmp_path, "bare/ethylene_CO.txt", gas_text(rows, header=False))
    zipped = bare.with_name("ethylene_CO.txt.gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    for other in (bare, zipped):
        np.testing.assert_array_equal(load_maf_suite("gas", other).train, table.train)
    bare.unlink()
    np.testing.assert_array_equal(load_maf_suite("gas", bare.parent).train, table.train)


def test_a_pickle_is_not_read(tmp_path):
    """A pickle that would create a file is refused, however it is named."""
    path = saved(tmp_path, "gas/ethylene_CO.pickle", f"cos\nsystem\n(S'touch {tmp_path}/x'\ntR.")
    for place in (tmp_path, path.parent, path):
        with fails(path, "pickle", "ethylene_CO.txt"):
            load_maf_suite("gas", place)
    objects = np.array([[None] * 8] * 50)
    path = saved(tmp_path, "power/data.npy", objects)
    with fails(path, "allow_pickle=False"):
        load_maf_suite("power", tmp_path)
    path.write_bytes(objects.dumps())
    with fails(path):
        load_maf_suite("power", tmp_path)
    assert not (tmp_path / "x").exists()
    saved(tmp_path, "gas/ethylene_CO.txt", gas_text(gas_rows()))
    assert load_maf_suite("gas", tmp_path).train.shape == (405, 8)  # next to the pickle


# HEPMASS


def hepmass_rows(rows, seed):
    """Make labels and 27 features, six of which repeat their smallest value."""
    x = normal(rows, 28, seed)
    x[:, 0] = np.arange(rows) % 3 != 0  # two signal events in three
    x[:, [4, 9, 13, 17]] = np.round(np.abs(x[:, [4, 9, 13, 17]]))
    x[:, 24] = np.maximum(x[:, 24], -1)  # an atom at the lower end: dropped
    x[:, 25] = np.minimum(x[:, 25], 1)  # at the upper end: kept, as published
    x[::3, 26] = -9  # repeated only in the background: kept
    x[[1, 2, 4, 5, 7], 27] = -7  # five times: kept
    x[[1, 2, 4, 5, 7, 8], 21] = -7  # six times: dropped
    return x


HEPMASS_DROPPED = [3, 8, 12, 16, 20, 23]  # features


def csv_text(rows, header):
    names = ",".join(["# label", *(f"f{i}" for i in range(len(rows[0]) - 1))])
    lines = [",".join(f"{value:.18e}" for value in row) for row in rows]
    return "\n".join([names] * header + lines) + "\n"


def hepmass(folder, rows=300, test_rows=120, name="hepmass/1000_{}.csv"):
    """Save a training and a test file; the test file has an extra column, as published."""
    train, test = hepmass_rows(rows, 0), hepmass_rows(test_rows, 1)
    saved(folder, name.format("train"), csv_text(train, header=True))
    more = np.hstack([test, np.full((test_rows, 1), 1000.0)])
    saved(folder, name.format("test"), csv_text(more, header=True))
    return train, test


def hepmass_as_published(train, test):
    train, test = train[train[:, 0] == 1, 1:], test[test[:, 0] == 1, 1:]
    mean, std = train.mean(axis=0), train.std(axis=0, ddof=1)
    train, test = (train - mean) / std, (test - mean) / std
    kept = [i for i, x in enumerate(train.T) if sorted(Counter(x).items())[0][1] <= 5]
    train, val = np.split(train[:, kept], [len(train) - len(train) // 10])
    return kept, train, val, test[:, kept]


def test_hepmass(tmp_path):
    rows = hepmass(tmp_path)
    table = load_maf_suite("hepmass", tmp_path)
    kept, *parts = hepmass_as_published(*rows)
    assert kept == [i for i in range(27) if i not in HEPMASS_DROPPED]
    assert [part.shape for part in parts] == [(180, 21), (20, 21), (80, 21)]
    same(table, *parts, [f"f{i}" for i in kept])
    fitted = np.concatenate([table.train, table.val])
    np.testing.assert_allclose(fitted.std(axis=0, ddof=1), 1, rtol=1e-6)
    by_file = load_maf_suite("hepmass", tmp_path / "hepmass" / "1000_train.csv")
    np.testing.assert_array_equal(by_file.test, table.test)


def test_hepmass_of_uci_stops_at_the_published_events(tmp_path, monkeypatch):
    """Longer, gzipped files give the same table as their first rows."""
    hepmass(tmp_path)
    short = load_maf_suite("hepmass", tmp_path)
    for part in ("train", "test"):
        text = (tmp_path / f"hepmass/1000_{part}.csv").read_text()
        more = "".join(text.splitlines(keepends=True)[1:])
        path = tmp_path / f"1000_{part}.csv.gz"
        path.write_bytes(gzip.compress((text + more).encode()))
        (tmp_path / f"hepmass/1000_{part}.csv").unlink()
    assert maf_suite._HEPMASS_SIGNALS == (315_123 + 35_013, 174_987)
    monkeypatch.setattr(maf_suite, "_HEPMASS_SIGNALS", (200, 80))
    table = load_maf_suite("hepmass", tmp_path)
    same(table, short.train, short.val, short.test, short.scale.columns)


# MINIBOONE and BSDS300


def test_miniboone(tmp_path):
    rows = normal(256, 43) * np.linspace(0.1, 90, 43) - 7
    saved(tmp_path, "miniboone/data.npy", rows)
    table = load_maf_suite("MiniBooNE", tmp_path)
    fitted = rows[:231]
    z = (rows - fitted.mean(axis=0)) / fitted.std(axis=0)
    parts = z[:208], z[208:231], z[231:]
    same(table, *parts, [f"x{i + 1}" for i in range(43)])
    np.testing.assert_allclose(table.scale.std, fitted.std(axis=0))


def bsds(path, **arrays):
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, rows in arrays.items():
            file[name] = rows
    return path


def patches(dtype=np.float32):
    return {
        name: (0.1 * normal(rows, 63, seed=rows)).astype(dtype)
        for name, rows in (("train", 40), ("validation", 8), ("test", 12))
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bsds300(tmp_path, dtype):
    given = patches(dtype)
    bsds(tmp_path / "BSDS300" / "BSDS300.hdf5", **given)
    table = load_maf_suite("BSDS300", tmp_path)
    same(table, *given.values(), [f"x{i + 1}" for i in range(63)])
    assert (table.scale.mean == 0).all()
    assert (table.scale.std == 1).all()
    assert table.scale.log_scale == 0


# What is refused


def spoilt_power(place, value):
    rows = POWER.copy()
    rows[place] = value
    return rows


# name, file, content and what the error names besides the file
REFUSED = {
    "gas of other sensors": ("gas", gas_text(np.round(normal(200, 19), 2)), ["8 columns", "16"]),
    "gas of nothing": ("gas", "", ["no rows"]),
    "gas of a header": ("gas", "Time (seconds), readings\n", ["no rows"]),
    "gas of few columns": ("gas", "1 2 3\n" * 100, ["column"]),
    "gas with text": ("gas", "x " * 19 + "\n" + ("1 " * 18 + "high\n") * 100, ["'high'"]),
    "gas with NaN": ("gas", (" ".join(["1"] * 18) + " nan\n") * 100, ["NaN"]),
    "gas of bytes": ("gas", b"\xff\xfe\x00" * 100, ["utf-8"]),
    "power of another shape": ("power", normal(50, 43), ["(rows, 8)", "float64 (50, 43)"]),
    "power of a vector": ("power", POWER[:, 0], ["(rows, 8)", "(437,)"]),
    "power of complex numbers": ("power", POWER + 1j, ["(rows, 8)", "complex128"]),
    "power of strings": ("power", POWER.astype(str), ["(rows, 8)", "<U"]),
    "power with NaN": ("power", spoilt_power((5, 4), np.nan), ["NaN"]),
    "power at one time": ("power", spoilt_power((slice(None), 7), 1.0), ["column time"]),
    "power of 10 rows": ("power", POWER[:10], ["rows"]),
    "power of no rows": ("power", POWER[:0], ["rows"]),
    "bsds300 of another shape": (
        "bsds300", patches() | {"test": normal(5, 64)}, ["(rows, 63)", "float64 (5, 64)"]
    ),
    "bsds300 without validation": ("bsds300", {"train": normal(9, 63)}, ["validation"]),
    "bsds300 with NaN": ("bsds300", patches() | {"test": np.full((2, 63), np.nan)}, ["NaN"]),
    "bsds300 of text": ("bsds300", "not HDF5", ["download it again"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused(tmp_path, case):
    name, content, words = REFUSED[case]
    path = tmp_path / maf_suite.MAF_SUITE[name].files[0]
    if isinstance(content, dict):
        bsds(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        saved(tmp_path, path.name, content)
    with fails(path, *words):
        load_maf_suite(name, tmp_path)


def test_bad_files_of_hepmass_are_refused(tmp_path):
    train, _ = hepmass(tmp_path)
    test = tmp_path / "hepmass/1000_test.csv"
    for content, words in [
        (csv_text(np.zeros((30, 29)), header=True), ["no rows"]),  # all background
        ("label,f0\nsignal,0.3\n", ["'signal'"]),
    ]:
        test.write_text(content)
        with fails(test, *words):
            load_maf_suite("hepmass", tmp_path)
    test.unlink()
    with fails("hepmass/1000_test.csv"):
        load_maf_suite("hepmass", tmp_path)
    zipped = test.with_name("1000_test.csv.gz")
    zipped.write_bytes(gzip.compress(b"1.0," * 5000)[:40])
    with fails(zipped):
        load_maf_suite("hepmass", tmp_path)
    train, _ = hepmass(tmp_path)
    train[:, 4] = np.linspace(0, 1, len(train))
    path = saved(tmp_path, "hepmass/1000_train.csv", csv_text(train, header=True))
    with fails(path, "21 columns", "22"):
        load_maf_suite("hepmass", tmp_path)


@pytest.mark.parametrize("name", maf_suite.MAF_SUITE)
def test_missing_files_name_their_origin(tmp_path, name):
    source = maf_suite.MAF_SUITE[name]
    for folder in (tmp_path, tmp_path / "nowhere"):
        with fails(folder, f"{source.folder}/{source.files[0]}", source.origin):
            load_maf_suite(name, folder)


def test_unknown_names_and_missing_packages(tmp_path, monkeypatch):
    for name, near in {"gass": "gas", "BSDS": "bsds300", "mini-boone": "miniboone"}.items():
        with fails(repr(name), near, "?"):
            load_maf_suite(name, tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    saved(tmp_path, "BSDS300.hdf5", "")
    with fails("pip install h5py"):
        load_maf_suite("bsds300", tmp_path)
