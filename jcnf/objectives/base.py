"""The types of training objectives."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Key

Loss = tuple[Float[Array, ""], dict[str, Array]]


@runtime_checkable
class Objective(Protocol):
    """A function from a model, usually a flow, a batch and a key to a loss and metrics.

    The loss, a scalar, is minimized; the metrics are scalars. They may include "failed", true if
    too many solves failed for the loss to be trained on, and "step_plan", the `Stats.step_plan` of
    its solve, which the next step's `solve` then follows. The key is consumed once, if at all. Bind
    the settings of an objective with `functools.partial`. `jcnf.fit` adds `context` and `solve` to
    them if it has these.
    """

    def __call__(
        self, model: Any, batch: Any, key: Key[Array, ""], /, *args: Any, **settings: Any
    ) -> Loss:
        """Return the loss and the metrics."""
        ...
