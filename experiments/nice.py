"""Learn a density in the plane by NICE (Dinh et al. 2014): couplings, and no ODE.

The parabola is one exactly, with a normal prior (the paper's is --base logistic): a coupling with
m(x1) = (1 - x1^2) / 2 leaves two normals to scale. So what there is of `nll_gap` is the networks'
and the training's, and `inverse_error`, the largest |x - to_data(to_base(x))| over as many fresh
points, is rounding.
"""

import dataclasses

import equinox as eqx
import jax.random as jr

from experiments.harness import main
from experiments.plane import PlaneLoop, ToySettings, learn
from experiments.run_settings import TrainingSettings, preset
from experiments.stages import Stage
from jcnf import NICE, distributions, evaluate, objectives, train
from jcnf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NICESettings(TrainingSettings):
    """NICE, trained by maximum likelihood."""

    # hidden widths of the network of each coupling
    widths: tuple[int, ...] = (64, 64)
    # additive couplings, whose parts take turns
    couplings: int = 4
    # the two parts of the components: halves, odd_even
    split: str = "halves"
    # prior: normal, logistic
    base: str = "normal"

    def check(self) -> None:
        """Raise `InputError` for settings that cannot work, before anything is compiled."""
        super().check()
        try:
            self.make_stages()
            eqx.filter_eval_shape(self.make_flow, 2)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def loss_units(self) -> str:
        """What the training loss is measured in."""
        return "nats"

    def make_flow(self, dim: int, context_dim: int = 0) -> NICE:
        """The untrained flow, which takes no context."""
        if context_dim:
            raise ValueError(f"NICE takes no context; got one of size {context_dim}")
        bases = distributions.BASES
        if self.base not in bases:
            raise ValueError(f"unknown base '{self.base}': use one of {', '.join(bases)}")
        return NICE(
            dim,
            self.widths,
            self.couplings,
            split=self.split,
            base=bases[self.base](dim),
            key=jr.fold_in(jr.key(self.seed), 0),
        )

    def make_stages(self) -> list[Stage]:
        """Maximum likelihood, and L-BFGS where there are steps for it."""
        return self.then_lbfgs(
            [
                Stage(
                    objectives.likelihood,
                    self.steps,
                    self.make_optimizer(self.steps, self.learning_rate),
                    train.by_reverse_mode,
                    self.average,
                    self.batch,
                )
            ]
        )


@preset
class PlaneNICE(ToySettings, NICESettings, PlaneLoop):
    """A toy density and the NICE that learns it."""

    data = "parabola"
    steps = 3000
    learning_rate = 3e-3


def run(settings: PlaneNICE) -> None:
    """Train, measure on fresh points, draw the figures."""
    key = jr.fold_in(jr.key(settings.seed), 3)
    points = settings.make_density().sample(key, settings.test_points)

    def also(flow):
        return {"inverse_error": evaluate.roundtrip_error(flow, points)}

    solve = evaluate.ACCURATE  # unused: NICE is exact
    learn("nice", settings, settings.make_flow(2), solve, solve, also=also)


if __name__ == "__main__":
    main(run, PlaneNICE)
