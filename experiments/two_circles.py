"""Learn two circles by the planar CNF of Chen et al. (2018), as in torchdiffeq's example.

The settings are the source's but for the learning rate, the tolerances and the regularizer, without
which the flow becomes stiff. The source's own settings: --learning-rate 1e-3 --schedule constant
--average 0 --rtol 1e-5 --atol 1e-5 --clip 1e9 --regularizers
"""

from experiments._runner.cli import main
from experiments._runner.config import preset
from experiments._tasks.density2d import PlaneFit, ToySettings, learn_flow


@preset
class TwoCircles(ToySettings, PlaneFit):
    """Two circles, and the planar flow with a gated hypernet that learns them."""

    data = "2circles"
    objective = "likelihood"
    field = "planar"
    widths = (64, 32)
    base_scale = 0.1**0.5  # a variance of 0.1
    t1 = 10.0
    rtol = 1e-4
    atol = 1e-4
    regularizers = (("kinetic", 0.01),)
    batch = 512
    steps = 1000
    learning_rate = 3e-2
    warmup = 0
    log_every = 50
    validate_every = 100


def run(settings: TwoCircles) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn_flow("two_circles", settings)


if __name__ == "__main__":
    main(run, TwoCircles)
