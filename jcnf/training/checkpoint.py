"""Checkpoints: one file, written atomically, that says when it is damaged and runs no code.

The file is one line of JSON (format, whatever the caller notes, length of the rest, and SHA-256 of
notes and rest), then the leaves of a pytree as `eqx.tree_serialise_leaves` writes them (no pickle).
`jcnf.training.checkpoint_manager` keeps several of them.
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


class Damaged(InputError):
    """A file that is no checkpoint, or no longer the one that was written."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that exists whole or not at all, whatever happens meanwhile.

    **Raises:** `OSError`, with the name of the file; what was there before is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):  # so that its name outlives a power cut too
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # where not even that can be done
            temporary.unlink(missing_ok=True)


def save(path: Path, tree: PyTree, notes: dict[str, Any]) -> None:
    """Save the array leaves of `tree`, with JSON-able `notes` to be read back by `load`."""
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, eqx.filter(tree, eqx.is_array))
    payload = buffer.getvalue()
    digest = _digest(notes, payload)
    header = {"format": FORMAT, "sha256": digest, "bytes": len(payload), "notes": notes}
    write_atomically(path, json.dumps(header).encode() + b"\n" + payload)


def load(path: Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The saved arrays in place of those of `like`, and the notes.

    **Raises:** `InputError` when the file is missing, of another format, or holds another
    structure than `like`, of which it names the first difference; `Damaged` when it is that.
    """
    notes, payload = _read(path)
    arrays, rest = eqx.partition(like, eqx.is_array)
    try:
        difference = _difference(payload, arrays)
    except ValueError:  # whole, but not written by `save`
        raise Damaged(f"{path} holds no plain arrays: restore it from a copy") from None
    if difference:
        raise InputError(
            f"{path} holds another model than these settings describe ({difference}): "
            "use the settings and the precision it was written with"
        )
    return eqx.combine(eqx.tree_deserialise_leaves(io.BytesIO(payload), arrays), rest), notes


def read_notes(path: Path) -> dict[str, Any]:
    """The notes alone; raises as `load` does."""
    return _read(path)[0]


def _digest(notes, payload):
    return hashlib.sha256(json.dumps(notes).encode() + payload).hexdigest()


def _difference(payload, arrays):
    """The first array of the file that is not of the dtype and shape of its leaf; None if all are.

    Arrays of dtypes that numpy does not know, bfloat16 for one, are told by their shape and width.
    """
    buffer = io.BytesIO(payload)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        name = jax.tree_util.keystr(path)
        if buffer.tell() == len(payload):
            return f"it has no {name}"
        there = np.lib.format.read_array(buffer, allow_pickle=False)
        same = there.dtype == leaf.dtype or (
            there.dtype.kind == "V" and there.dtype.itemsize == leaf.dtype.itemsize
        )
        if there.shape != leaf.shape or not same:
            return (
                f"{name} is {there.dtype} {there.shape} in it, and {leaf.dtype} {leaf.shape} here"
            )
    return "it has more arrays" if buffer.tell() < len(payload) else None


def _read(path):
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: check the run directory, or start a new run")
    line, _, payload = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(line)
        form, digest, notes = header["format"], header["sha256"], dict(header["notes"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(
            f"{path} is not a jcnf checkpoint, or its header is damaged: "
            "restore it from a copy, or start a new run with another --out"
        ) from None
    if form != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {form}, this jcnf reads {FORMAT}: "
            "use the version that wrote it"
        )
    if _digest(notes, payload) != digest:
        raise Damaged(
            f"{path} is damaged ({len(payload)} of {header.get('bytes')} bytes, or altered): "
            "restore it from a copy, or start a new run with another --out"
        )
    return notes, payload
