"""Checkpoints: one file, written atomically, that says when it is damaged and runs no code.

The file is one line of JSON (format, whatever the caller notes, length of the rest, and SHA-256 of
notes and rest), then the leaves of a pytree as `eqx.tree_serialise_leaves` writes them (no pickle).
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from jcnf.errors import InputError

FORMAT = 1


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that exists whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, tree: PyTree, notes: dict[str, Any]) -> None:
    """Save the array leaves of `tree`, with JSON-able `notes` to be read back by `load`."""
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, tree)
    payload = buffer.getvalue()
    digest = _digest(notes, payload)
    header = {"format": FORMAT, "sha256": digest, "bytes": len(payload), "notes": notes}
    write_atomically(path, json.dumps(header).encode() + b"\n" + payload)


def load(path: Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The saved leaves in the structure of `like`, and the notes.

    **Raises:** `InputError` when the file is missing, damaged, of another format, or holds
    another structure than `like`.
    """
    notes, payload = _read(path)
    buffer = io.BytesIO(payload)
    try:
        tree = eqx.tree_deserialise_leaves(buffer, like)
        if buffer.read(1):
            raise ValueError("it has more arrays")
        return tree, notes
    except (RuntimeError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} holds another model than these settings describe "
            f"({str(error).splitlines()[0]}): use the settings it was written with"
        ) from None


def read_notes(path: Path) -> dict[str, Any]:
    """The notes alone; raises as `load` does."""
    return _read(path)[0]


def _digest(notes, payload):
    return hashlib.sha256(json.dumps(notes).encode() + payload).hexdigest()


def _read(path):
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: check the run directory, or start a new run")
    line, _, payload = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(line)
        form, digest, notes = header["format"], header["sha256"], header["notes"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is not a jcnf checkpoint, or its header is damaged: "
            "restore it from a copy, or start a new run with another --out"
        ) from None
    if form != FORMAT:
        raise InputError(
            f"{path} has checkpoint format {form}, this jcnf reads {FORMAT}: "
            "use the version that wrote it"
        )
    if _digest(notes, payload) != digest:
        raise InputError(
            f"{path} is damaged ({len(payload)} of {header.get('bytes')} bytes, or altered): "
            "restore it from a copy, or start a new run with another --out"
        )
    return notes, payload
