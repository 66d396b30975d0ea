"""OT-Flow: optimal transport by the gradient of a potential, with an HJB regularizer.

    python -m experiments.ot_flow --data moons

The settings are the source's for a CPU, with three changes: half the batch, drawn fresh at every
step; a third of its learning rate 0.1; and a cosine decay, where the source halves the rate every
100 steps. Its loss a1 L + a2 C + a3 R, with (a1, a2, a3) = (1, 100, 5), is 100 times the loss here:
C is the NLL, L the kinetic energy and R the HJB residual.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.random as jr

from experiments._runner.cli import main
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import FlowSettings, Potential
from experiments._runner.objectives import Likelihood
from experiments._runner.solves import TrainingSolve
from experiments._tasks import figures
from experiments._tasks.density2d import PlaneFlow, PlaneMeasure, ToyName, learn
from jcnf import Exact, Flow, evaluate, regularizers, transform
from jcnf.data.toys import Toy, toy

MMD_POINTS = 5000
REGULARIZERS = (regularizers.kinetic, regularizers.hjb)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PotentialFlow(FlowSettings):
    """The flow: its potential, its base distribution and its end time."""

    field: Potential = Potential()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OTFlow(PlaneFlow):
    """A toy density, and a potential whose gradient carries the base to it."""

    # toy density
    data: ToyName = "8gaussians"

    objective: Likelihood = Likelihood(
        solve=TrainingSolve(solver="rk4", fixed_step=1 / 8),
        regularizers=(("kinetic", 0.01), ("hjb", 0.05)),
    )
    flow: PotentialFlow = PotentialFlow()
    training: Training = Training(steps=1000, batch=1024, learning_rate=0.03)
    measure: PlaneMeasure = PlaneMeasure()
    loop: Loop = Loop(log_every=50, validate_every=250)
    run: Run = Run()

    def make_density(self) -> Toy:
        return toy(self.data)


def run(settings: OTFlow) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn("ot_flow", settings, functools.partial(transport_figures, settings))


def transport_figures(settings: OTFlow, flow: Flow) -> dict[str, float]:
    """Return the transport cost, straightness and sample quality of a flow, on fresh points.

    - "transport_cost": mean of 1/2 integral |v|^2 dt
    - "hjb_residual": mean of integral |dPhi/dt - 1/2 |grad Phi|^2| dt
    - "straightness": mean squared distance between the two ends over twice `t1` times the cost; 1
      if all paths are straight with constant speed
    - "mmd", "mmd_floor": MMD of samples to data, and of data to data

    The first three are NaN if the solve of any point failed.
    """
    density, solve = settings.make_density(), settings.measure.make_solve()
    keys = jr.split(jr.fold_in(jr.key(settings.run.seed), 4), 3)
    x = density.sample(keys[0], MMD_POINTS)
    ended = jax.jit(
        lambda x: transform(flow, x, solve=solve, divergence=Exact(), regularizers=REGULARIZERS)
    )(x)
    known = jnp.where(jnp.any(ended.stats.failed), jnp.nan, 1.0)
    cost = known * jnp.mean(ended.regularizers["kinetic"])
    distance = jnp.mean(jnp.sum((ended.value - x) ** 2, axis=1))
    samples = evaluate.sample(flow, keys[1], MMD_POINTS, solve=solve)
    fresh = density.sample(keys[2], MMD_POINTS)
    return {
        "transport_cost": float(cost),
        "hjb_residual": float(known * jnp.mean(ended.regularizers["hjb"])),
        "straightness": float(distance / (2 * cost * flow.bijection.t1)),
        "mmd": figures.mmd_of(samples, fresh),
        "mmd_floor": evaluate.mmd(x, fresh),
    }


if __name__ == "__main__":
    main(run, OTFlow)
