"""The checkpoints of one run: which are kept and restored, and what is left after a full disk."""

import errno
import os
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jcnf._checks import InputError
from jcnf.training import checkpoint
from jcnf.training.checkpoint_manager import CheckpointManager


def tree(step):
    return {"x": jnp.full(3, float(step))}


def like(notes):
    return tree(0)


@pytest.fixture
def keeper(tmp_path):
    with CheckpointManager(tmp_path / "checkpoints", keep=2) as keeper:
        yield keeper


def saved(keeper, *steps, also=()):
    for step in steps:
        keeper.save(step, tree(step), {"step": step}, also=also)
    keeper.wait()


def test_the_last_few_and_those_asked_for_are_kept(keeper):
    saved(keeper, 0, 10, 20, also=[10])
    assert keeper.steps() == [10, 20]
    saved(keeper, 30, 40, also=[0, 10])
    assert keeper.steps() == [10, 30, 40]
    saved(keeper, 50, also=[50])
    assert keeper.steps() == [40, 50]


def test_the_newest_is_restored_with_its_notes(keeper):
    assert keeper.restore(like) is None
    saved(keeper, 5, 10)
    found = keeper.restore(like)
    assert (found.step, found.notes, found.damaged) == (10, {"step": 10}, [])
    np.testing.assert_array_equal(found.tree["x"], tree(10)["x"])
    assert keeper.restore(like, upto=9).step == 5
    assert keeper.restore(like, upto=4) is None


def test_what_is_saved_is_the_tree_as_it_was(keeper, monkeypatch):
    """The write is delayed until the array it came from has been overwritten."""
    array, go, save = np.ones(3), threading.Event(), checkpoint.save

    def late(*arguments):
        go.wait(10)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", late)
    keeper.save(1, {"x": array}, {})
    assert not keeper.path(1).exists()
    array[:] = 7
    go.set()
    assert keeper.steps() == [1], "it waits"
    np.testing.assert_array_equal(keeper.restore(lambda _: {"x": array}).tree["x"], np.ones(3))


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_a_damaged_one_falls_back_to_the_one_before(keeper, harm):
    saved(keeper, 5, 10)
    content = bytearray(keeper.path(10).read_bytes())
    content[-5] ^= 1
    new = {"truncate": content[:-40], "flip": content, "empty": b""}[harm]
    keeper.path(10).write_bytes(new)
    found = keeper.restore(like)
    assert found.step == 5
    assert found.damaged == [keeper.path(10)]
    # The damaged file is set aside unchanged and does not block saving the same step again.
    aside = keeper.folder / "000000010.jcnf.damaged"
    assert aside.read_bytes() == new
    saved(keeper, 10)
    assert keeper.restore(like).step == 10


def test_files_of_others_are_passed_over(keeper):
    saved(keeper, 5, 10)
    for name in ("000000010 (copy).jcnf", "10.jcnf", "30.jcnf", "notes.txt"):
        (keeper.folder / name).write_bytes(b"?")
    keeper.path(40).symlink_to("nowhere")
    assert keeper.steps() == [5, 10]
    assert keeper.restore(like).step == 10
    saved(keeper, 15)
    assert keeper.steps() == [10, 15]


def test_all_damaged_is_an_error_that_touches_nothing(keeper):
    saved(keeper, 5, 10)
    for step in (5, 10):
        keeper.path(step).write_bytes(b"?")
    with pytest.raises(InputError, match=r"can be read; the newest: .*000000010\.jcnf is not"):
        keeper.restore(like)
    assert keeper.steps() == [5, 10]


def test_another_model_is_no_reason_to_fall_back(keeper):
    saved(keeper, 5, 10)
    with pytest.raises(InputError, match=r"to be float64 \(4,\); the file has float64 \(3,\)"):
        keeper.restore(lambda notes: {"x": jnp.zeros(4)})
    assert keeper.steps() == [5, 10]


def test_later_ones_are_forgotten(keeper):
    saved(keeper, 5, 10)
    keeper.delete_after(5)
    assert keeper.steps() == [5]


def test_what_a_kill_left_of_a_write_is_cleared_away(keeper):
    saved(keeper, 5)
    (keeper.folder / ".000000010.jcnf.123").write_bytes(b"half")
    assert keeper.restore(like).step == 5
    assert [path.name for path in keeper.folder.iterdir()] == ["000000005.jcnf"]


def test_a_full_disk_is_raised_and_leaves_the_last_whole(keeper, monkeypatch):
    saved(keeper, 5)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    keeper.save(10, tree(10), {})
    with pytest.raises(OSError, match=r"No space left on device.*000000010\.jcnf"):
        keeper.wait()
    monkeypatch.undo()
    assert [path.name for path in keeper.folder.iterdir()] == ["000000005.jcnf"]
    assert keeper.restore(like).step == 5


def test_a_context_ends_with_all_on_disk_and_hides_no_error(tmp_path, monkeypatch):
    with CheckpointManager(tmp_path) as keeper:
        keeper.save(1, tree(1), {})
    assert keeper.steps() == [1]
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), CheckpointManager(tmp_path) as keeper:
        keeper.save(2, tree(2), {})
    with pytest.raises(KeyError), CheckpointManager(tmp_path) as keeper:
        keeper.save(2, {}["no tree"], {})
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        CheckpointManager(tmp_path, 0)
