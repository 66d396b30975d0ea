"""The checkpoints of one run: the last few and chosen ones, written beside the training."""

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
    """A checkpoint that was read."""

    step: int
    tree: Any
    notes: dict[str, Any]
    damaged: list[Path]  # newer ones that could not be


class Keeper:
    """A folder of checkpoints, a file for each step that was saved.

    `save` copies the arrays and returns; a thread writes them, and then removes what is neither
    among the last `keep` nor asked for. One write is under way at a time: every other method waits
    for it. As a context it waits at the end, whatever happened.

    **Raises:** `ValueError` where `keep` is below 1; each method `OSError` where a disk is full or
    cannot be written, of a write in the background at the next call. What is on disk by then stays
    whole.
    """

    def __init__(self, folder: Path, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}")
        self.folder, self.keep = folder, keep
        self.stalled = 0.0  # seconds for which saving has kept the caller
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """Those on disk, ascending, damaged ones included; other files are passed over."""
        self.wait()
        return self._on_disk()

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"{step:09}.jcnf"

    def save(
        self, step: int, tree: PyTree, notes: dict[str, Any], *, also: Collection[int] = ()
    ) -> None:
        """Save `tree` as it is now. `also` are the steps to keep beside the last ones."""
        self.wait()
        tic = time.perf_counter()
        copy = jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, tree)
        self._writing = self._thread.submit(self._write, step, copy, notes, also)
        self.stalled += time.perf_counter() - tic

    def poll(self) -> None:
        """Raise what a write has met, if one has."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return once everything is on disk."""
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
        """The newest checkpoint, no later than `upto`, that can be read; None where there is none.

        `like(notes)` is of the structure that one with these notes has. Damaged ones that are newer
        are renamed to NAME.damaged.

        **Raises:** `InputError` where all are damaged, or it holds another structure.
        """
        steps = self.steps()
        for leftover in self.folder.glob(".*.jcnf.*"):  # of writes that a kill cut short
            leftover.unlink()
        damaged: dict[Path, str] = {}
        for step in reversed(steps):
            if upto is not None and step > upto:
                continue
            try:
                notes = checkpoint.read_notes(self.path(step))
                tree, notes = checkpoint.load(self.path(step), like(notes))
            except checkpoint.Damaged as error:
                damaged[self.path(step)] = str(error)
                continue
            for path in damaged:
                path.rename(f"{path}.damaged")
            return Restored(step, tree, notes, list(damaged))
        if damaged:
            raise InputError(f"no checkpoint can be read: {next(iter(damaged.values()))}")
        return None

    def forget(self, after: int) -> None:
        """Remove the checkpoints of later steps."""
        for step in self.steps():
            if step > after:
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
