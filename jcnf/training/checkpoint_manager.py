"""Keep the checkpoints of one run: the last few and selected ones, written in the background."""

import concurrent.futures
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from jcnf._checks import InputError
from jcnf.training import checkpoint


class Restored(NamedTuple):
    """A restored checkpoint."""

    step: int
    tree: Any
    notes: dict[str, Any]
    damaged: list[Path]  # newer checkpoints that could not be read


class CheckpointManager:
    """A folder of checkpoints, with one file for each saved step.

    `save` copies the arrays and returns. A thread writes them, then removes the checkpoints that
    are neither among the last `keep` nor asked for. Only one write runs at a time: `save`, `steps`,
    `restore` and `delete_after` first wait for it. Leaving the manager as a context waits for the
    last write too.

    **Raises:** `ValueError` if `keep` is below 1. Each method raises `OSError` if the disk is full
    or cannot be written; an error of a background write is raised at the next call that waits for
    it. Checkpoints that are already on disk stay intact.
    """

    def __init__(self, folder: Path, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}")
        self.folder, self.keep = folder, keep
        self.stalled = 0.0  # seconds that the caller has waited for saving
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """Return the steps on disk in ascending order, damaged ones included.

        Files that are not checkpoints are ignored.
        """
        self.wait()
        return self._on_disk()

    def path(self, step: int) -> Path:
        return self.folder / f"{step:09}.jcnf"

    def save(
        self, step: int, tree: PyTree, notes: dict[str, Any], *, also: Collection[int] = ()
    ) -> None:
        """Save `tree` as it is now. The steps in `also` are kept in addition to the last ones."""
        self.wait()
        tic = time.perf_counter()
        copy = jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, tree)
        self._writing = self._thread.submit(self._write, step, copy, notes, also)
        self.stalled += time.perf_counter() - tic

    def poll(self) -> None:
        """Raise the error of the background write if it has ended with one; do not wait for it."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            tic = time.perf_counter()
            try:
                writing.result()
            finally:
                self.stalled += time.perf_counter() - tic

    def restore(
        self, like: Callable[[dict[str, Any]], PyTree], *, upto: int | None = None
    ) -> Restored | None:
        """Return the newest readable checkpoint up to step `upto`, or None if there are none.

        `like(notes)` returns a pytree with the structure of a checkpoint that has these notes.
        Damaged checkpoints that are newer are renamed to NAME.damaged.

        **Raises:** `InputError` if all checkpoints are damaged, or if the newest readable one does
        not match `like`.
        """
        steps = self.steps()
        for leftover in self.folder.glob(".*.jcnf.*"):  # of writes that were killed
            leftover.unlink()
        damaged: dict[Path, str] = {}
        for step in reversed(steps):
            if upto is not None and step > upto:
                continue
            try:
                notes = checkpoint.read_notes(self.path(step))
                tree, notes = checkpoint.load(self.path(step), like(notes))
            except checkpoint.CorruptCheckpointError as error:
                damaged[self.path(step)] = str(error)
                continue
            for path in damaged:
                path.rename(f"{path}.damaged")
            return Restored(step, tree, notes, list(damaged))
        if damaged:
            raise InputError(
                f"no checkpoint in {self.folder} can be read; the newest: "
                f"{next(iter(damaged.values()))}"
            )
        return None

    def delete_after(self, last: int) -> None:
        """Remove the checkpoints of steps later than `last`."""
        for step in self.steps():
            if step > last:
                self.path(step).unlink()

    def _on_disk(self):
        numbers = (path.stem for path in self.folder.glob("[0-9]*.jcnf"))
        steps = {int(number) for number in numbers if number.isdecimal()}
        return sorted(step for step in steps if self.path(step).exists())

    def _write(self, step, tree, notes, also):
        self.folder.mkdir(exist_ok=True)
        checkpoint.save(self.path(step), tree, notes)
        steps = self._on_disk()
        for old in steps:
            if old not in (*steps[-self.keep :], *also):
                self.path(old).unlink()
