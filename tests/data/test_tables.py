"""Tests of every format, error and warning of tables, each on a small file."""

import gzip
import math
import re

import numpy as np
import pytest

from jcnf._checks import InputError
from jcnf.data.tables import Levels, dequantize, load_table, read_rows, resolutions, write_rows


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


def fails(*parts, path):
    """Expect a one-line error that contains all of `parts` and the path."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in (*parts, str(path)))
    return pytest.raises(InputError, match=rf"\A{pattern}[^\n]*\Z")


def warned(table, *parts):
    found = [line for line in table.warnings if all(part in line for part in parts)]
    assert len(found) == 1, table.warnings
    assert "\n" not in found[0]
    return found[0]


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
    with pytest.raises(InputError, match=r"shape \(rows, 3\).*got \(3,\)"):
        table.scale.standardize(x[0])
    with pytest.raises(InputError, match=r"got \(400, 2\)"):
        table.scale.unstandardize(x[:, :2])


def test_rows_too_large_for_float32_are_named(tmp_path):
    scale = load_table(saved(tmp_path, normal())).scale
    rows = np.zeros((3, 3))
    rows[1, 0] = 1e60
    with pytest.raises(InputError, match=f"row 2, column {scale.columns[0]}.*float32"):
        scale.standardize(rows)


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
    for val, test in ((0.5, 0.5), (0, 0.1), (0.1, -1)):
        with pytest.raises(InputError, match=r"val_fraction=.* leave a part empty"):
            load_table(path, val_fraction=val, test_fraction=test)
    with fails("200 rows are too few", "larger val_fraction", path=path):
        load_table(path, val_fraction=1e-4)


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


def test_writing_checks_shape_and_ending(tmp_path):
    with fails("shape (rows, 3)", "(400, 2)", path=tmp_path):
        write_rows(tmp_path / "a.csv", normal(dim=2), ["a", "b", "c"])
    with fails("unknown ending", ".csv.gz", path=tmp_path):
        write_rows(tmp_path / "a.parquet", normal(dim=1), ["a"])


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
        (",b,c\n" + lines(X), "x1 b c"),
    ],
)
def test_layouts_of_text(tmp_path, content, names):
    path = text(tmp_path, content)
    table = load_table(path, val_fraction=0.2, test_fraction=0.2)
    assert table.scale.columns == tuple(names.split())
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
    with fails("parts train, val, test", "one 2-D array", path=path):
        read_rows(path, ["u", "v"])


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


# Errors: files


def test_missing_file(tmp_path):
    with fails("no such file", "check the path", path=tmp_path / "a.csv"):
        load_table(tmp_path / "a.csv")
    np.save(tmp_path / "a.npy", X)
    for name in ("a.csv", "a", "a.csv.gz"):
        with fails("no such file", f"did you mean {tmp_path / 'a.npy'}?", path=tmp_path / name):
            load_table(tmp_path / name)
    with fails("is a directory", path=tmp_path):
        load_table(tmp_path)


def test_unknown_ending(tmp_path):
    path = text(tmp_path, lines(X), "table.xlsx")
    with fails("unknown ending", ".csv, .csv.gz, .npy, .npz", path=path):
        load_table(path)


def whole_files(tmp_path):
    write_rows(tmp_path / "a.csv.gz", X, "abc")
    write_rows(tmp_path / "a.npz", X, "abc")
    write_rows(tmp_path / "a.npy", X, "abc")
    return {end: (tmp_path / f"a{end}").read_bytes() for end in (".csv.gz", ".npz", ".npy")}


@pytest.mark.parametrize("ending", [".csv.gz", ".npz", ".npy"])
@pytest.mark.parametrize("harm", ["truncated", "garbled", "empty", "another"])
def test_damaged_files(tmp_path, ending, harm):
    data = whole_files(tmp_path)[ending]
    half = len(data) // 2
    cut = half if ending != ".npy" else 40  # a .npy has no checksum: harm its header
    harmed = {
        "truncated": data[:half],
        "garbled": data[: cut - 20] + bytes(range(100, 140)) + data[cut + 20 :],
        "empty": b"",
        "another": b"%PDF-1.4 not a table",
    }
    path = text(tmp_path, harmed[harm], f"bad{ending}")
    words = "has no rows|cannot be read|is not a complete numpy file|not UTF-8"
    with pytest.raises(InputError, match=rf"\A{re.escape(str(path))}[^\n]*({words})[^\n]*\Z"):
        load_table(path)


def test_text_that_is_not_utf8(tmp_path):
    path = text(tmp_path, (HEADER + lines(X)).encode("utf-16"))
    with fails("not UTF-8", "save the table as UTF-8", path=path):
        load_table(path)


def test_object_arrays_are_never_unpickled(tmp_path):
    ragged = np.array([[1.0, 2.0], [3.0]], dtype=object)
    path = saved(tmp_path, ragged)
    with fails("object array", "np.asarray(x, dtype=float)", path=path):
        load_table(path)
    path = saved(tmp_path, None, x=ragged)
    with fails("object array", path=path):
        load_table(path)


def test_shapes_and_types_of_arrays(tmp_path):
    path = saved(tmp_path, normal(60, 4).reshape(60, 2, 2))
    with fails("shape (60, 2, 2)", "x.reshape(len(x), -1)", path=path):
        load_table(path)
    path = saved(tmp_path, np.array([["a", "b"]]))
    with fails("<U1", "not real numbers", path=path):
        load_table(path)
    path = saved(tmp_path, X + 1j)
    with fails("complex128", path=path):
        load_table(path)
    path = saved(tmp_path, None, a=X, b=X)
    with fails("has the arrays a (30, 3), b (30, 3)", "train and test", path=path):
        load_table(path)
    path = saved(tmp_path, None, train=X, test=X[:, :2])
    with fails("unequal numbers of columns", path=path):
        load_table(path)
    path = saved(tmp_path, None, x=X, columns=np.array(["a"]))
    with fails("1 names for 3 columns", path=path):
        load_table(path)


@pytest.mark.parametrize("content", ["", "\n\n", "# only\n# comments\n"])
def test_no_rows(tmp_path, content):
    path = text(tmp_path, content)
    with fails("has no rows", path=path):
        load_table(path)


def test_header_alone_and_headers_at_odds(tmp_path):
    path = text(tmp_path, "a,b\n")
    with fails("a header but no rows", path=path):
        load_table(path)
    path = text(tmp_path, "a,b\n" + lines(X))
    with fails("header has 2 names", "(line 2) has 3 cells", path=path):
        load_table(path)
    path = text(tmp_path, "a,b,a\n" + lines(X))
    with fails("two columns are named 'a'", "rename", path=path):
        load_table(path)


# Errors: cells


def spoilt(tmp_path, cell, header=HEADER):
    """Put the cell in row 5, column 2, which is line 7 below a comment and a header."""
    rows = lines(X).splitlines()
    first, _, last = rows[4].split(",")
    rows[4] = f"{first},{cell},{last}"
    return text(tmp_path, "# made\n" + header + "\n".join(rows))


def test_text_in_a_row(tmp_path):
    path = spoilt(tmp_path, "high")
    where = ("row 5 (line 7), column 2 (b)", "the text 'high'", "drop=['b']")
    with fails(*where, path=path):
        load_table(path)
    assert load_table(path, drop=["b"]).scale.columns == ("a", "c")
    path = spoilt(tmp_path, "1_000", header="")
    with fails("row 5 (line 6), column 2 holds", "'1_000'", "drop=['x2']", path=path):
        load_table(path)


def test_a_text_column_or_a_slip_is_no_header(tmp_path):
    path = text(tmp_path, "".join(f"{line},iris\n" for line in lines(X).splitlines()))
    with fails("row 1 (line 1), column 4", "'iris'", "drop=['x4']", path=path):
        load_table(path)
    np.testing.assert_array_equal(read_rows(path, ["x1", "x2", "x3"]), X)
    path = text(tmp_path, "red,low\nblue,high\n")
    with fails("row 1 (line 1), column 1 holds the text 'red'", path=path):
        load_table(path)
    path = text(tmp_path, "1.o,2,3\n" + lines(X))
    with fails("row 1 (line 1), column 1", "'1.o'", path=path):
        load_table(path)


@pytest.mark.parametrize("cell", ["", "nan", "NA", "null", "inf", "-inf", "1e999"])
def test_missing_and_infinite_cells(tmp_path, cell):
    path = spoilt(tmp_path, cell)
    found = f"'{cell}' is not a finite number" if cell else "an empty cell"
    with fails("row 5 (line 7), column 2 (b)", found, "(1 in total)", "drop=['b']", path=path):
        load_table(path)
    assert load_table(path, drop=["2"]).scale.columns == ("a", "c")


@pytest.mark.parametrize("cell", ["", "nan", "NA", "null"])
def test_missing_cells_are_nan_where_they_are_wanted(tmp_path, cell):
    rows = read_rows(spoilt(tmp_path, cell), ("a", "b", "c"), missing=True)
    assert list(np.argwhere(np.isnan(rows))[0]) == [4, 1]
    assert np.isnan(rows).sum() == 1
    x = rows.copy()
    np.testing.assert_array_equal(read_rows(saved(tmp_path, x), ("a", "b", "c"), missing=True), x)


@pytest.mark.parametrize("cell", ["inf", "high"])
def test_but_no_others(tmp_path, cell):
    path = spoilt(tmp_path, cell)
    with fails("row 5 (line 7), column 2 (b)", cell, path=path):
        read_rows(path, ("a", "b", "c"), missing=True)
    x = X.copy()
    x[4, 1] = np.inf
    with fails("row 5, column 2", path=(path := saved(tmp_path, x))):
        read_rows(path, ("a", "b", "c"), missing=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_in_arrays(tmp_path, value):
    x = X.copy()
    x[4, 1] = x[9, 0] = value
    path = saved(tmp_path, x)
    with fails("row 5, column 2:", f"'{value}'", "(2 in total)", "drop=['x2']", path=path):
        load_table(path)
    path = saved(tmp_path, None, train=X, test=x)
    with fails("test row 5, column 2:", "(2 in total)", path=path):
        load_table(path)


@pytest.mark.parametrize(("row", "cells"), [("1,2", 2), ("1,2,3,4", 4), ('1,"2,3"', 2)])
def test_ragged_rows(tmp_path, row, cells):
    path = text(tmp_path, HEADER + lines(X[:3]) + row + "\n" + lines(X[3:]))
    with fails("row 4 (line 5)", f"has {cells} cells, expected 3", path=path):
        load_table(path)
    with fails("row 4 (line 5)", path=path):
        load_table(path, drop=["c"])


def test_values_beyond_float32(tmp_path):
    x = normal(100, 2)
    far = x.copy()
    far[3, 1] = 1e39
    path = saved(tmp_path, None, train=x, val=x, test=far)
    with fails("test row 4, column x2", "too large for float32", "drop=['x2']", path=path):
        load_table(path)
    huge = load_table(saved(tmp_path, x * 1e300))
    np.testing.assert_allclose(huge.train.std(axis=0), 1, rtol=1e-6)


# Errors: columns


def test_dropping(tmp_path):
    path = text(tmp_path, HEADER + lines(X))
    assert (
        load_table(path, drop=["b"]).scale.columns
        == load_table(path, drop=[2]).scale.columns
        == ("a", "c")
    )
    assert load_table(saved(tmp_path, X), drop=["2"]).scale.columns == ("x1", "x3")
    for unknown in ("d", "4", "0", -1):
        with fails(f"no column {str(unknown)!r} to drop", "a, b, c", "number 1 to 3", path=path):
            load_table(path, drop=[unknown])
    with fails("drop leaves none of the 3 columns", path=path):
        load_table(path, drop=["a", "b", 3])


def test_constant_columns(tmp_path):
    x = normal(100, 4)
    x[:, [1, 3]] = 3.5
    path = saved(tmp_path, x)
    with fails("constant", "x2, x4", "drop=['x2', 'x4']", path=path):
        load_table(path)
    x = normal(100, 2)
    x[:60, 1] = 0  # in the training part only
    path = saved(tmp_path, None, train=x[:60], val=x[60:80], test=x[80:])
    with fails("constant in the 60 training rows", "drop=['x2']", path=path):
        load_table(path)


@pytest.mark.parametrize(
    "copy",
    [
        lambda c: c,
        lambda c: 32 + 1.8 * c,
        lambda c: -1e-9 * c,
        lambda c: np.round(3 * c, 6),
    ],
)
def test_copies_of_a_column(tmp_path, copy):
    x = normal(100, 3)
    path = saved(tmp_path, np.stack([*x.T, copy(x[:, 1])], axis=1))
    with fails("exact copies", "x4 of x2", "drop=['x4']", path=path):
        load_table(path)


def test_a_shared_outlier_makes_no_copies(tmp_path):
    x = normal(100, 2)
    x[5] = 1e12
    assert load_table(saved(tmp_path, x)).scale.columns == ("x1", "x2")


def test_too_few_rows(tmp_path):
    path = saved(tmp_path, normal(11, 2))
    with fails("at least 10 training rows for 2 columns; got 9", path=path):
        load_table(path)
    path = saved(tmp_path, normal(30, 24))
    with fails("at least 25 training rows for 24 columns; got 24", "drop=", path=path):
        load_table(path)


# Warnings


def test_a_clean_table_warns_of_nothing(tmp_path):
    x = np.random.default_rng(0).uniform(0, 3, (2000, 6))
    x[:, 5] = np.sin(x[:, 0] * x[:, 1]) + 0.1 * x[:, 2]
    assert load_table(saved(tmp_path, x.astype(np.float32))).warnings == ()
    assert load_table(saved(tmp_path, np.round(x, 4))).warnings == ()  # printed with enough digits


def test_duplicate_rows(tmp_path):
    x = normal(1000, 2)
    x[100:110] = x[0]
    path = saved(tmp_path, x)
    table = load_table(path)
    assert len(table.warnings) == 1
    warned(table, "10 of 1000 rows repeat an earlier row", "unbounded", "dequantize=True")
    blurred = load_table(path, dequantize=True)
    warned(blurred, "10 of 1000 rows", "only blurred")
    assert len(np.unique(whole(blurred).round(12), axis=0)) == 1000


def test_atoms(tmp_path):
    x = normal(2000, 3)
    x[:40, 1] = 0.25
    x[x[:, 2] > 2, 2] = 2  # clipped: an atom at the end
    path = saved(tmp_path, x)
    count = (x[:, 2] == 2).sum()
    table = load_table(path)
    line = warned(table, "x2 (0.25 in 40 rows)", f"x3 (2 in {count} rows)", "drop=['x2', 'x3']")
    assert "dequantizing does not remove" in line
    assert len(table.warnings) == 1
    blurred = load_table(path, dequantize=True)
    warned(blurred, "dequantizing does not remove", "x2 (0.25 in 40 rows)")


def test_a_frequent_step_is_no_atom(tmp_path):
    rng = np.random.default_rng(0)
    x = normal(1000, 2)
    x[:, 1] = rng.integers(1, 20, 1000) * (rng.random(1000) < 0.4)  # counts, mostly zero
    table = load_table(saved(tmp_path, x))
    assert len(table.warnings) == 1
    warned(table, "column x2 (20 distinct, steps of 1)", "dequantize=True")


def test_integers_and_coarse_print(tmp_path):
    x = normal(1000, 3)
    x[:, 0] = np.round(5 * x[:, 0])
    x[:, 1] = np.round(x[:, 1] * 4) / 4
    path = saved(tmp_path, x)
    table = load_table(path)
    distinct = len(np.unique(x[:, 0]))
    warned(table, f"x1 ({distinct} distinct, steps of 1)", "steps of 0.25", "the 1000 rows",
           "dequantize=True", "drop=['x1', 'x2']")  # fmt: skip
    assert len(table.warnings) == 1
    line = warned(load_table(path, dequantize=True), "dequantized columns x1 (1), x2 (0.25):")
    assert "x3" not in line


def test_a_lattice_has_steps_not_duplicates(tmp_path):
    x = np.random.default_rng(0).integers(0, 10, (1000, 2))
    table = load_table(saved(tmp_path, x))
    assert len(table.warnings) == 1
    warned(table, "1000 rows of columns x1 (10 distinct, steps of 1), x2 (10 distinct, steps of 1)")
    table = load_table(saved(tmp_path, x[:, 0]))
    warned(table, "column x1 (10 distinct")


def test_names_in_advice_are_a_python_list(tmp_path):
    x = np.round(normal(500, 2), 1)
    path = text(tmp_path, "wind speed,b\n" + lines(x))
    warned(load_table(path), "drop=['wind speed', 'b']")


@pytest.mark.parametrize(
    ("columns", "explanation"),
    [
        (lambda a, b, c: [a, b, c, a * b], "x4 follows from x1 x x2 (a product)"),
        (lambda a, b, c: [a, b, c, (a + 3) * (c - 1)], "x4 follows from x1, x3 (squares and prod"),
        (lambda a, b, c: [a, b, c, a**2 - b**2 + c], "x4 follows from x1, x2, x3 (squares and"),
        (lambda a, b, c: [a, b, c, a - 2 * c], "x4 follows from x1, x3 (linear)"),
        (lambda a, b, c: [a, b, c, b + 1e-3 * c**2], "x4 follows from x2 (linear)"),
        (lambda a, b, c: [a, c, *np.exp([a, b, 2 * a - b])], "x5 follows from x3^2 x4^-1 (a pro"),
    ],
)
def test_determined_columns(tmp_path, columns, explanation):
    x = np.stack(columns(*normal(3000, 3).T), axis=1)
    table = load_table(saved(tmp_path, x))
    line = warned(table, f"column {explanation}", "1 - R2 = ", "unbounded")
    assert line.endswith(f"drop=[{line.split()[1]!r}]")
    assert len(table.warnings) == 1, table.warnings


def test_each_relation_is_reported_once(tmp_path):
    a, b, c = normal(2000, 3).T
    table = load_table(saved(tmp_path, np.stack([a, b, a + b, c, a * c], axis=1)))
    assert len(table.warnings) == 2
    warned(table, "x3 follows from x1, x2 (linear)")
    warned(table, "x5 follows from x1 x x4 (a product)")


def test_near_dependence_and_few_rows_are_no_dependence(tmp_path):
    x = normal(2000, 2)
    x = np.column_stack([x, x[:, 0] * x[:, 1] + 0.05 * normal(2000, 1, seed=1)[:, 0]])
    assert load_table(saved(tmp_path, x)).warnings == ()
    assert load_table(saved(tmp_path, normal(40, 12))).warnings == ()  # fewer rows than products


def test_outliers_alone_make_no_dependence(tmp_path):
    x = normal(2000, 3)
    x[7] = [1e5, -2e5, 3e5]
    assert load_table(saved(tmp_path, x)).warnings == ()


def test_wide_tables_are_checked_too(tmp_path):
    x = normal(1000, 64)
    x[:, 40] = x[:, 3] - x[:, 60]
    table = load_table(saved(tmp_path, x))
    assert len(table.warnings) == 1
    warned(table, "column x61 follows from x4, x41 (linear)")
    x = normal(1000, 64)
    x[:, 9] = -np.delete(x, 9, axis=1).sum(axis=1)
    warned(load_table(saved(tmp_path, x)), "x64 follows from 63 others together")


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


def test_dequantizing_what_never_repeats_says_so(tmp_path):
    x = normal(500, 2)
    table = load_table(saved(tmp_path, x), dequantize=True)
    warned(table, "changed nothing")
    np.testing.assert_allclose(np.sort(whole(table), axis=0), np.sort(x, axis=0), atol=1e-6)


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


def test_dequantize_leaves_columns_without_a_step():
    x = normal(100, 2)
    noisy = dequantize(x, np.array([0.0, 2.0]), np.random.default_rng(0))
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


def test_rows_of_other_columns(tmp_path):
    path = text(tmp_path, HEADER + lines(X))
    with fails("no column d", "a, b, d", "the file has the 3 a, b, c", path=path):
        read_rows(path, ["a", "b", "d"])
    with fails("row 5 (line 7)", "'high'", path=tmp_path):
        read_rows(spoilt(tmp_path, "high"), ["a", "b", "c"])
    path = saved(tmp_path, X)
    with fails("no column a", "the 2 columns a, c", "the 3 x1, x2, x3", path=path):
        read_rows(path, ["a", "c"])


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
    for wanted, said in ((["q"], "no column q: the columns are a"), (["a", 1], "named twice")):
        with pytest.raises(InputError, match=said):
            table.scale.positions(wanted)
