"""Image data sets in three parts: MNIST, Fashion-MNIST, CIFAR-10 and 8x8 digits.

images = load_images("mnist", "mnist.npz")    # or the folder of the idx files
images.train                                  # uint8 (55000, 784), 0 to 255

Gray values are whole numbers; `jcnf.data.images.dequantize` turns them into reals for a density.
"""

import dataclasses
import difflib
import http.client
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jcnf._checks import InputError
from jcnf.data.images import digits
from jcnf.data.images.files import LabeledImages, read_one, read_parts

Shape = tuple[int, int, int]  # height, width, channels


class _Source(NamedTuple):
    """The expected shape of a data set's images, and its name on openml.org."""

    shape: Shape
    openml: str


_SOURCES = {
    "mnist": _Source((28, 28, 1), "mnist_784"),
    "fashion_mnist": _Source((28, 28, 1), "Fashion-MNIST"),
    "cifar10": _Source((32, 32, 3), "CIFAR_10"),
}
NAMES = ("digits", *_SOURCES)
_NUM_TEST = 10_000  # test images of each of _SOURCES, the last rows on openml.org


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images in three parts, flattened in the order height, width, channels."""

    train: np.ndarray  # uint8 (n, dim)
    val: np.ndarray
    test: np.ndarray
    labels: dict[str, np.ndarray] | None  # by part, "train", "val" and "test": int (n,)
    shape: Shape  # height, width, channels
    levels: int  # gray values are 0 to levels - 1; 256, for the digits 17


class UnsplitImages(NamedTuple):
    """Images of one part, flattened in the order height, width, channels."""

    pixels: np.ndarray  # uint8 (n, dim), 0 to 255
    labels: np.ndarray | None  # int (n,)
    shape: Shape  # height, width, channels


def shape_of(name: str) -> Shape:
    """Height, width and channels of the data set `name`; raises `InputError` if it is unknown."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"no images are called {name!r}: {hint}There are {', '.join(NAMES)}")
    return (digits.SIDE, digits.SIDE, 1) if name == "digits" else _SOURCES[name].shape


def load_images(name: str, path: str | os.PathLike | None = None) -> Images:
    """Load the data set called `name`, one of `NAMES`; every call returns the same.

    The test part is the test part of the files. Validation is the last min(5000, a tenth) of the
    training images, in the order of the files: nothing is shuffled. The digits, 8x8 with 17 gray
    values, come from scikit-learn and are split by `jcnf.data.images.digits`.

    **Arguments:**

    - `name`: determines the expected shape; how a file is read depends on its format alone.
    - `path`: a .npz with x_train, x_test and perhaps y_train, y_test, where the images are
      (n, height, width) or (n, height, width, channels); or a folder of idx files (.gz or not).
      Without a path, scikit-learn downloads the images from openml.org and caches them
      (`sklearn.datasets.get_data_home`).

    **Raises:** `InputError` for an unknown name; a missing or damaged file; values other than whole
    gray values; images of another size than the name's; and, without `path`, no network or no
    scikit-learn.
    """
    shape = shape_of(name)
    if name == "digits":
        return _digits(path)
    train, test = _fetched(name) if path is None else read_parts(Path(path), ["train", "test"])
    where = "openml.org" if path is None else path
    for part, images in {"training": train, "test": test}.items():
        if images.pixels.shape[1:] != shape:
            raise InputError(
                f"{where}: expected images of {_size(shape)} for {name}; got {part} images of "
                f"{_size(images.pixels.shape[1:])}: use the files of {name}, or another name"
            )
    for part, images, fewest in (("training", train, 10), ("test", test, 2)):
        if (count := len(images.pixels)) < fewest:
            raise InputError(f"{where}: expected at least {fewest} {part} images; got {count}")
    if (train.labels is None) != (test.labels is None):
        raise InputError(f"{where}: only one part has labels: give labels to both or none")
    cut = len(train.pixels) - min(5000, len(train.pixels) // 10)
    parts = {"train": _rows(train, slice(cut)), "val": _rows(train, slice(cut, None)), "test": test}
    labels = {part: each.labels for part, each in parts.items() if each.labels is not None}
    flat = (_flat(each.pixels) for each in parts.values())
    return Images(*flat, labels=labels or None, shape=shape, levels=256)


def read_images(path: str | os.PathLike) -> UnsplitImages:
    """Read images to compare with others; no training part is needed.

    One idx file is read completely. From a .npz or a folder (as for `load_images`), the test part
    is read, and the training part may be missing. A .npz may also have one array of images under
    any name.

    **Raises:** `InputError` as `load_images` does for the file.
    """
    pixels, labels = read_one(Path(path))
    return UnsplitImages(_flat(pixels), labels, pixels.shape[1:])


def _rows(images: LabeledImages, rows: slice) -> LabeledImages:
    pixels, labels = images
    return LabeledImages(pixels[rows], None if labels is None else labels[rows])


def _flat(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.reshape(len(pixels), -1))


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _digits(path: str | os.PathLike | None) -> Images:
    if path is not None:
        raise InputError(f"{path}: the digits come with scikit-learn: leave out path")
    parts = digits.load_digits_parts()
    labels = {name: part.labels for name, part in parts.items()}
    pixels = (part.pixels for part in parts.values())
    return Images(*pixels, labels=labels, shape=shape_of("digits"), levels=digits.LEVELS)


def _fetched(name: str) -> list[LabeledImages]:
    """Download training and test part from openml.org, whose rows are in the order of the files."""
    (height, width, channels), openml = _SOURCES[name]
    try:
        from sklearn.datasets import fetch_openml

        fetched: Any = fetch_openml(openml, version=1, as_frame=False)
    except ImportError as error:
        raise InputError(
            f"{name} is downloaded with scikit-learn and pandas ({error}): "
            "pip install 'jcnf[experiments]', or pass the path of a .npz"
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            f"{name} cannot be downloaded from openml.org ({error}): pass the path of a .npz, or "
            "of a folder of idx files"
        ) from None
    pixels = np.asarray(fetched.data).reshape(-1, channels, height, width)  # channel by channel
    pixels = np.moveaxis(pixels, 1, 3).astype(np.uint8)
    images = LabeledImages(pixels, np.asarray(fetched.target, np.int64))
    return [_rows(images, slice(-_NUM_TEST)), _rows(images, slice(-_NUM_TEST, None))]
