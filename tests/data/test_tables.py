"""Tests of every format, error and warning of tables, each on a small file."""

import gzip
import math
import re
import sys

import numpy as np
import pytest
from refusal import fails

from jcnf.data.tables import Levels, jitter, load_table, read_rows, resolutions, write_rows


def normal(rows=400, dim=3, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim))


def saved(path, rows, **arrays):
    """Save rows as .npy, or named arrays as .npz; both are exact, but printed tables have steps."""
    path = path / ("table.npz" if arrays else "table.npy")
    np.savez(path, **arrays) if arrays else np.save(path, rows)
    return path


def text(path, content, name="table.csv"):
    path = path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows, separator=","):
    return "".join(separator.join(map(repr, row)) + "\n" for row in rows.tolist())


def whole(table):
    parts = np.concatenate([table.train, table.val, table.test])
    return table.scale.unstandardize(parts)


# Splitting and standardizing


def test_standardized_by_the_training_part_alone(tmp_path):
    x = normal() * [1, 20, 300] + [5, -7, 1e4]
    table = load_table(saved(tmp_path, x))
    assert [len(p) for p in (table.train, table.val, table.test)] == [320, 40, 40]
    assert {p.dtype for p in (table.train, table.val, table.test)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(table.train.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(table.train.std(axis=0), 1, rtol=1e-6)
    assert abs(table.test.mean(axis=0)).max() > 1e-3  # its own mean is not zero
    train = table.scale.unstandardize(table.train)
    np.testing.assert_allclose(train.mean(axis=0), table.scale.mean, rtol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), table.scale.std, rtol=1e-5)
    assert table.scale.mean.dtype == table.scale.std.dtype == np.float64
    assert table.scale.columns == ("x1", "x2", "x3")
    assert table.warnings == ()


def test_standardize_and_back(tmp_path):
    x = normal() * [1, 20, 300]
    table = load_table(saved(tmp_path, x))
    z = table.scale.standardize(x)
    assert z.dtype == np.float32
    np.testing.assert_allclose(table.scale.unstandardize(z), x, rtol=1e-5, atol=1e-4)


def test_log_scale_is_the_jacobian_of_standardizing(tmp_path):
    x = normal() * [0.1, 20, 300] + 3
    table = load_table(saved(tmp_path, x))

    def log_normal(x, mean, std):  # by hand, one point
        terms = zip(x, mean, std, strict=True)
        return sum(
            -0.5 * ((a - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)
            for a, m, s in terms
        )

    z = (x[7] - table.scale.mean) / table.scale.std
    standardized = log_normal(z, np.zeros(3), np.ones(3))
    original = log_normal(x[7], table.scale.mean, table.scale.std)
    assert standardized - table.scale.log_scale == pytest.approx(original, abs=1e-12)


def test_the_split_is_disjoint_and_depends_on_the_seed_alone(tmp_path):
    x = normal(200, 2)
    path = saved(tmp_path, x)
    tables = [load_table(path, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(
        np.sort(whole(tables[0])[:, 0]).round(5), np.sort(x[:, 0]).round(5)
    )
    np.testing.assert_array_equal(tables[0].test, tables[1].test)
    assert not np.array_equal(tables[0].test, tables[2].test)

    other = load_table(saved(tmp_path, np.round(x * 10)), dequantize=True)
    places = [
        [
            int(np.argmin(abs(data[:, 0] - value)))
            for value in table.scale.unstandardize(table.test)[:, 0]
        ]
        for table, data in ((tables[0], x), (other, whole(other)))
    ]
    assert sorted(places[1]) == list(range(180, 200))  # `whole` stacks the test part last
    rounded = np.round(other.scale.unstandardize(other.test))
    np.testing.assert_array_equal(rounded, np.round(x[places[0]] * 10))


def test_fractions(tmp_path):
    path = saved(tmp_path, normal(200, 2))
    table = load_table(path, val_fraction=0.25, test_fraction=0.5)
    assert [len(p) for p in (table.train, table.val, table.test)] == [50, 50, 100]


# Formats


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".npy", ".npz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_written_reads_back_the_same(tmp_path, ending, dtype):
    x = normal(50, 2).astype(dtype)
    path = tmp_path / "deeper" / f"samples{ending}"
    write_rows(path, x, ["a", "b, c"])
    back = read_rows(path, ["a", "b, c"])
    assert back.dtype == np.float64
    np.testing.assert_array_equal(back.astype(dtype), x)
    table = load_table(path)
    assert table.scale.columns == (("x1", "x2") if ending == ".npy" else ("a", "b, c"))


def test_nan_is_written_as_a_word(tmp_path):
    path = tmp_path / "scores.csv"
    write_rows(path, np.array([[0.5], [np.nan]]), ["log_prob"])
    assert path.read_text() == "log_prob\n0.5\nnan\n"


X = normal(30, 3)
HEADER = "a,b,c\n"
QUOTED = '"a","b","c"\n' + re.sub(r"[^,\n]+", r' "\g<0>"', lines(X))  # quoted, after a blank


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (lines(X), "x1 x2 x3"),
        (HEADER + lines(X), "a b c"),
        ("a; b ;c\n" + lines(X, ";"), "a b c"),
        ("a\tb\tc\n" + lines(X, "\t"), "a b c"),
        ("  a b   c\n" + lines(X, "   "), "a b c"),
        (lines(X, "\t ").replace("\n", "  \n"), "x1 x2 x3"),
        (
            "# from\n#\n\n" + HEADER + lines(X).replace("\n", "\n\n") + "# end, of, it, all\n",
            "a b c",
        ),
        (b"\xef\xbb\xbf" + (HEADER + lines(X)).encode(), "a b c"),
        (("a,b,c,\n" + lines(X)).replace("\n", ",\n").replace(",,", ","), "a b c"),
        (HEADER + lines(X).replace("\n", ",\n"), "a b c"),
        (QUOTED, "a b c"),
        (HEADER.replace("\n", "\r\n") + lines(X).replace("\n", "\r\n"), "a b c"),
        ("a,b,2019\n" + lines(X), "a b x2019"),
        ("a,,c\n" + lines(X), "a Unnamed:1 c"),
        ("a,#,c\n" + lines(X), "a # c"),
        ("0,1,2\n" + lines(X), "x0 x1 x2"),  # as pandas writes columns without names
        (",0,1\n" + lines(X), "Unnamed:0 x0 x1"),
    ],
)
def test_layouts_of_text(tmp_path, content, names):
    path = text(tmp_path, content)
    table = load_table(path, val_fraction=0.2, test_fraction=0.2)
    assert [name.replace(" ", "") for name in table.scale.columns] == names.split()
    np.testing.assert_array_equal(read_rows(path, table.scale.columns), X)
    zipped = text(tmp_path, gzip.compress(path.read_bytes()), "zipped.csv.gz")
    np.testing.assert_array_equal(read_rows(zipped, table.scale.columns), X)


def test_one_column_of_text_and_of_array(tmp_path):
    x = normal(50, 1)
    assert load_table(text(tmp_path, "depth\n" + lines(x))).scale.columns == ("depth",)
    table = load_table(saved(tmp_path, x[:, 0]))
    assert table.train.shape == (40, 1)
    assert table.warnings == ()


def test_integers_and_bytes_are_numbers(tmp_path):
    x = np.random.default_rng(0).integers(0, 200, (300, 2))
    np.testing.assert_array_equal(read_rows(saved(tmp_path, x.astype(np.uint8)), "ab"), x)


def test_npz_parts_keep_their_split(tmp_path):
    x = normal(100, 2)
    parts = {"train": x[:60], "val": x[60:80], "test": x[80:]}
    path = saved(tmp_path, None, **parts, columns=np.array(["u", "v"]), mean=np.zeros(2))
    table = load_table(path, seed=3)
    assert table.scale.columns == ("u", "v")
    np.testing.assert_allclose(table.scale.mean, x[:60].mean(axis=0))
    for name, rows in parts.items():
        np.testing.assert_allclose(table.scale.unstandardize(getattr(table, name)), rows, atol=1e-6)


def test_npz_without_val_cuts_it_from_train(tmp_path):
    x = normal(100, 2)
    table = load_table(saved(tmp_path, None, train=x[:80], test=x[80:]))
    assert [len(p) for p in (table.train, table.val, table.test)] == [72, 8, 20]
    np.testing.assert_allclose(table.scale.unstandardize(table.test), x[80:], atol=1e-6)
    held = np.concatenate([table.train, table.val])
    np.testing.assert_allclose(
        np.sort(table.scale.unstandardize(held), axis=0), np.sort(x[:80], axis=0), atol=1e-6
    )


def test_npz_with_one_table_of_any_name(tmp_path):
    path = saved(tmp_path, None, measured=normal(100, 2), columns=np.array([0, 7]))
    assert load_table(path).scale.columns == ("x0", "x7")  # a number always means a place


# What is refused


def stored(folder, content):
    """Save text or bytes, an array, or arrays by name."""
    if isinstance(content, dict):
        return saved(folder, None, **content)
    return saved(folder, content) if isinstance(content, np.ndarray) else text(folder, content)


def spoilt(cell, header=HEADER):
    """Put the cell in row 5, column 2."""
    rows = lines(X).splitlines()
    first, _, last = rows[4].split(",")
    rows[4] = f"{first},{cell},{last}"
    return "# made\n" + header + "\n".join(rows)


def spoilt_array(value, rows=X):
    rows = rows.copy()
    rows[4, 1] = value
    return rows


RAGGED = np.array([[1.0, 2.0], [3.0]], dtype=object)
SHIFTED = np.stack([*normal(100).T, 32 - 1.8 * normal(100)[:, 1]], axis=1)
ROUNDED = np.stack([*normal(100).T, np.round(3 * normal(100)[:, 1], 6)], axis=1)
CONSTANT = normal(100, 4) * [1, 0, 1, 0] + 3.5
LATE = np.where(np.arange(100)[:, None] < 60, normal(100, 2) * [1, 0], normal(100, 2))
# content, options of load_table, and what the error names
REFUSED = {
    "no rows": ("", {}, ["no rows"]),
    "only comments": ("# only\n# comments\n\n", {}, ["no rows"]),
    "only a header": ("a,b\n", {}, ["header"]),
    "not UTF-8": ((HEADER + lines(X)).encode("utf-16"), {}, ["UTF-8"]),
    "a header too short": ("a,b\n" + lines(X), {}, ["line 2", "3 cells", "2"]),
    "a header too long": ("a,b,c,d\n" + lines(X), {}, ["4 names", "3 columns"]),
    "a row too long": (HEADER + lines(X) + "1,2,3,4\n", {}, ["line 32", "4 cells", "3"]),
    "a row too short": (HEADER + "1,2\n" + lines(X), {}, ["line 3", "3 cells", "2"]),
    "a later row too short": (HEADER + lines(X) + "1,2\n", {}, ["column 3 (c)", "row 31"]),
    "a name twice": ("a,b,a\n" + lines(X), {}, ["'a'"]),
    "text": (spoilt("high"), {}, ["column 2 (b)", "row 5, 'high'", "drop=['b']"]),
    "underscores": (spoilt("1_000", header=""), {}, ["column 2 has", "'1_000'", "drop=['x2']"]),
    "a text column": (HEADER + "1,2,iris\n" * 30, {}, ["column 3 (c)", "30 of 30 rows", "'iris'"]),
    "a text column without a header": ("red,low\nblue,high\n", {}, ["column 1", "row 1, 'red'"]),
    "a slip in the first row": ("1.o,2,3\n" + lines(X), {}, ["column 1", "row 1, '1.o'"]),
    **{
        f"the cell {cell!r}": (spoilt(cell), {}, ["column 2 (b)", "row 5", "drop=['b']"])
        for cell in ("", "nan", "NA", "null", "inf", "-inf", "1e999")
    },
    "NaN": (spoilt_array(np.nan), {}, ["column 2", "row 5", "drop=['x2']"]),
    "infinity in a part": (
        {"train": X, "test": spoilt_array(np.inf)}, {}, ["test", "column 2", "row 5"]
    ),
    "objects": (RAGGED, {}, ["object array"]),
    "objects of an npz": ({"x": RAGGED}, {}, ["object array"]),
    "three axes": (normal(60, 4).reshape(60, 2, 2), {}, ["(60, 2, 2)"]),
    "strings": (np.array([["a", "b"]]), {}, ["<U1"]),
    "complex numbers": (X + 1j, {}, ["complex128"]),
    "two arrays": ({"a": X, "b": X}, {}, ["a (30, 3), b (30, 3)"]),
    "parts at odds": ({"train": X, "test": X[:, :2]}, {}, ["'train': 3, 'test': 2"]),
    "a name for three columns": ({"x": X, "columns": np.array(["a"])}, {}, ["1 names"]),
    **{
        f"an unknown column {name!r}": (HEADER + lines(X), {"drop": [name]}, [f"{str(name)!r}"])
        for name in ("d", "4", "0", -1)
    },
    "dropping all": (HEADER + lines(X), {"drop": ["a", "b", 3]}, ["drop"]),
    "no test part": (X, {"val_fraction": 0.5, "test_fraction": 0.5}, ["val_fraction=0.5"]),
    "no validation": (X, {"val_fraction": 0}, ["val_fraction=0"]),
    "a negative fraction": (X, {"test_fraction": -1}, ["test_fraction=-1"]),
    "no row to validate": (X, {"val_fraction": 1e-4}, ["30 rows", "val_fraction"]),
    "constant columns": (CONSTANT, {}, ["drop=['x2', 'x4']"]),
    "constant in training": (
        {"train": LATE[:60], "val": LATE[60:80], "test": LATE[80:]}, {}, ["60", "drop=['x2']"]
    ),
    "a copy": (np.hstack([X, X[:, 1:2]]), {}, ["x4 of x2", "drop=['x4']"]),
    "a shifted copy": (SHIFTED, {}, ["x4 of x2", "drop=['x4']"]),
    "a tiny copy": (SHIFTED * [1, 1, 1, 1e-9], {}, ["x4 of x2", "drop=['x4']"]),
    "a rounded copy": (ROUNDED, {}, ["x4 of x2", "drop=['x4']"]),
    "too few rows": (normal(11, 2), {}, ["10", "2 columns", "9"]),
    "too few rows for the columns": (normal(30, 24), {}, ["25", "24 columns", "24"]),
    "too large": ({"train": X, "test": spoilt_array(1e39)}, {}, ["train + test", "row 35", "x2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_table_is_refused(tmp_path, case):
    content, options, words = REFUSED[case]
    path = stored(tmp_path, content)
    with fails(*words) as refused:
        load_table(path, **options)
    assert str(path) in str(refused.value) or "fraction" in words[0]


def test_a_bad_path_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", X)
    for name, words in {
        "b.csv": ["no such file"], "": ["is a directory"],
        **{name: ["did you mean", tmp_path / "a.npy"] for name in ("a.csv", "a", "a.csv.gz")},
    }.items():  # fmt: skip
        with fails(tmp_path / name, *words):
            load_table(tmp_path / name)
    with fails("table.xlsx", ".csv, .csv.gz, .npy, .npz"):
        load_table(text(tmp_path, lines(X), "table.xlsx"))


@pytest.mark.parametrize("ending", [".csv.gz", ".npz", ".npy"])
def test_damaged_files_are_refused(tmp_path, ending):
    write_rows(tmp_path / f"a{ending}", X, "abc")
    data = (tmp_path / f"a{ending}").read_bytes()
    cut = len(data) // 2 if ending != ".npy" else 40  # a .npy has no checksum: harm its header
    garbled = data[: cut - 20] + bytes(range(100, 140)) + data[cut + 20 :]
    for harmed in (data[: len(data) // 2], garbled, b"", b"%PDF-1.4 not a table"):
        path = text(tmp_path, harmed, f"bad{ending}")
        with fails(path):
            load_table(path)


def test_bad_rows_to_score_or_write_are_refused(tmp_path):
    for content, columns, words in [
        (HEADER + lines(X), "abd", ["no column d", "a, b, c"]),
        (X, "ac", ["no column a", "x1, x2, x3"]),
        (spoilt("high"), "abc", ["column 2 (b)", "row 5, 'high'"]),
        ({"train": X, "test": X}, "abc", ["train, test"]),
        (X[:0], "abc", ["no rows"]),
    ]:
        path = stored(tmp_path, content)
        with fails(path, *words) as refused:
            read_rows(path, columns)
        assert "drop" not in str(refused.value)  # which is an argument of `load_table` alone
    with fails("(rows, 3)", "(400, 2)"):
        write_rows(tmp_path / "a.csv", normal(dim=2), "abc")
    with fails("a.parquet", ".csv.gz"):
        write_rows(tmp_path / "a.parquet", normal(dim=1), "a")


def test_csv_without_pandas_says_what_to_install(tmp_path, monkeypatch):
    path = text(tmp_path, lines(X))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with fails("pip install 'jcnf[tables]'"):
        load_table(path)


def test_columns_that_are_left_out_may_hold_anything(tmp_path):
    path = text(tmp_path, spoilt("high"))
    for drop in (["b"], [2], ["2"]):
        assert load_table(path, drop=drop).scale.columns == ("a", "c")
    assert load_table(saved(tmp_path, spoilt_array(np.nan)), drop=["2"]).scale.columns == (
        "x1",
        "x3",
    )


@pytest.mark.parametrize("cell", ["", "nan", "NA", "null"])
def test_missing_cells_are_nan_where_they_are_wanted(tmp_path, cell):
    rows = read_rows(text(tmp_path, spoilt(cell)), ("a", "b", "c"), missing=True)
    assert np.argwhere(np.isnan(rows)).tolist() == [[4, 1]]
    path = saved(tmp_path, rows)
    np.testing.assert_array_equal(read_rows(path, ("a", "b", "c"), missing=True), rows)


@pytest.mark.parametrize("content", [spoilt("inf"), spoilt("high"), spoilt_array(np.inf)])
def test_but_no_others_are(tmp_path, content):
    path = stored(tmp_path, content)
    with fails(path, "column 2", "row 5"):
        read_rows(path, ("a", "b", "c"), missing=True)


def test_huge_values_and_a_shared_outlier_are_fitted(tmp_path):
    x = normal(100, 2)
    huge = load_table(saved(tmp_path, x * 1e300))
    np.testing.assert_allclose(huge.train.std(axis=0), 1, rtol=1e-6)
    x[5] = 1e12
    assert load_table(saved(tmp_path, x)).scale.columns == ("x1", "x2")  # not copies


# What is doubtful


def changed(x, place, value):
    x = x.copy()
    x[place] = value
    return x


def determined(*functions, rows=3000):
    a, b, c = normal(rows, 3).T
    return np.stack([a, b, c, *(function(a, b, c) for function in functions)], axis=1)


RNG = np.random.default_rng(0)
UNIFORM = RNG.uniform(0, 3, (2000, 6))
UNIFORM[:, 5] = np.sin(UNIFORM[:, 0] * UNIFORM[:, 1]) + 0.1 * UNIFORM[:, 2]
COUNTS = normal(1000, 2)
COUNTS[:, 1] = RNG.integers(1, 20, 1000) * (RNG.random(1000) < 0.4)  # mostly zero
ATOMS = changed(normal(2000, 3), (slice(40), 1), 0.25)
ATOMS[:, 2] = np.minimum(ATOMS[:, 2], 2)  # an atom at the end
CLIPPED = (ATOMS[:, 2] == 2).sum()
COARSE = np.column_stack([np.round(5 * normal(1000, 1)), np.round(normal(1000, 2, 1) * 4) / 4])
COARSE[:, 2] = normal(1000, 1, 2)[:, 0]
LATTICE = RNG.integers(0, 10, (1000, 2))
WIDE = normal(1000, 64)
# rows, and for each expected warning the words that it has, in their order
WARNED = {
    "a clean table": (UNIFORM.astype(np.float32), []),
    "print with enough digits": (np.round(UNIFORM, 4), []),
    "duplicate rows": (
        changed(normal(1000, 2), slice(100, 110), normal(1000, 2)[0]),
        [["10 of 1000 rows", "unbounded", "dequantize=True"]],
    ),
    "atoms": (ATOMS, [["x2 (0.25 in 40", f"x3 (2 in {CLIPPED} rows)", "drop=['x2', 'x3']"]]),
    "a frequent step": (COUNTS, [["x2 (20 distinct, steps of 1)", "dequantize=True"]]),
    "coarse print": (
        COARSE, [["x1", "steps of 1)", "x2", "steps of 0.25)", "drop=['x1', 'x2']"]]
    ),
    "a lattice": (LATTICE, [["x1 (10 distinct, steps of 1), x2 (10 distinct"]]),
    "one coarse column": (LATTICE[:, 0], [["x1 (10 distinct"]]),
    "a row number": (changed(normal(50), (slice(None), 1), np.arange(50) + 7), [["x2", "['x2']"]]),
    "a sum": (
        determined(lambda a, b, c: a - 2 * c), [["x4 follows from x1, x3 (linear", "drop=['x4']"]]
    ),
    "nearly another column": (
        determined(lambda a, b, c: b + 1e-3 * c**2), [["x4 follows from x2 (linear, 1 - R2 = 2e-"]]
    ),
    "a product of powers": (
        np.exp(determined(lambda a, b, c: 2 * a - b)), [["x4 follows from x1^2, x2^-1 (a product"]]
    ),
    "a product": (determined(lambda a, b, c: (a + 3) * c), [["x4 follows from x1, x3 (quadratic"]]),
    "a sum of squares": (
        determined(lambda a, b, c: a**2 - b**2 + c), [["x4 follows from x1, x2, x3 (quadratic"]]
    ),
    "two kinds of relations": (
        determined(lambda a, b, c: a * c, lambda a, b, c: a + b),
        [["x5 follows from x1, x2 (linear"], ["x4 follows from x1, x3 (quadratic"]],
    ),
    "nearly a product": (
        determined(lambda a, b, c: a * b + 0.05 * np.sin(9 * c)), []
    ),
    "two relations": (
        determined(lambda a, b, c: a + b, lambda a, b, c: b - c),
        [["x4 follows from x1, x2"], ["x5 follows from x2, x3"]],
    ),
    "nearly a sum": (determined(lambda a, b, c: a + b + 0.05 * np.sin(9 * c)), []),
    "few rows": (normal(40, 12), []),
    "an outlier in all": (changed(normal(2000, 3), 7, [1e5, -2e5, 3e5]), []),
    "a wide table": (
        np.column_stack([WIDE, WIDE[:, 3] - WIDE[:, 60]]), [["x65 follows from x4, x61 (linear"]]
    ),
    "a sum of all": (
        np.column_stack([WIDE, WIDE.sum(axis=1)]), [["x65 follows", "(64 in all) (linear"]]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_a_doubtful_table_warns(tmp_path, case):
    rows, expected = WARNED[case]
    warnings = load_table(saved(tmp_path, rows)).warnings
    assert len(warnings) == len(expected), warnings
    for line, words in zip(warnings, expected, strict=True):
        assert re.fullmatch(".*" + ".*".join(map(re.escape, words)) + ".*", line)


def test_warnings_of_a_dequantized_table(tmp_path):
    duplicates, noise = load_table(
        saved(tmp_path, WARNED["duplicate rows"][0]), dequantize=True
    ).warnings
    assert "only blurred" in duplicates
    assert "dequantized x1" in noise
    atoms, _ = load_table(saved(tmp_path, ATOMS), dequantize=True).warnings
    assert "x2 (0.25 in 40 rows)" in atoms
    (noise,) = load_table(saved(tmp_path, COARSE), dequantize=True).warnings
    assert "dequantized x1 (1), x2 (0.25):" in noise
    assert "x3" not in noise
    (noise,) = load_table(saved(tmp_path, X), dequantize=True).warnings
    assert "changed nothing" in noise


@pytest.mark.parametrize("name", ["", "index", "Unnamed: 0"])
def test_the_index_of_a_data_frame_is_left_out(tmp_path, name):
    shuffled = np.random.default_rng(0).permutation(60)[:30]
    for index in (np.arange(30), np.arange(1, 31), shuffled):
        rows = [f"{i},{line}" for i, line in zip(index, lines(X).splitlines(), strict=True)]
        path = text(tmp_path, f"{name},a,b,c\n" + "\n".join(rows))
        table = load_table(path)
        assert table.scale.columns == ("a", "b", "c")
        (warning,) = table.warnings
        assert (name or "Unnamed: 0") in warning
        np.testing.assert_array_equal(read_rows(path, table.scale.columns), X)
        assert load_table(path, drop=[1]).warnings == ()


@pytest.mark.parametrize("first", [X[:, 0], np.arange(30) // 2, np.arange(30) + 0.5])
def test_other_first_columns_are_kept(tmp_path, first):
    path = text(tmp_path, ",b,c\n" + lines(np.column_stack([first, X[:, 1:]])))
    assert load_table(path, dequantize=True).scale.columns == ("Unnamed: 0", "b", "c")


# Dequantizing


def test_noise_is_one_step_wide_seeded_and_before_the_split(tmp_path):
    x = normal(1000, 2)
    x[:, 0] = np.round(20 * x[:, 0]) * 0.5
    path = saved(tmp_path, x)
    table, again, other = (load_table(path, dequantize=True, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(table.train, again.train)
    values = whole(table)
    noise = values[:, 0] - np.round(values[:, 0] * 2) / 2
    assert abs(noise).max() <= 0.25 + 1e-6
    assert noise.std() == pytest.approx(0.5 / math.sqrt(12), rel=0.1)
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert len(np.unique(values[:, 0])) > 990
    np.testing.assert_allclose(np.sort(values[:, 1]), np.sort(x[:, 1]), atol=1e-6)
    assert not np.array_equal(np.sort(whole(other)[:, 0]), np.sort(values[:, 0]))


@pytest.mark.parametrize(
    ("column", "step"),
    [
        (lambda x: np.round(10 * x), 1.0),
        (lambda x: np.round(50 * x) * 0.1, 0.1),  # 0.1 + 0.2 != 0.3: rounding is not a step
        (lambda x: np.array([float(f"{value:.3g}") for value in 1e3 * np.exp(x)]), 1.0),
        (lambda x: np.concatenate([np.round(10 * x), [0.995]]), 1.0),  # one typo
        (lambda x: (x > 0) * 7.0, 7.0),
        (lambda x: np.round(2e4 * np.random.default_rng(1).random(x.shape)), 1.0),  # sparse
        (lambda x: x, 0.0),
        (lambda x: x * 0, 0.0),
    ],
)
def test_resolution(column, step):
    x = column(normal(5000, 1)[:, 0])
    assert resolutions(x[:, None])[0] == pytest.approx(step, rel=1e-6)


def test_levels_merge_rounding():
    one = Levels.of(np.array([0.3, 0.1 + 0.2, 0.5, -0.5, 0.3]))
    np.testing.assert_allclose(one.values, [-0.5, 0.3, 0.5])
    assert one.counts.tolist() == [1, 3, 1]


def test_jitter_leaves_columns_without_a_step():
    x = normal(100, 2)
    noisy = jitter(x, np.array([0.0, 2.0]), np.random.default_rng(0))
    np.testing.assert_array_equal(noisy[:, 0], x[:, 0])
    assert 0.9 < abs(noisy[:, 1] - x[:, 1]).max() <= 1


# Rows to score


def test_columns_are_put_in_the_models_order(tmp_path):
    path = text(tmp_path, "b,c,a\n" + lines(X))
    np.testing.assert_array_equal(read_rows(path, ["a", "b", "c"]), X[:, [2, 0, 1]])
    np.testing.assert_array_equal(read_rows(path, ["x1", "x2", "x4"]), X)  # by number
    np.testing.assert_array_equal(read_rows(saved(tmp_path, X), ["a", "b", "c"]), X)
    np.testing.assert_array_equal(read_rows(path, ["a", "b"]), X[:, [2, 0]])


def test_columns_left_out_in_training_may_still_be_there(tmp_path):
    path = text(tmp_path, HEADER + lines(X))
    np.testing.assert_array_equal(read_rows(path, ["a", "c"]), X[:, [0, 2]])
    np.testing.assert_array_equal(read_rows(saved(tmp_path, X), ["x1", "x3"]), X[:, [0, 2]])


def test_columns_are_taken_with_their_scale(tmp_path):
    path = tmp_path / "table.csv"
    x = np.random.default_rng(0).normal([1.0, 5.0, -3.0], [1.0, 2.0, 0.5], (100, 3))
    np.savetxt(path, x, delimiter=",", header="a,b,c", comments="")
    table = load_table(path)
    places = table.scale.positions(["c", "1"])
    assert places == [0, 2]
    part = table.take(places)
    assert part.scale.columns == ("a", "c")
    np.testing.assert_array_equal(part.test, table.test[:, [0, 2]])
    np.testing.assert_allclose(
        part.scale.unstandardize(part.train), table.scale.unstandardize(table.train)[:, [0, 2]]
    )
