"""Tests of image files in every format, and of dequantizing."""

import functools
import gzip
import math
import struct
import urllib.error

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from refusal import fails

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
    with fails(tmp_path, "train-images-idx3-ubyte"):
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


def test_channels_may_come_first(tmp_path):
    x = gray((20, 3, 32, 32))
    images = load_images("cifar10", write_npz(tmp_path, {"x_train": x, "x_test": x}))
    np.testing.assert_array_equal(images.test, flat(x.transpose(0, 2, 3, 1)))


# Files at fault

# how an array of a good MNIST is changed, and what the error names
BAD_ARRAYS = {
    "no test part": ({"x_test": None}, ["no array x_test", "x_train (20, 28, 28)"]),
    "labels of one part": ({"y_test": None}, ["labels"]),
    "floats": ({"x_train": gray((20, 28, 28)) / 255}, ["x_train", "float64"]),
    "negative": ({"x_train": gray((20, 28, 28)).astype(int) - 1}, ["x_train", "-1"]),
    "too bright": ({"x_train": gray((20, 28, 28)) + np.int16(1)}, ["x_train", "256"]),
    "flat": ({"x_train": gray((20, 784))}, ["x_train", "(20, 784)"]),
    "channels first and last": ({"x_train": gray((20, 1, 28, 3))}, ["x_train", "(20, 1, 28, 3)"]),
    "four channels": ({"x_train": gray((20, 28, 28, 4))}, ["x_train", "1 or 3 channels"]),
    "empty": ({"x_train": gray((0, 28, 28))}, ["x_train", "(0, 28, 28)"]),
    "another size": ({"x_test": gray((7, 32, 32))}, ["28x28x1", "test", "32x32x1"]),
    "in color": ({"x_train": gray((20, 3, 28, 28))}, ["28x28x1", "training", "28x28x3"]),
    "9 images": ({"x_train": gray((9, 28, 28)), "y_train": gray(9)}, ["10 training", "9"]),
    "1 test image": ({"x_test": gray((1, 28, 28)), "y_test": gray(1)}, ["2 test", "1"]),
    "negative labels": ({"y_train": np.arange(20) - 1}, ["x_train", "labels"]),
    "19 labels": ({"y_train": gray(19)}, ["x_train", "20 images", "19 labels"]),
    "labels of floats": ({"y_test": np.zeros(7)}, ["x_test", "labels", "float64"]),
    "objects": ({"x_test": np.array([{}])}, ["object array"]),
}
BIG = bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 4)
BAD_IDX = {
    "one axis": ("train-images-idx3-ubyte", idx(gray(20))),
    "nothing": ("train-images-idx3-ubyte", b""),
    "half a header": ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0"),
    "a byte missing": ("t10k-images-idx3-ubyte", idx(gray((7, 28, 28)))[:-1]),
    "a huge size": ("t10k-images-idx3-ubyte", BIG),
    "damaged gzip": ("t10k-images-idx3-ubyte", gzip.compress(idx(gray((7, 28, 28))))[:-9]),
    "three axes": ("t10k-labels-idx1-ubyte", idx(gray((7, 1, 1)))),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path, case):
    change, words = BAD_ARRAYS[case]
    arrays = {name: x for name, x in (mnist() | change).items() if x is not None}
    with fails(tmp_path, *words):
        load_images("mnist", write_npz(tmp_path, arrays))


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files_are_refused(tmp_path, case):
    name, data = BAD_IDX[case]
    (write_idx(tmp_path, mnist()) / name).write_bytes(data)
    with fails(name, "download it again"):
        load_images("mnist", tmp_path)


def test_idx_files_with_another_number_of_labels_are_refused(tmp_path):
    (write_idx(tmp_path, mnist()) / "t10k-labels-idx1-ubyte").write_bytes(idx(gray(8)))
    with fails(tmp_path, "7 images and 8 labels"):
        load_images("mnist", tmp_path)


def test_bad_paths_are_refused(tmp_path):
    """CIFAR-10's own batches are pickles: the error says how to make a .npz."""
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
    # Archives can leave a folder with the name of a file next to it, or a dangling link.
    (tmp_path / "t10k-images-idx3-ubyte").mkdir()
    (tmp_path / "train-images-idx3-ubyte").symlink_to(tmp_path / "gone")
    for path in [tmp_path, tmp_path / "gone.npz", *sorted(tmp_path.iterdir())]:
        for read in (read_images, functools.partial(load_images, "cifar10")):
            with fails(path.name, "np.savez", "x_train", "torchvision.datasets.CIFAR10"):
                read(path)
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(gray((3, 4, 4))))
    assert read_images(tmp_path).shape == (4, 4, 1)


def test_damaged_npz_files_are_refused(tmp_path):
    data = write_npz(tmp_path, mnist()).read_bytes()
    compression = data.index(b"PK\x01\x02") + 10
    for harmed in (data[:9000], data[:compression] + b"c" + data[compression + 1 :]):
        (tmp_path / "bad.npz").write_bytes(harmed)
        with fails("bad.npz"):
            read_images(tmp_path / "bad.npz")


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
    with fails("digits.npz", "scikit-learn"):
        load_images("digits", "digits.npz")
    with fails("'mnits'", "mnist"):
        load_images("mnits")


def test_cifar10_of_openml(monkeypatch):
    import sklearn.datasets

    class Fetched:
        data = RNG.integers(0, 256, (10_020, 3072), np.uint8).astype(float)
        target = np.arange(10_020).astype(str)

    def fetch(name, version, as_frame):
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


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), ImportError("no route")])
def test_what_cannot_be_downloaded_needs_a_path(monkeypatch, error):
    import sklearn.datasets

    def fetch(*_, **__):
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    with fails("mnist", "no route", "the path of a .npz"):
        load_images("mnist")


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
