"""Optimal transport by the gradient of a potential, under an HJB penalty: OT-Flow."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr

from experiments._runner.cli import main
from experiments._runner.config import preset
from experiments._tasks.density2d import PlaneFit, ToySettings, learn_flow
from jcnf import CNF, Exact, evaluate, regularizers, transform
from jcnf._checks import InputError

MMD_POINTS = 5000
PENALTIES = (regularizers.kinetic, regularizers.hjb)


@preset
class OTFlow(ToySettings, PlaneFit):
    """A toy, and a potential whose gradient carries the base to it: the source's settings on a CPU,
    but for half the batch, which here is fresh at every step, and a learning rate that is a third
    of its 0.1 and falls as a cosine, where the source's halves every 100 steps.

    Its loss a1 L + a2 C + a3 R, with (a1, a2, a3) = (1, 100, 5), is 100 times the one here: C the
    NLL, L the kinetic energy, R the HJB residual.
    """

    data = "8gaussians"
    objective = "likelihood"
    field = "potential"
    widths = (32, 10)
    penalties = (("kinetic", 0.01), ("hjb", 0.05))
    solver = "rk4"
    fixed_step = 1 / 8
    batch = 1024
    steps = 1000
    learning_rate = 0.03
    log_every = 50
    validate_every = 250

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work."""
        if self.field != "potential" or self.learn_t1 or self.augment:
            raise InputError(
                "OT-Flow is of a potential of x and t: leave out --field, --learn-t1, --augment, "
                "or use experiments.toy2d"
            )
        super().check()


def run(settings: OTFlow) -> None:
    """Train, measure on fresh points, draw the figures."""
    learn_flow("ot_flow", settings, also=functools.partial(transport_figures, settings))


def transport_figures(settings: OTFlow, flow: CNF) -> dict[str, float]:
    """What the flow costs on fresh points, how straight it is, and how good its samples are.

    "transport_cost" is the mean of 1/2 integral |v|^2 dt, "hjb_residual" that of the integral of
    |dPhi/dt - 1/2 |grad Phi|^2|; "straightness" 1 where all go straight at a constant speed: the
    mean squared distance between the ends over twice the cost. NaN where a solve failed.
    """
    density, solve = settings.make_density(), settings.make_test_solve()
    keys = jr.split(jr.fold_in(jr.key(settings.seed), 4), 3)
    x = density.sample(keys[0], MMD_POINTS)
    way = jax.jit(
        lambda x: transform(flow, x, solve=solve, divergence=Exact(), regularizers=PENALTIES)
    )(x)
    arrived = jnp.where(jnp.any(way.stats.failed), jnp.nan, 1.0)
    cost = arrived * jnp.mean(way.penalties["kinetic"])
    distance = jnp.mean(jnp.sum((way.x - x) ** 2, axis=1))
    samples = evaluate.draw(flow, keys[1], MMD_POINTS, solve=solve)
    fresh = density.sample(keys[2], MMD_POINTS)
    return {
        "transport_cost": float(cost),
        "hjb_residual": float(arrived * jnp.mean(way.penalties["hjb"])),
        "straightness": float(distance / (2 * cost * flow.t1)),
        "mmd": evaluate.mmd(jnp.asarray(samples.x[-1][~samples.failed]), fresh),
        "mmd_floor": evaluate.mmd(x, fresh),
    }


if __name__ == "__main__":
    main(run, OTFlow)
