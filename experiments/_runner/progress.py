"""Bars that show what is under way after training: measuring and drawing."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm

from jcnf import evaluate


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show a bar named `what`, which moves with the chunks of rows that are solved inside."""
    shown = jax.process_index() == 0
    with tqdm(desc=what, total=0, unit="chunk", dynamic_ncols=True, disable=not shown) as bar:

        def report(done: int, number: int) -> None:
            if done:
                bar.update()
            else:
                bar.total += number
                bar.refresh()

        with evaluate.reporting(report):
            yield
