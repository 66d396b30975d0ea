"""Learn a toy density in the plane: the eight of FFJORD, and more."""

import dataclasses

from experiments._runner.cli import main
from experiments._tasks.density2d import PlaneFit, ToySettings, learn_flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy2D(ToySettings, PlaneFit):
    """A toy density and the flow that learns it."""


def run(settings: Toy2D) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn_flow("toy2d", settings)


if __name__ == "__main__":
    main(run, Toy2D)
