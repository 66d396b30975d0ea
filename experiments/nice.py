"""Learn a density by NICE (Dinh et al. 2014), couplings and no ODE: in the plane, or of pictures.

The parabola is one exactly, with a normal prior (the paper's is --base logistic): a coupling with
m(x1) = (1 - x1^2) / 2 leaves two normals to scale. So what there is of `nll_gap` is the networks'
and the training's, and `inverse_error`, the largest |x - to_data(to_base(x))| over as many fresh
points, is rounding.

Pictures (--data digits, --data mnist --path FILE) are x = (pixel + u) / levels: `test_nll` is that
of x in [0, 1]^dim, minus the paper's test log-likelihood. The preset mnist-paper has its
networks, of five layers of 1000; mnist has quicker ones.
"""

import dataclasses

import equinox as eqx
import jax.random as jr

from experiments._runner.cli import main
from experiments._runner.config import LAYERS, TrainingSettings, preset
from experiments._runner.stages import Stage
from experiments._tasks.density2d import PlaneLoop, ToySettings, learn
from experiments._tasks.image_data import held_out
from experiments._tasks.images import ImageLoop, learn_pictures
from jcnf import NICE, distributions, evaluate, objectives
from jcnf._checks import InputError

CALIBRATION = 10_000  # training pictures by which the flow is calibrated


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
        self.sizes("widths")
        self.at_least(1, "couplings", most=LAYERS)
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
                    None,
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


@preset
class DigitsNICE(NICESettings, ImageLoop):
    """Pictures and the NICE that learns them."""

    split = "odd_even"
    base = "logistic"
    widths = (256, 256)
    steps = 3000
    batch = 256
    learning_rate = 1e-3
    validate_every = 250


@preset
class MNISTNICE(DigitsNICE):
    """MNIST, in minutes."""

    data = "mnist"
    widths = (512, 512)
    steps = 10_000
    batch = 200


@preset
class PaperNICE(MNISTNICE):
    """MNIST by the paper's networks (section 5.1)."""

    widths = (1000,) * 5


def run(settings: PlaneNICE | DigitsNICE) -> None:
    """Train, measure on fresh points or on the test part, draw the figures."""
    if isinstance(settings, PlaneNICE):
        learn_plane(settings)
        return

    def calibrated(images):
        key = jr.fold_in(jr.key(settings.seed), 4)
        x = held_out(images.train, images.levels, CALIBRATION, key)
        return settings.make_flow(settings.dim).calibrated(x)

    learn_pictures("nice", settings, calibrated)


def learn_plane(settings: PlaneNICE) -> None:
    """Train on a toy, measure on fresh points, draw the figures."""
    key = jr.fold_in(jr.key(settings.seed), 3)
    points = settings.make_density().sample(key, settings.test_points)

    def also(flow):
        return {"inverse_error": evaluate.roundtrip_error(flow, points)}

    solve = evaluate.ACCURATE  # unused: NICE is exact
    learn("nice", settings, settings.make_flow(2), solve, solve, also=also)


if __name__ == "__main__":
    main(
        run,
        {
            "parabola": PlaneNICE,
            "digits": DigitsNICE,
            "mnist": MNISTNICE,
            "mnist-paper": PaperNICE,
        },
    )
