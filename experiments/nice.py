"""Learn a density in the plane, or of images, by NICE (Dinh et al. 2014): couplings, no ODE.

The default toy, the parabola, is a NICE exactly if the prior is normal (the paper's is
--base logistic): a coupling with m(x1) = (1 - x1^2) / 2 leaves two normals to scale. So any
`nll_gap` comes from the networks and their training, and `inverse_error`, the largest
|x - to_data(to_base(x))| over fresh points, is rounding.

Images (--data digits, or --data mnist --path FILE) are x = (pixel + u) / levels in [0, 1]^dim, and
`test_nll` is the negative of the paper's test log-likelihood. The preset mnist-paper has the
paper's networks, five layers of width 1000; mnist has smaller ones.
"""

import dataclasses

import equinox as eqx
import jax.random as jr

from experiments._runner.cli import main
from experiments._runner.config import MAX_LAYERS, TrainingSettings, preset
from experiments._runner.stages import Stage
from experiments._tasks.density2d import PlaneLoop, ToySettings, learn
from experiments._tasks.image_data import held_out
from experiments._tasks.images import ImageLoop, learn_pictures
from jcnf import NICE, Flow, distributions, evaluate, flows, objectives
from jcnf._checks import InputError

CALIBRATION_IMAGES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class NICESettings(TrainingSettings):
    """Settings of a NICE trained by maximum likelihood."""

    # hidden widths of the network of each coupling
    widths: tuple[int, ...] = (64, 64)
    # additive couplings, which change the two parts in turn
    couplings: int = 4
    # how to split the components into two parts: halves, odd_even
    split: str = "halves"
    # base distribution (prior): normal, logistic
    base: str = "normal"

    def check(self) -> None:
        super().check()
        self.sizes("widths")
        self.at_least(1, "couplings", most=MAX_LAYERS)
        try:
            self.make_stages()
            eqx.filter_eval_shape(self.make_flow, 2)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def loss_units(self) -> str:
        return "nats"

    def make_flow(self, dim: int, context_dim: int = 0) -> Flow:
        """Return the untrained flow; raise `ValueError` for a context, which it cannot take."""
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
    """Images and the NICE that learns them."""

    split = "odd_even"
    base = "logistic"
    widths = (256, 256)
    steps = 3000
    batch = 256
    learning_rate = 1e-3
    validate_every = 250


@preset
class MNISTNICE(DigitsNICE):
    """NICE of MNIST that trains in minutes."""

    data = "mnist"
    widths = (512, 512)
    steps = 10_000
    batch = 200


@preset
class PaperNICE(MNISTNICE):
    """NICE of MNIST with the paper's networks (section 5.1)."""

    widths = (1000,) * 5


def run(settings: PlaneNICE | DigitsNICE) -> None:
    """Train the flow, measure it on fresh points or on the test part, and draw the figures."""
    if isinstance(settings, PlaneNICE):
        learn_plane(settings)
        return

    def calibrated(images):
        key = jr.fold_in(jr.key(settings.seed), 4)
        x = held_out(images.train, images.levels, CALIBRATION_IMAGES, key)
        return flows.calibrated(settings.make_flow(settings.dim), x)

    learn_pictures("nice", settings, calibrated)


def learn_plane(settings: PlaneNICE) -> None:
    """Train on a toy density, measure on fresh points, and draw the figures."""
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
