"""Tests of image files in every format, and of dequantizing."""

import gzip
import math
import os
import pickle
import struct
import tarfile
import urllib.error

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jcnf._checks import InputError
from jcnf.data import images
from jcnf.data.images import load_digits_table, load_images, read_images
from jcnf.evaluate.log_prob import bits_per_dim

RNG = np.random.default_rng(0)
GRAY = {"train": (20, 28, 28), "test": (7, 28, 28)}
IDX = {"train": "train", "test": "t10k"}


def gray(shape):
    return RNG.integers(0, 256, shape, np.uint8)


def mnist():
    """Make x_train, y_train and so on: a small MNIST."""
    x = {f"x_{part}": gray(shape) for part, shape in GRAY.items()}
    return x | {f"y_{part}": gray(shape[:1]) % 10 for part, shape in GRAY.items()}


def write_npz(path, arrays):
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(path, arrays, ending="-ubyte", zipped=False):
    for part, prefix in IDX.items():
        for kind, letter, axes in (("images", "x", 3), ("labels", "y", 1)):
            data = idx(arrays[f"{letter}_{part}"])
            name = f"{prefix}-{kind}-idx{axes}{ending}"
            (path / name).write_bytes(gzip.compress(data) if zipped else data)
    return path


def write_idx_gz(path, arrays):
    return write_idx(path, arrays, "-ubyte.gz", zipped=True)


def flat(x):
    return x.reshape(len(x), -1)


@pytest.mark.parametrize("write", [write_npz, write_idx, write_idx_gz])
def test_load_images_gray_images_come_back_with_the_last_tenth_for_validation(tmp_path, write):
    arrays = mnist()
    images = load_images("mnist", write(tmp_path, arrays))
    assert (images.shape, images.levels) == ((28, 28, 1), 256)
    assert images.train.dtype == images.val.dtype == images.test.dtype == np.uint8
    np.testing.assert_array_equal(images.train, flat(arrays["x_train"])[:18])
    np.testing.assert_array_equal(images.val, flat(arrays["x_train"])[18:])
    np.testing.assert_array_equal(images.test, flat(arrays["x_test"]))
    np.testing.assert_array_equal(images.labels["train"], arrays["y_train"][:18])
    np.testing.assert_array_equal(images.labels["val"], arrays["y_train"][18:])
    np.testing.assert_array_equal(images.labels["test"], arrays["y_test"])


def test_load_images_validation_has_at_most_5000_images(tmp_path):
    arrays = {"x_train": np.zeros((51_000, 28, 28), np.uint8), "x_test": gray(GRAY["test"])}
    images = load_images("fashion_mnist", write_npz(tmp_path, arrays))
    assert (len(images.train), len(images.val), images.labels) == (46_000, 5000, None)


def test_one_idx_file_and_the_part_that_is_there(tmp_path):
    arrays = mnist()
    write_idx(tmp_path, arrays)
    one = read_images(tmp_path / "train-images-idx3-ubyte")
    np.testing.assert_array_equal(one.pixels, flat(arrays["x_train"]))
    assert (one.labels, one.shape) == (None, (28, 28, 1))
    named = load_images("mnist", tmp_path / "t10k-images-idx3-ubyte")  # and the files next to it
    np.testing.assert_array_equal(named.test, flat(arrays["x_test"]))
    for file in tmp_path.glob("train-*"):
        file.unlink()
    np.testing.assert_array_equal(read_images(tmp_path).pixels, flat(arrays["x_test"]))
    np.testing.assert_array_equal(read_images(tmp_path).labels, arrays["y_test"])
    with pytest.raises(InputError, match=r"has t10k-images-idx3-ubyte, .* but no train"):
        load_images("mnist", tmp_path)


def test_names_of_idx_files_with_a_dot(tmp_path):
    arrays = mnist()
    for file in list(write_idx(tmp_path, arrays).iterdir()):
        file.rename(tmp_path / file.name.replace("-idx", ".idx"))
    np.testing.assert_array_equal(load_images("mnist", tmp_path).test, flat(arrays["x_test"]))


@pytest.mark.parametrize("arrays", [{"x_test": 4, "y_test": 4}, {"anything": 4}])
def test_an_npz_without_a_training_part(tmp_path, arrays):
    x = gray((4, 5, 6, 3))
    arrays = {name: x if name[0] != "y" else np.arange(n) for name, n in arrays.items()}
    read = read_images(write_npz(tmp_path, arrays))
    np.testing.assert_array_equal(read.pixels, flat(x))  # height, width, channels
    assert read.shape == (5, 6, 3)
    assert (read.labels is None) == ("y_test" not in arrays)


# CIFAR-10


