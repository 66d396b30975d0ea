"""The batches of CIFAR-10, binary and python version; nothing is ever unpickled freely."""

import io
import pickle
from typing import Any

import numpy as np

from jcnf._checks import InputError

DIM = 3 * 32 * 32


def read_binary(where: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 3072), channel by channel, and labels (n,) of a batch of the binary version.

    Raises:
        InputError: a batch of another size; its message names `where`.
    """
    size = 1 + DIM
    if not data or len(data) % size:
        raise InputError(
            f"{where}: has {len(data)} bytes, no multiple of the {size} of a label and a picture "
            "of CIFAR-10; fetch it anew"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    return rows[:, 1:], rows[:, 0]


def read_pickled(where: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """As `read_binary`, of the python version.

    Raises:
        InputError: any other pickle, and a damaged one.
    """
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return np.reshape(batch[b"data"].array, (-1, DIM)), np.array(batch[b"labels"])
    except Exception as error:  # of a damaged pickle, any
        raise InputError(
            f"{where}: is not a whole python batch of CIFAR-10 ({error}); fetch it anew"
        ) from None


class _Array:
    """What stands for numpy's array in a pickle: made of bytes only, whatever else it says."""

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
        """Byte order and fields, which bytes have none of."""


class _Unpickler(pickle.Unpickler):
    """Reads what CIFAR-10's batches hold; reading any other pickle could run its author's code."""

    _stand_ins = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._stand_ins:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")
        return self._stand_ins[module_name, global_name]
