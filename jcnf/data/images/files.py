"""Read images from .npz, idx files and CIFAR-10's batches, as arrays of whole gray values.

idx is the format of MNIST's files (train-images-idx3-ubyte and so on, also .gz), in a folder.
CIFAR-10's batches may be of its binary or its Python version, in a folder or in the .tar.gz they
are published in (Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html).
"""

import gzip
import math
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jcnf._checks import InputError
from jcnf.data.images.cifar_batches import read_binary, read_pickled
from jcnf.data.tables import load_arrays

_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_BATCH_NAMES = _BATCHES["train"] + _BATCHES["test"]
_KNOWN = {*_IDX["train"], *_IDX["test"], *_BATCH_NAMES, *(f"{name}.bin" for name in _BATCH_NAMES)}
_ORIGINS = (
    "use a .npz with x_train and x_test, the folder of MNIST's idx files (train-images-idx3-ubyte "
    "and so on, also .gz), or CIFAR-10's folder or .tar.gz"
)


class LabeledImages(NamedTuple):
    """Images and their labels, if they have any."""

    pixels: np.ndarray  # uint8 (n, height, width, channels)
    labels: np.ndarray | None  # int (n,)


def read_parts(path: Path, parts: Sequence[str]) -> list[LabeledImages]:
    """Read the images of each of `parts`, "train" or "test".

    `path` may also name one file of a folder; the others next to it are then read as well.

    **Raises:** `InputError` for a missing, damaged or unknown file, for values other than whole
    gray values from 0 to 255, and for a pickle that is not CIFAR-10's.
    """
    _require(path)
    if path.suffix.lower() == ".npz":
        arrays = load_arrays(path)
        return [_npz_part(path, arrays, part) for part in parts]
    folder = path.parent if _plain(path.name) in _KNOWN else path
    files = _files(folder)
    return [_part(folder, files, part) for part in parts]


def read_one(path: Path) -> LabeledImages:
    """Read all images of one idx file or batch, or the test part of files that have parts.

    A .npz without x_test may have one array of images under any name.

    **Raises:** `InputError` as `read_parts` does.
    """
    _require(path)
    if path.suffix.lower() == ".npz":
        arrays = load_arrays(path)
        named = [name for name, array in arrays.items() if array.ndim > 2]
        if "x_test" not in arrays and len(named) == 1:
            return _checked(f"{path}: {named[0]}", arrays[named[0]])
        return _npz_part(path, arrays, "test")
    name = _plain(path.name)
    if path.is_dir() or name not in _KNOWN:
        return read_parts(path, ["test"])[0]
    data = _whole(path, _bytes(path))
    if name in _BATCH_NAMES or name.endswith(".bin"):
        return _batch(str(path), name, data)
    return _checked(str(path), _idx(str(path), data, axes=3))