def cifar():
    """Make pixels (n, 3, 32, 32) and labels for each batch."""
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {name: (gray((i + 2, 3, 32, 32)), gray(i + 2) % 10) for i, name in enumerate(names)}


def binary(x, y):
    return np.concatenate([y[:, None], flat(x)], axis=1).tobytes()


def python2(x, y):
    """Pickle a batch as Python 2 does (protocol 2, strings are bytes), with opcodes by hand.

    U is a short string, T a long one, K a byte, M two bytes, c a global, R a call, b the state.
    """

    def short(text):
        return b"U" + bytes([len(text)]) + text

    data = b"T" + struct.pack("<i", x.size) + x.tobytes()
    shape = b"K" + bytes([len(x)]) + b"M" + struct.pack("<H", 3072) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b")
    array += b"\x87R(K\x01" + shape + dtype + b"\x89" + data + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in y) + b"e"
    batch = short(b"data") + array + short(b"labels") + labels
    return b"\x80\x02}(" + batch + short(b"batch_label") + short(b"one of 5") + b"u."


def write_batches(path, batches, pack, ending=""):
    path.mkdir()
    for name, (x, y) in batches.items():
        (path / f"{name}{ending}").write_bytes(pack(x, y))
    (path / "batches.meta").write_bytes(b"names of the classes, which are not read")
    return path


def packed(path):
    archive = path.with_name("cifar-10.tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(path, path.name)
    return archive


@pytest.mark.parametrize("archived", [False, True], ids=["folder", "tar.gz"])
@pytest.mark.parametrize(("pack", "ending"), [(binary, ".bin"), (python2, "")])
def test_cifar10(tmp_path, pack, ending, archived):
    batches = cifar()
    folder = write_batches(tmp_path / "cifar-10-batches", batches, pack, ending)
    images = load_images("cifar10", packed(folder) if archived else folder)
    x, y = (np.concatenate(arrays) for arrays in zip(*batches.values(), strict=True))
    x = flat(x.transpose(0, 2, 3, 1))  # to height, width, channels
    assert images.shape == (32, 32, 3)
    assert (len(images.train), len(images.val), len(images.test)) == (18, 2, 7)
    np.testing.assert_array_equal(np.concatenate([images.train, images.val, images.test]), x)
    labels = [images.labels[part] for part in ("train", "val", "test")]
    np.testing.assert_array_equal(np.concatenate(labels), y)
    one = read_images(folder / f"data_batch_2{ending}")
    np.testing.assert_array_equal(one.pixels, x[2:5])
    np.testing.assert_array_equal(one.labels, y[2:5])


def test_the_python_batch_of_the_test_is_one():
    """The tests of the reader rely on this: numpy reads the same batch from those opcodes."""
    x, y = gray((3, 3, 32, 32)), np.array([1, 9, 0])
    batch = pickle.loads(python2(x, y), encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], flat(x))
    assert batch[b"labels"] == [1, 9, 0]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (pickle.dumps(Evil(), protocol=2), r"it asks for (posix|nt)\.mkdir"),
        (b"\x80\x02cnumpy\nndarray.__subclasses__\n.", "it asks for numpy.ndarray.__subclasses__"),
        (pickle.dumps({b"data": [1]}), "is not a complete Python batch"),
        (pickle.dumps([]), "is not a complete Python batch"),
        (python2(*cifar()["test_batch"])[:-200], "is not a complete Python batch"),
        (python2(*cifar()["test_batch"]).replace(b"U\x02u1", b"U\x02f4"), "not one of bytes"),
        (b"", "is not a complete Python batch"),
    ],
)
def test_other_pickles_are_refused_and_not_run(tmp_path, monkeypatch, data, fault):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(data)
    with pytest.raises(InputError, match=fault):
        read_images(tmp_path / "test_batch")
    assert not (tmp_path / "ran").exists()


