"""Readers of the batches of CIFAR-10, binary and Python version, without general unpickling."""

import io
import pickle
from typing import Any

import numpy as np

from jcnf._checks import InputError

DIM = 3 * 32 * 32


def read_binary(where: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read pixels (n, 3072), channel by channel, and labels (n,) from a binary batch.

    **Raises:** `InputError` for a batch of another size; the message names `where`.
    """
    size = 1 + DIM
    if not data or len(data) % size:
        raise InputError(
            f"{where}: has {len(data)} bytes, not a multiple of the {size} of a label and an image "
            "of CIFAR-10: download it again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    return rows[:, 1:], rows[:, 0]


def read_pickled(where: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read pixels (n, 3072), channel by channel, and labels (n,) from a Python batch.

    **Raises:** `InputError` for any other pickle, and for a damaged one.
    """
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return np.reshape(batch[b"data"].array, (-1, DIM)), np.array(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise any error
        raise InputError(
            f"{where}: is not a complete Python batch of CIFAR-10 ({error}): download it again"
        ) from None


class _Array:
    """Stand-in for numpy's array in a pickle, which accepts only an array of bytes."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if dtype.code != b"u1" or fortran:
            raise pickle.UnpicklingError("its array is not one of bytes, row by row")
        self.array = np.frombuffer(data, np.uint8).reshape(shape)


class _Dtype:
    def __init__(self, code: Any, *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and fields, which bytes do not have."""


class _Unpickler(pickle.Unpickler):
    """Unpickler of CIFAR-10's batches only, because other pickles can run arbitrary code."""

    _stand_ins = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return self._stand_ins[module_name, global_name]
