"""What a run says on the terminal beside its results: progress bars, and warnings."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm

from jcnf import evaluate


def show_warnings_in_one_line() -> None:
    """From now on, show a warning as a line on standard error, by the first process only."""

    def show(message, *_):
        if jax.process_index() == 0:
            tqdm.write(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show


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
