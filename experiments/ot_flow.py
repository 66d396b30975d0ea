"""OT-Flow: optimal transport by the gradient of a potential, with an HJB regularizer.

The settings are the source's for a CPU, with three changes: half the batch, drawn fresh at every
step; a third of its learning rate 0.1; and a cosine decay, where the source halves the rate every
100 steps. Its loss a1 L + a2 C + a3 R, with (a1, a2, a3) = (1, 100, 5), is 100 times the loss here:
C is the NLL, L the kinetic energy and R the HJB residual.
"""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr

from experiments._runner.cli import main
from experiments._runner.config import preset
from experiments._tasks.density2d import PlaneFit, ToySettings, learn_flow
from jcnf import Exact, Flow, evaluate, regularizers, transform
from jcnf._checks import InputError

MMD_POINTS = 5000
REGULARIZERS = (regularizers.kinetic, regularizers.hjb)


@preset
class OTFlow(ToySettings, PlaneFit):
    """A toy density, and a potential whose gradient carries the base to it."""

    data = "8gaussians"
    objective = "likelihood"
    field = "potential"
    widths = (32, 10)
    regularizers = (("kinetic", 0.01), ("hjb", 0.05))
    solver = "rk4"
    fixed_step = 1 / 8
    batch = 1024
    steps = 1000
    learning_rate = 0.03
    log_every = 50
    validate_every = 250

    def check(self) -> None:
        if self.field != "potential" or self.learn_t1 or self.augment:
            raise InputError(
                "OT-Flow needs --field potential, and neither --learn-t1 nor --augment: drop them, "
                "or use experiments.toy2d"
            )
        super().check()


def run(settings: OTFlow) -> None:
    """Train the flow, measure it on fresh points, and draw the figures."""
    learn_flow("ot_flow", settings, also=functools.partial(transport_figures, settings))


def transport_figures(settings: OTFlow, flow: Flow) -> dict[str, float]:
    """Return the transport cost, straightness and sample quality of a flow, on fresh points.

    - "transport_cost": mean of 1/2 integral |v|^2 dt
    - "hjb_residual": mean of integral |dPhi/dt - 1/2 |grad Phi|^2| dt
    - "straightness": mean squared distance between the two ends over twice `t1` times the cost; 1
      if all paths are straight with constant speed
    - "mmd", "mmd_floor": MMD of samples to data, and of data to data

    The first three are NaN if the solve of any point failed.
    """
    density, solve = settings.make_density(), settings.make_test_solve()
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 4), 3)
    x = density.sample(keys[0], MMD_POINTS)
    way = jax.jit(
        lambda x: transform(flow, x, solve=solve, divergence=Exact(), regularizers=REGULARIZERS)
    )(x)
    arrived = jnp.where(jnp.any(way.stats.failed), jnp.nan, 1.0)
    cost = arrived * jnp.mean(way.regularizers["kinetic"])
    distance = jnp.mean(jnp.sum((way.x - x) ** 2, axis=1))
    samples = evaluate.sample(flow, keys[1], MMD_POINTS, solve=solve)
    fresh = density.sample(keys[2], MMD_POINTS)
    return {
        "transport_cost": float(cost),
        "hjb_residual": float(arrived * jnp.mean(way.regularizers["hjb"])),
        "straightness": float(distance / (2 * cost * flow.bijection.t1)),
        "mmd": evaluate.mmd(jnp.asarray(samples.x[-1][~samples.failed]), fresh),
        "mmd_floor": evaluate.mmd(x, fresh),
    }


if __name__ == "__main__":
    main(run, OTFlow)
