"""What training says about bad data, samples left out of the loss, and skipped updates."""

import warnings
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from jcnf import sharding
from jcnf._checks import check_finite
from jcnf.training.state import MetricSums, TrainState

MAX_SKIPPED_IN_A_ROW = 10
_REASONS = {
    "skipped_solve": "because the ODE solve failed for more than a tenth of the rows",
    "skipped_loss": "because the loss was not finite",
    "skipped_gradient": "because the gradient was not finite",
}


def check_data(data: Any, name: str = "data") -> None:
    """Raise `ValueError` for data with NaN or inf, naming the first rows."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if eqx.is_inexact_array(leaf) and not isinstance(leaf, Tracer):
            values = sharding.to_host(leaf)
            # Check in the dtype of training: a large float64 may be infinite in float32.
            with np.errstate(over="ignore"):
                values = np.asarray(values).astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
            check_finite(**{f"{name}{jax.tree_util.keystr(path)}": values})


def report(sums: MetricSums, start: int, state: TrainState, until: int) -> None:
    """Warn, in the name of the caller's caller, of what the loss or the training left out.

    **Arguments:**

    - `sums`: the sums over the steps to report on, which began at step `start`.
    - `state`: the state after them.
    - `until`: the step at which they should have ended.

    **Raises:** `RuntimeError` if none of these steps applied an update and either none ever did
    (a single skipped step is excused) or at least `MAX_SKIPPED_IN_A_ROW` in a row were skipped.
    """
    failed_rows, skipped = int(sums.sums.get("failed_rows", 0)), int(sums.skipped["skipped"])
    taken, end = int(sums.applied) + skipped, int(state.step)
    if failed_rows:
        warnings.warn(
            f"{failed_rows} samples were left out of the loss in the {taken} updates after step "
            f"{start}, because their ODE solve failed. Look for outliers in the data; raise "
            "max_steps of the solve if many fail.",
            stacklevel=3,
        )
    if not skipped and end >= until:
        return
    counts = ((int(sums.skipped[name]), why) for name, why in _REASONS.items())
    why = ", ".join(f"{count} {reason}" for count, reason in counts if count)
    told = f"{skipped} of {taken} updates after step {start} were skipped: {why}. "
    if end < until:
        told += (
            f"Training ended before step {until}, after {state.stuck} skipped updates in a row. "
        )
    told += (
        "Look for NaN, inf or huge values in the batches; lower the learning rate or clip "
        "gradients; loosen the tolerances or raise max_steps of the solve."
    )
    untrained = int(state.skipped) == end > start + 1
    if skipped == taken and (untrained or int(state.stuck) >= MAX_SKIPPED_IN_A_ROW):
        raise RuntimeError(f"nothing was learned: {told}")
    warnings.warn(told, stacklevel=3)
