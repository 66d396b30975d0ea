"""Tests of the MAF suite's preprocessing, on small files of the published formats.

The expected tables are computed here a second time, step by step as published.
"""

import gzip
import re
import sys
from collections import Counter

import numpy as np
import pytest

from jcnf._checks import InputError
from jcnf.data.tables import load_maf_suite, maf_suite


def normal(rows, dim, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim))


def fails(*parts, path=""):
    """Expect a one-line error that contains all of `parts` and the path."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in (*parts, str(path)))
    return pytest.raises(InputError, match=rf"\A{pattern}[^\n]*\Z")


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
    parts = "a pickle is not read", "ethylene_CO.txt from UCI's Gas sensor array under dynamic gas"
    for place in (tmp_path, path.parent, path):
        with fails(*parts, path=path):
            load_maf_suite("gas", place)
    objects = np.array([[None] * 8] * 50)
    path = saved(tmp_path, "power/data.npy", objects)
    with fails("cannot be read", "allow_pickle=False", path=path):
        load_maf_suite("power", tmp_path)
    path.write_bytes(objects.dumps())
    with fails("cannot be read", path=path):
        load_maf_suite("power", tmp_path)
    assert not (tmp_path / "x").exists()
    saved(tmp_path, "gas/ethylene_CO.txt", gas_text(gas_rows()))
    assert load_maf_suite("gas", tmp_path).train.shape == (405, 8)  # next to the pickle


def test_gas_of_other_sensors_does_not_pass(tmp_path):
    path = saved(tmp_path, "ethylene_CO.txt", gas_text(np.round(normal(200, 19), 2)))
    with fails("expected 8 columns with correlations up to 0.98; got 16", path=path):
        load_maf_suite("gas", path)


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


def test_hepmass_of_other_features_does_not_pass(tmp_path):
    train, _ = hepmass(tmp_path)
    train[:, 4] = np.linspace(0, 1, len(train))
    path = saved(tmp_path, "hepmass/1000_train.csv", csv_text(train, header=True))
    with fails("expected 21 columns with a smallest value", "got 22", path=path):
        load_maf_suite("hepmass", tmp_path)


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


def test_bsds300_of_another_content(tmp_path):
    path = bsds(tmp_path / "BSDS300.hdf5", **patches() | {"test": normal(5, 64)})
    with fails("expected numbers of shape (rows, 63)", "float64 (5, 64)", path=path):
        load_maf_suite("bsds300", path)
    bsds(path, train=normal(9, 63))
    with fails("no array validation", path=path):
        load_maf_suite("bsds300", path)
    bsds(path, **patches() | {"test": np.full((2, 63), np.nan)})
    with fails("NaN or infinite", path=path):
        load_maf_suite("bsds300", path)
    path.write_bytes(b"not HDF5")
    with fails("cannot be read", "download it again", path=path):
        load_maf_suite("bsds300", path)


def test_bsds300_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    path = saved(tmp_path, "BSDS300/BSDS300.hdf5", "")
    with fails("pip install h5py", path=path):
        load_maf_suite("bsds300", tmp_path)


# Errors


@pytest.mark.parametrize(
    ("name", "near"), [("gass", "gas"), ("BSDS", "bsds300"), ("mini-boone", "miniboone")]
)
def test_unknown_names(tmp_path, name, near):
    known = "power, gas, hepmass, miniboone, bsds300"
    with fails(repr(name), known, f"did you mean {near}?"):
        load_maf_suite(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "origin"),
    [
        ("power", "power/data.npy", "Individual household electric power consumption"),
        ("gas", "gas/ethylene_CO.txt", "UCI's Gas sensor array under dynamic gas mixtures"),
        ("hepmass", "hepmass/1000_train.csv", "UCI's HEPMASS"),
        ("miniboone", "miniboone/data.npy", "MiniBooNE particle identification"),
        ("bsds300", "BSDS300/BSDS300.hdf5", "BSDS300 images"),
    ],
)
def test_missing_files(tmp_path, name, file, origin):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with fails(file, origin, "Zenodo record 1161203" if name != "gas" else "", path=folder):
            load_maf_suite(name, folder)


def test_one_of_two_files_is_missing(tmp_path):
    hepmass(tmp_path)
    (tmp_path / "hepmass/1000_test.csv").unlink()
    with fails("no hepmass/1000_test.csv", path=tmp_path):
        load_maf_suite("hepmass", tmp_path)


def test_arrays_of_another_shape(tmp_path):
    saved(tmp_path, "data.npy", normal(50, 43))  # MINIBOONE's, not POWER's
    with fails("(rows, 8)", "float64 (50, 43)", path=tmp_path / "data.npy"):
        load_maf_suite("power", tmp_path)
    for rows in (normal(50, 8)[:, 0], normal(50, 8) + 1j, normal(50, 8).astype(str)):
        saved(tmp_path, "data.npy", rows)
        with fails("(rows, 8)", str(rows.shape), path=tmp_path):
            load_maf_suite("power", tmp_path)


def test_values_and_rows_no_table_can_have(tmp_path):
    spoilt = POWER.copy()
    spoilt[5, 4] = np.nan
    path = saved(tmp_path, "data.npy", spoilt)
    with fails("NaN or infinite", path=path):
        load_maf_suite("power", path)
    saved(tmp_path, "data.npy", np.hstack([POWER[:, :7], np.ones((437, 1))]))
    with fails("column time is constant", path=path):
        load_maf_suite("power", path)
    saved(tmp_path, "data.npy", POWER[:11])
    assert len(load_maf_suite("power", path).test) == 1
    for rows in (0, 9, 10):
        saved(tmp_path, "data.npy", POWER[:rows])
        with fails("too few to split", path=path):
            load_maf_suite("power", path)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["no rows"]),
        ("Time (seconds), readings\n", ["no rows"]),
        ("1 2 3\n" * 100, ["column"]),
        (" ".join(["x"] * 19) + "\n" + ("1 " * 18 + "high\n") * 100, ["'high'"]),
        ((" ".join(["1"] * 18) + " nan\n") * 100, ["NaN or infinite"]),
        (b"\xff\xfe\x00" * 100, ["utf-8"]),
    ],
)
def test_damaged_text(tmp_path, content, parts):
    path = tmp_path / "ethylene_CO.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with fails(*parts, path=path):
        load_maf_suite("gas", path)


def test_damaged_hepmass(tmp_path):
    hepmass(tmp_path)
    path = saved(tmp_path, "hepmass/1000_test.csv", csv_text(np.zeros((30, 29)), header=True))
    with fails("no rows", path=path):  # all background
        load_maf_suite("hepmass", tmp_path)
    path.write_text("label,f0\nsignal,0.3\n")
    with fails("'signal'", path=path):
        load_maf_suite("hepmass", tmp_path)
    path.unlink()
    path = path.with_name("1000_test.csv.gz")
    path.write_bytes(gzip.compress(b"1.0," * 5000)[:40])
    with fails("cannot be read", "download it again", path=path):
        load_maf_suite("hepmass", tmp_path)