# Files at fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"x_test": None}, r"no array x_test among its arrays \(x_train \(20, 28, 28\)"),
        ({"y_test": None}, "only one part has labels"),
        ({"x_train": gray((20, 28, 28)) / 255}, "x_train: has type float64, not whole gray values"),
        ({"x_train": gray((20, 28, 28)).astype(int) - 1}, "values from -1 to 254: save gray"),
        ({"x_train": gray((20, 28, 28)) + np.int16(1)}, "values from 1 to 256: save gray"),
        ({"x_train": gray((20, 784))}, r"shape \(20, 784\): save images as \(n, height, width\)"),
        ({"x_train": gray((20, 1, 28, 3))}, "save images as"),  # channels first, or last?
        ({"x_train": gray((20, 28, 28, 4))}, "with 1 or 3 channels"),
        ({"x_train": gray((0, 28, 28))}, r"shape \(0, 28, 28\)"),
        ({"x_test": gray((7, 32, 32))}, "28x28x1 for mnist; got test images of 32x32x1"),
        ({"x_train": gray((20, 3, 28, 28))}, "28x28x1 for mnist; got training images of 28x28x3"),
        ({"x_train": gray((9, 28, 28)), "y_train": gray(9)}, "at least 10 training images; got 9"),
        ({"x_test": gray((1, 28, 28)), "y_test": gray(1)}, "at least 2 test images; got 1"),
        ({"y_train": np.arange(20) - 1}, "one integer >= 0 for each image"),
        ({"y_train": gray(19)}, "20 images and 19 labels of type uint8"),
        ({"y_test": np.zeros(7)}, "7 images and 7 labels of type float64"),
    ],
)
def test_arrays_at_fault(tmp_path, change, fault):
    arrays = {name: x for name, x in (mnist() | change).items() if x is not None}
    with pytest.raises(InputError, match=fault):
        load_images("mnist", write_npz(tmp_path, arrays))


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("train-images-idx3-ubyte", idx(gray(20)), "starts with the bytes 00 00 08 01; an idx"),
        ("train-images-idx3-ubyte", b"", r"starts with the bytes \(none\)"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "6 bytes, but its header says 16"),
        (
            "t10k-images-idx3-ubyte",
            idx(gray((7, 28, 28)))[:-1],
            "its header says 5504",
        ),
        ("t10k-images-idx3-ubyte", gzip.compress(idx(gray((7, 28, 28))))[:-9], "cannot be read"),
        ("t10k-labels-idx1-ubyte", idx(gray(8)), "7 images and 8 labels"),
        ("t10k-labels-idx1-ubyte", idx(gray((7, 1, 1))), "08 03; an idx file with 1 axes"),
    ],
)
def test_idx_files_at_fault(tmp_path, name, data, fault):
    (write_idx(tmp_path, mnist()) / name).write_bytes(data)
    with pytest.raises(InputError, match=fault):
        load_images("mnist", tmp_path)


def test_batches_at_fault(tmp_path):
    folder = write_batches(tmp_path / "batches", cifar(), binary, ".bin")
    archive = packed(folder)
    archive.write_bytes(archive.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"cannot be read as \.tar\.gz"):
        load_images("cifar10", archive)
    with pytest.raises(InputError, match=r"for mnist; got training images of 32x32x3"):
        load_images("mnist", folder)
    batch = folder / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"data_batch_3\.bin: has 12291 bytes, not a multiple of"):
        load_images("cifar10", folder)
    batch.unlink()
    with pytest.raises(InputError, match=r"but no data_batch_3\.bin: add it"):
        load_images("cifar10", folder)


def test_paths_at_fault(tmp_path):
    with pytest.raises(InputError, match="no such file or folder: use a "):
        read_images(tmp_path / "missing.npz")
    with pytest.raises(InputError, match="has no known file of images"):
        load_images("mnist", tmp_path)
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"cannot be read as \.tar\.gz"):
        read_images(tmp_path / "table.csv")
    (tmp_path / "half.npz").write_bytes(write_npz(tmp_path, mnist()).read_bytes()[:9000])
    with pytest.raises(InputError, match=r"half\.npz"):
        read_images(tmp_path / "half.npz")
    np.savez(tmp_path / "object.npz", x_test=np.array([{}]))
    with pytest.raises(InputError, match="object array"):
        read_images(tmp_path / "object.npz")


# Sources without a path


def test_digits_are_those_of_the_table():
    images, table = load_images("digits"), load_digits_table()
    assert (images.shape, images.levels, images.test.max()) == ((8, 8, 1), 17, 16)
    for part in ("train", "val", "test"):
        cells = np.floor(17 * table.scale.unstandardize(getattr(table, part)))
        np.testing.assert_array_equal(getattr(images, part), cells)
        assert images.labels[part].shape == (len(cells),)
    whole = sum(np.bincount(labels) for labels in images.labels.values())
    assert whole.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    with pytest.raises(InputError, match="scikit-learn: leave out path"):
        load_images("digits", "digits.npz")
    with pytest.raises(InputError, match="'mnits': did you mean mnist"):
        load_images("mnits")


