"""Checkpoint files: written atomically, checked for damage when read, and free of pickles.

A file is one line of JSON (the format, the caller's notes, the length of the rest, and the SHA-256
of notes and rest), followed by the leaves of a pytree as written by `eqx.tree_serialise_leaves`.
Loading one never runs code from it. `jcnf.training.checkpoint_manager` keeps several of them.
"""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from jcnf._checks import InputError

FORMAT = 1


class CorruptCheckpointError(InputError):
    """The file is not a checkpoint, or its content has changed since it was written."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that, whatever happens, it is there either completely or not at all.

    **Raises:** `OSError` with the name of the file; an earlier file of that name is left unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # so that the new name survives a power cut too
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # the write's own error is the one to report
            temporary.unlink(missing_ok=True)


def save(path: Path | str, tree: PyTree, notes: dict[str, Any] | None = None) -> None:
    """Save the array leaves of `tree`, and `notes` that JSON can hold, for `load` to read back."""
    notes = {} if notes is None else notes
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, eqx.filter(tree, eqx.is_array))
    payload = buffer.getvalue()
    digest = _digest(notes, payload)
    header = {"format": FORMAT, "sha256": digest, "bytes": len(payload), "notes": notes}
    write_atomically(Path(path), json.dumps(header).encode() + b"\n" + payload)


def load(path: Path | str, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """Return `like` with its arrays replaced by the saved ones, and the notes.

    The file has only arrays: make `like` by the code that made the saved tree, because another
    activation, for example, would not be noticed.

    **Raises:** `InputError` if the file is missing, has another format, or does not match the
    arrays of `like` (the message names the first difference); `CorruptCheckpointError` if the file
    is damaged or not a checkpoint.
    """
    notes, payload = _read(path)
    arrays, rest = eqx.partition(like, eqx.is_array)
    try:
        difference = _difference(payload, arrays)
    except ValueError:  # whole, but not written by `save`
        raise CorruptCheckpointError(
            f"{path} was not written by jcnf (its content is not plain arrays): "
            "restore it from a copy"
        ) from None
    if difference:
        raise InputError(
            f"{path} does not match the model of these settings ({difference}): "
            "use the settings and the precision that it was written with"
        )
    return eqx.combine(eqx.tree_deserialise_leaves(io.BytesIO(payload), arrays), rest), notes


def read_notes(path: Path | str) -> dict[str, Any]:
    """Return only the notes of a checkpoint.

    **Raises:** `InputError` if the file is missing or has another format;
    `CorruptCheckpointError` if it is damaged or not a checkpoint.
    """
    return _read(path)[0]


def _digest(notes, payload):
    return hashlib.sha256(json.dumps(notes).encode() + payload).hexdigest()


def _difference(payload, arrays):
    """Describe the first array whose dtype or shape differs from its leaf; None if all agree.

    The file holds dtypes that NumPy does not know, such as bfloat16, as raw bytes; these are
    compared by their item size.
    """
    buffer = io.BytesIO(payload)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        name = jax.tree_util.keystr(path)
        if buffer.tell() == len(payload):
            return f"the file has no {name}"
        there = np.lib.format.read_array(buffer, allow_pickle=False)
        same = there.dtype == leaf.dtype or (
            there.dtype.kind == "V" and there.dtype.itemsize == leaf.dtype.itemsize
        )
        if there.shape != leaf.shape or not same:
            return (
                f"expected {name} to be {leaf.dtype} {leaf.shape}; "
                f"the file has {there.dtype} {there.shape}"
            )
    return "the file has more arrays" if buffer.tell() < len(payload) else None


def _read(path):
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}: check the path")
    line, _, payload = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(line)
        form, digest, notes = header["format"], header["sha256"], dict(header["notes"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptCheckpointError(
            f"{path} is not a jcnf checkpoint, or its header is damaged: "
            "restore it from a copy, or start a new run in another directory"
        ) from None
    if form != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {form}, but this version of jcnf reads {FORMAT}: "
            "use the version that wrote it"
        )
    if _digest(notes, payload) != digest:
        raise CorruptCheckpointError(
            f"{path} is damaged ({len(payload)} of {header.get('bytes')} bytes, or altered): "
            "restore it from a copy, or start a new run in another directory"
        )
    return notes, payload
