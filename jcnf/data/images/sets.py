"""Pictures with whole grey values in three parts: MNIST, Fashion-MNIST, CIFAR-10, 8x8 digits.

images = load_images("mnist", "mnist.npz")    # or the folder of the idx files
images.train                                  # uint8 (55000, 784), 0 to 255

What makes of them the reals that a density is of is `jcnf.data.images.dequantise`.
"""

import dataclasses
import difflib
import http.client
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jcnf._checks import InputError
from jcnf.data.images import digits
from jcnf.data.images.files import Pictures, read_one, read_parts

__all__ = ["NAMES", "Images", "UnsplitImages", "load_images", "read_images", "shape_of"]

Shape = tuple[int, int, int]  # height, width, channels


class _Source(NamedTuple):
    """What is expected of a data set, and where it comes from."""

    shape: Shape
    openml: str  # its name there; the last 10,000 rows are the test part
    files: str


_IDX = "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and the two t10k files, in a folder"
_SOURCES = {
    "mnist": _Source((28, 28, 1), "mnist_784", _IDX),
    "fashion_mnist": _Source((28, 28, 1), "Fashion-MNIST", _IDX),
    "cifar10": _Source(
        (32, 32, 3), "CIFAR_10", "cifar-10-binary.tar.gz from www.cs.toronto.edu/~kriz/cifar.html"
    ),
}
NAMES = ("digits", *_SOURCES)
_TEST = 10_000  # pictures of the test part of all of _SOURCES


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Pictures flattened in the order height, width, channels; three parts."""

    train: np.ndarray  # uint8 (n, dim)
    val: np.ndarray
    test: np.ndarray
    labels: dict[str, np.ndarray] | None  # by part, "train", "val" and "test": int (n,)
    shape: Shape  # height, width, channels
    levels: int  # grey values are 0 to levels - 1: 256, or 17 of the digits


class UnsplitImages(NamedTuple):
    """Pictures of one part, flattened as those of `Images`."""

    pixels: np.ndarray  # uint8 (n, dim), 0 to 255
    labels: np.ndarray | None  # int (n,)
    shape: Shape  # height, width, channels


def shape_of(name: str) -> Shape:
    """Height, width and channels of the pictures called `name`; `InputError` for another name."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no pictures are called {name!r}: {hint}There are {', '.join(NAMES)}")
    return (digits.SIDE, digits.SIDE, 1) if name == "digits" else _SOURCES[name].shape


def load_images(name: str, path: str | os.PathLike | None = None) -> Images:
    """The data set called `name`, one of `NAMES`, the same at each call.

    The test part is that of the files. Validation is the last min(5000, a tenth) of the training
    pictures, in the order of the files: nothing is shuffled. The digits, 8x8 with 17 grey values,
    are scikit-learn's, and split as `jcnf.data.images.digits` splits them.

    Args:
        name: says what pictures are expected; the form of the file, how they are read.
        path: a .npz with x_train, x_test and perhaps y_train, y_test, (n, height, width) or
            (n, height, width, channels); a folder of idx files (.gz or not); the folder or .tar.gz
            of CIFAR-10, binary or python version. Without it scikit-learn gets the pictures from
            openml.org, and keeps them (`sklearn.datasets.get_data_home`).

    Raises:
        InputError: an unknown name; a missing or damaged file, other than whole grey values, and
            pictures of another size than the name's; a pickle that is not CIFAR-10's; no `path`
            and no network, or no scikit-learn.
    """
    shape = shape_of(name)
    if name == "digits":
        return _digits(path)
    train, test = _fetched(name) if path is None else read_parts(Path(path), ["train", "test"])
    where = "openml.org" if path is None else path
    for part, pictures in {"training": train, "test": test}.items():
        if pictures.pixels.shape[1:] != shape:
            raise InputError(
                f"{where}: {part} pictures of {_size(pictures.pixels.shape[1:])} under the name "
                f"{name}, which has {_size(shape)}; give its own files, or the name of these"
            )
    for part, pictures, fewest in (("training", train, 10), ("test", test, 2)):
        if (count := len(pictures.pixels)) < fewest:
            raise InputError(f"{where}: {part} pictures: {count} are too few; give {fewest}")
    if (train.labels is None) != (test.labels is None):
        raise InputError(f"{where}: one part has labels and one has none; give those of both")
    cut = len(train.pixels) - min(5000, len(train.pixels) // 10)
    parts = {"train": _rows(train, slice(cut)), "val": _rows(train, slice(cut, None)), "test": test}
    labels = {part: each.labels for part, each in parts.items() if each.labels is not None}
    flat = (_flat(each.pixels) for each in parts.values())
    return Images(*flat, labels=labels or None, shape=shape, levels=256)


def read_images(path: str | os.PathLike) -> UnsplitImages:
    """Pictures to hold against others, of which no training part is needed.

    One idx file or batch of CIFAR-10 is read whole; of a .npz, a folder or an archive (as in
    `load_images`) the test part, which may be all there is; of a .npz with one array of pictures
    under any name, that.

    Raises:
        InputError: as `load_images` for the file.
    """
    pixels, labels = read_one(Path(path))
    return UnsplitImages(_flat(pixels), labels, pixels.shape[1:])


def _rows(pictures: Pictures, rows: slice) -> Pictures:
    pixels, labels = pictures
    return Pictures(pixels[rows], None if labels is None else labels[rows])


def _flat(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.reshape(len(pixels), -1))


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _digits(path: str | os.PathLike | None) -> Images:
    if path is not None:
        raise InputError(f"{path}: the digits come with scikit-learn; leave out --path")
    parts = digits.load_digits_parts()
    labels = {name: part.labels for name, part in parts.items()}
    pixels = (part.pixels for part in parts.values())
    return Images(*pixels, labels=labels, shape=shape_of("digits"), levels=digits.LEVELS)


def _fetched(name: str) -> list[Pictures]:
    """Training and test part from openml.org, whose rows are in the order of the files."""
    (height, width, channels), openml, files = _SOURCES[name]
    try:
        from sklearn.datasets import fetch_openml
    except ImportError:
        raise InputError(
            f"{name} is fetched by scikit-learn: pip install scikit-learn, or get {files}, and "
            "give --path"
        ) from None
    # Without pandas the slower parser: both give the same numbers.
    parser = "pandas" if importlib.util.find_spec("pandas") else "liac-arff"
    try:
        fetched: Any = fetch_openml(openml, version=1, as_frame=False, parser=parser)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            f"{name} cannot be fetched from openml.org ({error}); get {files}, and give --path"
        ) from None
    pixels = np.asarray(fetched.data).reshape(-1, channels, height, width)  # channel by channel
    pixels, labels = (
        np.moveaxis(pixels, 1, 3).astype(np.uint8),
        np.asarray(fetched.target, np.int64),
    )
    pictures = Pictures(pixels, labels)
    return [_rows(pictures, slice(-_TEST)), _rows(pictures, slice(-_TEST, None))]
