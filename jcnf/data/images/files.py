"""Read images as arrays of whole gray values: from a .npz, or from idx files as MNIST's are."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jcnf._checks import InputError
from jcnf.data.tables import load_arrays

_PREFIXES = {"train": "train", "test": "t10k"}  # of MNIST's files
_ORIGINS = (
    "use a .npz with uint8 arrays x_train, y_train, x_test and y_test, np.savez(path, "
    "x_train=..., ...), or the folder of MNIST's idx files (train-images-idx3-ubyte and so on, "
    "also .gz); CIFAR-10's arrays are data and targets of torchvision.datasets.CIFAR10"
)


class LabeledImages(NamedTuple):
    """Images and their labels, if they have any."""

    pixels: np.ndarray  # uint8 (n, height, width, channels)
    labels: np.ndarray | None  # int (n,)


def read_parts(path: Path, parts: Sequence[str]) -> list[LabeledImages]:
    """Read the images of each of `parts`, "train" or "test".

    `path` is a .npz, a folder of idx files, or one of these files, next to which are the others.

    **Raises:** `InputError` for a missing, damaged or unknown file, and for values other than whole
    gray values from 0 to 255.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder: {_ORIGINS}")
    if path.suffix.lower() == ".npz":
        arrays = load_arrays(path)
        return [_npz_part(path, arrays, part) for part in parts]
    if path.is_file() and not _is_idx(path):
        raise InputError(f"{path}: is not a file of images: {_ORIGINS}")
    folder = path.parent if _is_idx(path) else path
    return [_idx_part(folder, _PREFIXES[part]) for part in parts]


def read_one(path: Path) -> LabeledImages:
    """Read all images of one idx file, or the test part of files that have parts.

    A .npz without x_test may have one array of images under any name.

    **Raises:** `InputError` as `read_parts` does.
    """
    if path.is_file() and _is_idx(path):
        return _checked(path, _read_idx(path, 3))
    if path.is_file() and path.suffix.lower() == ".npz":
        arrays = load_arrays(path)
        images = [name for name, array in arrays.items() if array.ndim > 2]
        if "x_test" not in arrays and len(images) == 1:
            return _checked(f"{path}: {images[0]}", arrays[images[0]])
    return read_parts(path, ["test"])[0]


def _npz_part(path: Path, arrays: dict[str, np.ndarray], part: str) -> LabeledImages:
    if f"x_{part}" not in arrays:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
        raise InputError(f"{path}: no array x_{part} among its arrays ({found}): {_ORIGINS}")
    return _checked(f"{path}: x_{part}", arrays[f"x_{part}"], arrays.get(f"y_{part}"))


def _is_idx(path: Path) -> bool:
    return path.is_file() and path.name.removesuffix(".gz").endswith(("idx3-ubyte", "idx1-ubyte"))


def _idx_part(folder: Path, prefix: str) -> LabeledImages:
    def find(kind):  # some copies are called train-images.idx3-ubyte
        found = [file for file in folder.glob(f"{prefix}-{kind}-ubyte*") if _is_idx(file)]
        return found[0] if found else None

    images, labels = find("images?idx3"), find("labels?idx1")
    if images is None:
        raise InputError(f"{folder}: has no {prefix}-images-idx3-ubyte: {_ORIGINS}")
    return _checked(images, _read_idx(images, 3), None if labels is None else _read_idx(labels, 1))


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """Parse an idx array: two zeros, 8 for bytes, the number of axes, their lengths, then data."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): download it again") from None
    head, magic = 4 + 4 * axes, bytes([0, 0, 8, axes])
    shape = np.frombuffer(data[4:head].ljust(4 * axes, b"\0"), ">u4").tolist()
    if data[:4] != magic or len(data) != head + math.prod(shape):
        raise InputError(
            f"{path}: is not a complete idx file with {axes} axes: it has {len(data)} bytes, and "
            f"starts with {data[:head].hex(' ') or 'none'}: download it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _checked(
    where: Path | str, images: np.ndarray, labels: np.ndarray | None = None
) -> LabeledImages:
    """Check gray values and labels, and put channels last."""
    if images.dtype.kind not in "ui" or images.min(initial=0) < 0 or images.max(initial=0) > 255:
        raise InputError(
            f"{where}: expected whole gray values from 0 to 255; got {images.dtype} from "
            f"{images.min(initial=0)} to {images.max(initial=0)}: save them as uint8"
        )
    pixels = images[..., None] if images.ndim == 3 else images
    last, first = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first or not images.size:
        raise InputError(
            f"{where}: has shape {images.shape}: save images as (n, height, width), or as "
            "(n, height, width, channels) with 1 or 3 channels"
        )
    pixels = (np.moveaxis(pixels, 1, 3) if first else pixels).astype(np.uint8)
    if labels is None:
        return LabeledImages(pixels, None)
    labels = labels.ravel()
    whole = labels.dtype.kind in "ui" and labels.min(initial=0) >= 0
    if not whole or len(labels) != len(images):
        raise InputError(
            f"{where}: {len(images)} images and {len(labels)} labels of type {labels.dtype}: "
            "save one integer >= 0 for each image, or no labels"
        )
    return LabeledImages(pixels, labels.astype(np.int64))
