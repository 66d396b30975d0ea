"""Batches that hold a context beside x."""

import functools
from collections.abc import Callable


def with_context(objective: Callable) -> Callable:
    """An objective of x and a context as one of a batch: x, or a pair (x, context).

    That is what `jcnf.train.make_run` trains by: `objective(flow, batch, key)`. Settings go on.
    """

    @functools.wraps(objective)  # what it can be given is to be seen
    def of_batch(flow, batch, key, **settings):
        x, context = batch if isinstance(batch, tuple) else (batch, None)
        return objective(flow, x, key, context=context, **settings)

    return of_batch
