"""Learn six Gaussians by torchdyn's continuous normalizing flow, augmented or not.

    python -m experiments.six_gaussians
    python -m experiments.six_gaussians --augment 1

The network, solver, batch and weight decay are the source's. The samples are fresh at every step,
the learning rate decays as a cosine, and training takes a fifth of its 300 epochs of 16 batches.

The source's own settings: --steps 4800 --learning-rate 2e-3 --schedule constant --average 0
--clip 1e9 --warmup 0 --adjoint backsolve; its FFJORD variant adds
divergence:hutchinson --noise gaussian. Here --augment 1 learns a density of the extra dimension
too (Huang et al. 2020), where the source appends zeros.
"""

from experiments._runner.cli import main
from experiments._runner.config import Loop, Training
from experiments._runner.fields import MLP, FlowSettings
from experiments._runner.objectives import Likelihood
from experiments._runner.solves import TrainingSolve
from experiments._tasks.density2d import PlaneMeasure, ToyFlow, learn

SETTINGS = ToyFlow(
    data="6gaussians",
    objective=Likelihood(solve=TrainingSolve(rtol=1e-4, atol=1e-4)),
    flow=FlowSettings(field=MLP(widths=(64, 64, 64), time="ignore", activation="softplus")),
    training=Training(steps=1000, batch=1024, learning_rate=1e-2, weight_decay=1e-5),
    measure=PlaneMeasure(particles=2**14, frames=100),
    loop=Loop(log_every=50, validate_every=250),
)


def run(settings: ToyFlow) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn("six_gaussians", settings)


if __name__ == "__main__":
    main(run, SETTINGS)
