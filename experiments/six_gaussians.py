"""Six Gaussians by torchdyn's continuous normalizing flow, augmented if wanted."""

import dataclasses

from experiments.harness import main
from experiments.plane import PlaneFit, learn_flow


@dataclasses.dataclass(frozen=True, kw_only=True)
class SixGaussians(PlaneFit):
    """Six Gaussians, and a softplus network that does not know the time: the source's settings, but
    for the learning rate, which falls as a cosine, and a fifth of its 300 epochs of 16 batches.

    --divergence hutchinson is the source's FFJORD variant, --augment 1 its augmentation.
    """

    data: str = "6gaussians"
    objective: str = "likelihood"
    field: str = "mlp"
    widths: tuple[int, ...] = (64, 64, 64)
    time: str = "ignore"
    activation: str = "softplus"
    rtol: float = 1e-4
    atol: float = 1e-4
    batch: int = 1024
    steps: int = 1000
    learning_rate: float = 1e-2
    weight_decay: float = 1e-5
    # 2^14 base samples, at 100 times
    particles: int = 2**14
    frames: int = 100
    log_every: int = 50
    validate_every: int = 250


def run(settings: SixGaussians) -> None:
    """Train, measure on fresh points, draw the figures."""
    learn_flow("six_gaussians", settings)


if __name__ == "__main__":
    main(run, SixGaussians)
