"""The types of training objectives."""

from typing import Any, Protocol

from jaxtyping import Array, Float, Key

Loss = tuple[Float[Array, ""], dict[str, Array]]


class Objective(Protocol):
    """A function from a model, usually a flow, a batch and a key to a loss and metrics.

    The loss, a scalar, is minimized; the metrics are scalars. They may include "failed", true if
    too many solves failed for the loss to be trained on. The key is consumed once, if at all. Bind
    the settings of an objective with `functools.partial`.
    """

    def __call__(self, model: Any, batch: Any, key: Key[Array, ""], /) -> Loss:
        """Return the loss and the metrics."""
        ...