def test_cifar10_of_openml(monkeypatch):
    import sklearn.datasets

    class Fetched:
        data = RNG.integers(0, 256, (10_020, 3072), np.uint8).astype(float)
        target = np.arange(10_020).astype(str)

    def fetch(name, version, as_frame, parser):
        assert (name, version, as_frame) == ("CIFAR_10", 1, False)
        return Fetched

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    images = load_images("cifar10")
    assert [x.shape for x in (images.train, images.val, images.test)] == [
        (18, 3072),
        (2, 3072),
        (10_000, 3072),
    ]
    expected = Fetched.data[20].reshape(3, 1024).T.ravel()
    np.testing.assert_array_equal(images.test[0], expected)
    assert images.labels["test"][:2].tolist() == [20, 21]


def test_no_network(monkeypatch):
    import sklearn.datasets

    def fetch(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with pytest.raises(InputError, match=r"no route.*get train-images-idx3.*pass path"):
        load_images("mnist")
    with pytest.raises(InputError, match=r"get cifar-10-binary\.tar\.gz from .*pass path"):
        load_images("cifar10")


# Dequantizing


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_dequantized_pixels_stay_in_their_cells_in_float32(levels):
    """A plain sum 255 + u would round to 256 in one of 2^17 draws."""
    whole = jnp.full(2**21, levels - 1, jnp.uint8)
    with jax.enable_x64(False):
        x = jax.jit(images.dequantize, static_argnums=2)(jr.key(0), whole, levels)
    assert x.dtype == jnp.float32
    assert float(x.max()) < 1
    u = np.asarray(x, np.float64) * levels - (levels - 1)
    assert u.min() > -1e-6
    assert u.max() > 1 - 1e-4
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / len(u))


def test_dequantized_pixels_keep_their_order_and_shape(unchecked):
    whole = jnp.asarray(gray((50, 6)))
    x = images.dequantize(jr.key(1), whole, 256)
    assert x.dtype == jnp.float64
    np.testing.assert_array_equal(jnp.floor(256 * x), whole)
    assert len(np.unique(256 * x % 1)) == 300  # a draw for each pixel
    with pytest.raises(ValueError, match="integer type; got float64"):
        images.dequantize(jr.key(1), x, 256)


def test_bits_per_dim_by_hand():
    """A uniform density has 8 bits; one on a quarter of each pixel's interval has two bits less."""
    assert bits_per_dim(0.0, 784, 256) == pytest.approx(8, rel=1e-15)
    assert bits_per_dim(0.0, 64, 17) == pytest.approx(math.log2(17), rel=1e-15)
    assert bits_per_dim(3 * math.log(4), 3, 256) == pytest.approx(6, rel=1e-15)
    values = np.array([0.0, 3 * math.log(4)])
    np.testing.assert_allclose(bits_per_dim(values, 3, 256), [8, 6], rtol=1e-14)
    np.testing.assert_allclose(bits_per_dim(jnp.asarray(values), 3, 256), [8, 6], rtol=1e-14)


def test_bits_per_dim_bound_the_code_length():
    """For the linear density p(x) = 2 x on [0, 1], the mean over u is above -log2 P."""
    whole = np.arange(4)
    u = (np.arange(2000) + 0.5) / 2000
    log_prob = np.log(2 * (whole[:, None] + u) / 4).mean(axis=1)
    code = -np.log2(((whole + 1) ** 2 - whole**2) / 16)
    excess = bits_per_dim(log_prob, 1, 4) - code
    # In the lowest cell, the mean of ln(u/2) is -ln 2 - 1, which gives 3 + 1/ln 2 - log2 16.
    np.testing.assert_allclose(excess[0], 3 + 1 / math.log(2) - 4, atol=1e-3)
    assert (excess > 0).all()
    assert excess[3] < 0.01


def test_what_only_has_the_name_of_a_file(tmp_path):
    """Archives can leave a folder with the name of a file next to it, or a dangling link."""
    (tmp_path / "t10k-images-idx3-ubyte").mkdir()
    (tmp_path / "train-images-idx3-ubyte").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="has no known file of images"):
        read_images(tmp_path)
    with pytest.raises(InputError, match="has no known file of images"):
        read_images(tmp_path / "t10k-images-idx3-ubyte")
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(gray((3, 4, 4))))
    assert read_images(tmp_path).shape == (4, 4, 1)


def test_a_link_in_an_archive_and_a_damaged_header(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "gone"
        archive.addfile(link)
    with pytest.raises(InputError, match="has no known file of images"):
        read_images(tmp_path / "a.tar.gz")
    (tmp_path / "b.tar.gz").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(InputError, match=r"b\.tar\.gz: cannot be read as \.tar\.gz") as refused:
        read_images(tmp_path / "b.tar.gz")
    assert "\n" not in str(refused.value)
    path = write_npz(tmp_path, {"x_test": gray((3, 4, 4))})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 10] = 99  # an unknown compression
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        read_images(path)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 4))
    with pytest.raises(InputError, match="but its header says"):
        read_images(path)
