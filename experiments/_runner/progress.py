"""Progress bars for the work after training: measuring and drawing."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm

from jcnf import evaluate


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show a bar named `what` that advances with each chunk of rows solved in the context."""
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
