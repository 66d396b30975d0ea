"""Checkpoints: what was saved is read back, or an error says what to do."""

import contextlib
import errno
import io
import json
import os
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jcnf._checks import InputError
from jcnf.training import checkpoint

TREE = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.asarray(7), jnp.zeros((), bool))}
NOTES = {"nll": 1.5, "columns": ["x", "ÿ"], "none": None}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state.jcnf"
    checkpoint.save(path, TREE, NOTES)
    return path


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_round_trip(path):
    like = jax.tree.map(jnp.zeros_like, TREE)
    tree, notes = checkpoint.load(path, like)
    assert_same(tree, TREE)
    assert notes == checkpoint.read_notes(path) == NOTES


def test_what_is_no_array_stays_as_it_is(tmp_path):
    checkpoint.save(tmp_path / "state", {"a": 1.5, "b": jnp.ones(2), "c": "text"}, {})
    tree, _ = checkpoint.load(tmp_path / "state", {"a": 2.5, "b": jnp.zeros(2), "c": len})
    assert_same(tree.pop("b"), jnp.ones(2))
    assert tree == {"a": 2.5, "c": len}


def test_the_header_is_a_line_of_json(path):
    header = json.loads(path.read_bytes().split(b"\n")[0])
    assert header["format"] == checkpoint.FORMAT
    assert header["notes"] == NOTES


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        ({"a": jnp.zeros((3, 2)), "b": TREE["b"]}, "(3, 2); the file has float64 (2, 3)"),
        ({"a": jnp.zeros((2, 3), jnp.float32), "b": TREE["b"]}, "['a'] to be float32 (2, 3)"),
        ({"a": TREE["a"], "b": (*TREE["b"], jnp.zeros(2))}, "the file has no ['b'][2]"),
        ({"a": TREE["a"], "b": TREE["b"][:1]}, "the file has more arrays"),
        ({"a": TREE["a"]}, "the file has more arrays"),
    ],
)
def test_another_structure_is_named(path, like, difference):
    with pytest.raises(InputError, match="does not match the model of these settings") as e:
        checkpoint.load(path, like)
    assert difference in str(e.value)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_bfloat16_comes_back(tmp_path):
    tree = {"a": jnp.asarray([1.5, -2.0], jnp.bfloat16), "b": jnp.ones(2)}
    for saved in (tree, jax.tree.map(np.asarray, tree)):
        checkpoint.save(tmp_path / "state", saved, {})
        assert_same(checkpoint.load(tmp_path / "state", tree)[0], tree)


def test_missing(tmp_path):
    with pytest.raises(InputError, match=re.escape(f"there is no checkpoint {tmp_path}: check")):
        checkpoint.load(tmp_path, TREE)


DEEP = b"[" * 100_000 + b"]" * 100_000
NO_NOTES = b'{"format": 1, "sha256": "0", "notes": [1]}'
GARBAGE = [b"", b"\n", b"\x93NUMPY", b"[1]", b'{"format": 1}\n', b"null", DEEP, NO_NOTES]


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: str(content[:12]))
def test_garbage(tmp_path, content):
    path = tmp_path / "garbage"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a jcnf checkpoint, or its header is damaged"):
        checkpoint.load(path, TREE)


class Opened:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def file_of(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


HEADER = file_of(np.ones(3))[:-24]
PAYLOADS = {
    "objects": file_of(np.array([Opened()], dtype=object)),
    "a pickle": pickle.dumps(Opened()),
    "an archive": b"PK\x03\x04" + bytes(100),
    "more than there is": HEADER,
    "half a header": HEADER[:50],
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_whole_file_of_something_else_runs_no_code(tmp_path, name):
    """The file has a correct SHA-256, which anyone can compute."""
    path, payload = tmp_path / "state.jcnf", PAYLOADS[name]
    head = {"format": checkpoint.FORMAT, "sha256": checkpoint._digest({}, payload), "notes": {}}
    path.write_bytes(json.dumps(head).encode() + b"\n" + payload)
    with pytest.raises(InputError, match="was not written by jcnf"):
        checkpoint.load(path, TREE)


def test_another_format(path):
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2', 1))
    with pytest.raises(InputError, match="format 2, but this version of jcnf reads 1: use the"):
        checkpoint.load(path, TREE)


def test_truncated(path):
    content = path.read_bytes()
    for size in range(0, len(content), 17):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="damaged") as e:
            checkpoint.load(path, TREE)
    path.write_bytes(content[:-1])
    length = len(content.split(b"\n", 1)[1])
    with pytest.raises(InputError, match=f"{length - 1} of {length} bytes") as e:
        checkpoint.load(path, TREE)
    assert "restore it from a copy, or start a new run" in str(e.value)


def test_no_flipped_byte_goes_unnoticed(path):
    content, unnoticed = path.read_bytes(), []
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        with contextlib.suppress(InputError):
            tree, notes = checkpoint.load(path, TREE)
            # If the file can still be read, the flipped byte is in the length, which is used only
            # in a message.
            assert_same(tree, TREE)
            assert notes == NOTES
            unnoticed.append(content[i : i + 1])
    assert b"".join(unnoticed).startswith(b"bytes")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, broken):
    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"a": jnp.ones(1000)}, {})
    monkeypatch.undo()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert_same(checkpoint.load(path, TREE)[0], TREE)


def test_overwrites_and_leaves_no_temporary_file(path):
    checkpoint.save(path, {"a": jnp.ones(3)}, {})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert_same(checkpoint.load(path, {"a": jnp.zeros(3)})[0], {"a": jnp.ones(3)})
