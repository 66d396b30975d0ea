"""Learn a density in the plane, or of images, by NICE (Dinh et al. 2014): couplings, no ODE.

    python -m experiments.nice --data moons base:logistic
    python -m experiments.nice digits
    python -m experiments.nice mnist --files mnist.npz

The default toy, the parabola, is a NICE exactly if the prior is normal (the paper's is logistic): a
coupling with m(x1) = (1 - x1^2) / 2 leaves two normals to scale. So any `nll_gap` comes from the
networks and their training, and `inverse_error`, the largest |x - to_data(to_base(x))| over fresh
points, is rounding.

Images are x = (pixel + u) / levels in [0, 1]^dim, and `test_nll` is the negative of the paper's
test log-likelihood. mnist-paper has the paper's networks (section 5.1), five layers of width 1000;
mnist has smaller ones, which train in minutes.
"""

import dataclasses
from typing import Annotated, Literal

import jax.random as jr
from tyro.conf import Fixed, Suppress

from experiments._runner.cli import main
from experiments._runner.config import Loop, LoopExperiment, Measure, Run, Training
from experiments._runner.fields import Base, Logistic, Normal
from experiments._runner.settings import MAX_LAYERS, Positive, Range, Settings, Widths
from experiments._runner.stages import Stage
from experiments._tasks.density2d import PlaneExperiment, PlaneMeasure, ToyName, learn
from experiments._tasks.image_data import ImageData, held_out
from experiments._tasks.images import ImageExperiment, ImageMeasure, learn_images
from jcnf import NICE, Flow, evaluate, flows, objectives
from jcnf.data.images import Images
from jcnf.data.toys import Toy, toy

CALIBRATION_IMAGES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Couplings(Settings):
    """The flow: additive couplings and one scaling."""

    # hidden widths of the network of each coupling
    widths: Widths = (64, 64)
    # number of additive couplings, which change the two parts in turn
    couplings: Annotated[int, Range(1, MAX_LAYERS)] = 4
    # how to split the components into two parts
    split: Literal["halves", "odd_even"] = "halves"
    base: Base = Normal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSolves(Measure):
    """Measuring a flow that solves no ODE."""

    test_tolerance: Suppress[Fixed[Positive]] = 1e-5  # without effect


@dataclasses.dataclass(frozen=True, kw_only=True)
class NICEPlaneMeasure(NoSolves, PlaneMeasure):
    """Held-out numbers and figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NICEImageMeasure(NoSolves, ImageMeasure):
    """Held-out numbers."""


class NICEExperiment(LoopExperiment):
    """The settings of a NICE trained by maximum likelihood."""

    flow: Couplings

    def make_flow(self, dim: int, context_dim: int = 0, data: object = None) -> Flow:
        """Return the untrained flow; raise `ValueError` for a context, which it cannot take."""
        if context_dim:
            raise ValueError(f"NICE takes no context; got one of size {context_dim}")
        flow = self.flow
        return NICE(
            dim,
            flow.widths,
            flow.couplings,
            split=flow.split,
            base=flow.base.make(dim),
            key=jr.fold_in(jr.key(self.run.seed), 0),
        )

    def make_stages(self) -> list[Stage]:
        training = self.training
        return training.then_lbfgs([training.make_stage(objectives.likelihood, None)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneNICE(NICEExperiment, PlaneExperiment):
    """A toy density and the NICE that learns it."""

    # toy density
    data: ToyName = "parabola"

    flow: Couplings = Couplings()
    training: Training = Training(steps=3000, learning_rate=3e-3)
    measure: NICEPlaneMeasure = NICEPlaneMeasure()
    loop: Loop = Loop()
    run: Run = Run()

    def make_density(self) -> Toy:
        return toy(self.data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNICE(NICEExperiment, ImageExperiment):
    """Images and the NICE that learns them."""

    images: ImageData = ImageData()
    flow: Couplings = Couplings(widths=(256, 256), split="odd_even", base=Logistic())
    training: Training = Training(steps=3000, batch=256, learning_rate=1e-3)
    measure: NICEImageMeasure = NICEImageMeasure()
    loop: Loop = Loop(validate_every=250)
    run: Run = Run()

    def make_start(self, images: Images) -> Flow:
        key = jr.fold_in(jr.key(self.run.seed), 4)
        x = held_out(images.train, images.levels, CALIBRATION_IMAGES, key)
        return flows.calibrated(self.make_flow(self.images.dim), x)


MNIST = ImageNICE(
    images=ImageData(data="mnist"),
    flow=dataclasses.replace(ImageNICE().flow, widths=(512, 512)),
    training=Training(steps=10_000, batch=200, learning_rate=1e-3),
)
PAPER = dataclasses.replace(MNIST, flow=dataclasses.replace(MNIST.flow, widths=(1000,) * 5))


def run(settings: PlaneNICE | ImageNICE) -> None:
    """Train the flow, measure it on fresh points or on the test part, and draw the figures."""
    if isinstance(settings, ImageNICE):
        learn_images("nice", settings)
        return
    key = jr.fold_in(jr.key(settings.run.seed), 3)
    points = settings.make_density().sample(key, settings.measure.test_points)

    def more_metrics(flow):
        return {"inverse_error": evaluate.roundtrip_error(flow, points)}

    learn("nice", settings, more_metrics)


if __name__ == "__main__":
    main(
        run,
        {"parabola": PlaneNICE, "digits": ImageNICE, "mnist": MNIST, "mnist-paper": PAPER},
    )
