"""Two circles by the planar continuous flow of Chen et al. (2018), as in torchdiffeq's example."""

import dataclasses

from experiments.harness import main
from experiments.plane import PlaneFit, learn_flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoCircles(PlaneFit):
    """Two circles, and the planar flow with a gated hypernet: the source's settings, but for the
    learning rate, the tolerance and the penalty, without which paths become stiff.

    The source's own: --learning-rate 1e-3 --schedule constant --average 0 --rtol 1e-5 --atol 1e-5
    --penalties
    """

    data: str = "2circles"
    objective: str = "likelihood"
    field: str = "planar"
    # planar: units, hypernet's width
    widths: tuple[int, ...] = (64, 32)
    # variance 0.1
    base_scale: float = 0.1**0.5
    t1: float = 10.0
    rtol: float = 1e-4
    atol: float = 1e-4
    penalties: dict[str, float] = dataclasses.field(default_factory=lambda: {"kinetic": 0.01})
    batch: int = 512
    steps: int = 1000
    learning_rate: float = 3e-2
    warmup: int = 0
    log_every: int = 50
    validate_every: int = 100


def run(settings: TwoCircles) -> None:
    """Train, measure on fresh points, draw the figures."""
    learn_flow("two_circles", settings)


if __name__ == "__main__":
    main(run, TwoCircles)
