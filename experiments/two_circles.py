"""Learn two circles by the planar CNF of Chen et al. (2018), as in torchdiffeq's example.

    python -m experiments.two_circles

The settings are the source's but for the learning rate, the tolerances and the regularizer, without
which the flow becomes stiff. The source's own settings: --learning-rate 1e-3 --schedule constant
--average 0 --rtol 1e-5 --atol 1e-5 --clip 1e9 --regularizers
"""

from experiments._runner.cli import main
from experiments._runner.config import Loop, Training
from experiments._runner.fields import FlowSettings, Normal, Planar
from experiments._runner.objectives import Likelihood
from experiments._runner.solves import TrainingSolve
from experiments._tasks.density2d import ToyFlow, learn

SETTINGS = ToyFlow(
    data="2circles",
    objective=Likelihood(
        solve=TrainingSolve(rtol=1e-4, atol=1e-4), regularizers=(("kinetic", 0.01),)
    ),
    flow=FlowSettings(
        field=Planar(units=64, hyper_width=32),
        base=Normal(base_scale=0.1**0.5),  # a variance of 0.1
        t1=10.0,
    ),
    training=Training(steps=1000, batch=512, learning_rate=3e-2, warmup=0),
    loop=Loop(log_every=50, validate_every=100),
)


def run(settings: ToyFlow) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn("two_circles", settings)


if __name__ == "__main__":
    main(run, SETTINGS)