def _require(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder: {_ORIGINS}")


def _plain(name: str) -> str:
    """Return the published name of a file; some copies are called train-images.idx3-ubyte."""
    return name.removesuffix(".gz").replace(".idx", "-idx")


def _files(path: Path) -> dict[str, bytes]:
    """Return the content of the known files in a folder or archive, by published name."""
    if path.is_dir():
        # Some archives unpack each file to a folder with the file's name.
        known = [f for f in path.iterdir() if _plain(f.name) in _KNOWN and f.is_file()]
        found = {_plain(file.name): _whole(file, _bytes(file)) for file in known}
    else:
        try:
            found = _unpacked(path)
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            reason = " ".join(str(error).split())  # it has a line for each compression
            raise InputError(f"{path}: cannot be read as .tar.gz ({reason}): {_ORIGINS}") from None
    if not found:
        raise InputError(f"{path}: has no known file of images: {_ORIGINS}")
    return found


def _unpacked(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = _plain(Path(member.name).name)
            if name in _KNOWN and member.isfile() and (file := archive.extractfile(member)):
                found[name] = _whole(path, file.read())
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _whole(path: Path, data: bytes) -> bytes:
    """Decompress data if they are gzipped."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): download it again") from None


def _npz_part(path: Path, arrays: dict[str, np.ndarray], part: str) -> LabeledImages:
    if f"x_{part}" not in arrays:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "none"
        raise InputError(
            f"{path}: no array x_{part} among its arrays ({found}): save uint8 arrays x_train and "
            "x_test, and y_train and y_test for labels"
        )
    return _checked(f"{path}: x_{part}", arrays[f"x_{part}"], arrays.get(f"y_{part}"))


def _part(path: Path, files: dict[str, bytes], part: str) -> LabeledImages:
    """Read one part from a folder's files, in whichever format they are."""
    if any(name in files for name in (*_IDX["train"], *_IDX["test"])):
        images, labels = _member(path, files, _IDX[part][0]), files.get(_IDX[part][1])
        where = [f"{path}: {name}" for name in _IDX[part]]
        numbers = None if labels is None else _idx(where[1], labels, axes=1)
        return _checked(where[0], _idx(where[0], images, axes=3), numbers)
    ending = ".bin" if any(name.endswith(".bin") for name in files) else ""
    names = [name + ending for name in _BATCHES[part]]
    batches = [_batch(f"{path}: {name}", name, _member(path, files, name)) for name in names]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return LabeledImages(pixels, labels)


def _member(path: Path, files: dict[str, bytes], name: str) -> bytes:
    if name not in files:
        raise InputError(f"{path}: has {', '.join(sorted(files))}, but no {name}: add it")
    return files[name]


def _idx(where: str, data: bytes, axes: int) -> np.ndarray:
    """Parse an idx array: two zeros, 8 for bytes, the number of axes, their lengths, then data."""
    head, magic = 4 + 4 * axes, bytes([0, 0, 8, axes])
    if data[:4] != magic:
        raise InputError(
            f"{where}: starts with the bytes {data[:4].hex(' ') or '(none)'}; an idx file with "
            f"{axes} axes starts with {magic.hex(' ')}: download it again"
        )
    shape = np.frombuffer(data[4:head].ljust(head - 4, b"\0"), ">u4").astype(int)
    size = head + math.prod(shape.tolist())
    if len(data) != size:
        raise InputError(
            f"{where}: has {len(data)} bytes, but its header says {size}: download it again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _batch(where: str, name: str, data: bytes) -> LabeledImages:
    """Read a batch of CIFAR-10: images of 32x32, channel by channel."""
    pixels, labels = (read_binary if name.endswith(".bin") else read_pickled)(where, data)
    return _checked(where, pixels.reshape(-1, 3, 32, 32), labels)


def _checked(where: str, images: np.ndarray, labels: np.ndarray | None = None) -> LabeledImages:
    """Check gray values and labels, and put channels last."""
    if images.dtype.kind not in "ui":
        raise InputError(
            f"{where}: has type {images.dtype}, not whole gray values: save uint8, 0 to 255"
        )
    if images.size and (images.min() < 0 or images.max() > 255):
        raise InputError(
            f"{where}: has values from {images.min()} to {images.max()}: save gray values 0 to 255"
        )
    pixels = images[..., None] if images.ndim == 3 else images
    last, first = (pixels.ndim == 4 and pixels.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first or not images.size:
        raise InputError(
            f"{where}: has shape {images.shape}: save images as (n, height, width), or as "
            "(n, height, width, channels) with 1 or 3 channels"
        )
    pixels = np.moveaxis(pixels, 1, 3) if first else pixels
    if labels is None:
        return LabeledImages(pixels.astype(np.uint8), None)
    labels = labels.ravel()
    whole = labels.dtype.kind in "ui" and labels.min(initial=0) >= 0
    if not whole or len(labels) != len(images):
        raise InputError(
            f"{where}: {len(images)} images and {len(labels)} labels of type {labels.dtype}: "
            "save one integer >= 0 for each image, or no labels"
        )
    return LabeledImages(pixels.astype(np.uint8), labels.astype(np.int64))
