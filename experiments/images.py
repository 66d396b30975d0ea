"""Learn the density of images: FFJORD's multiscale CNF by likelihood, or a CNF by flow matching.

    python -m experiments.images digits --steps 300
    python -m experiments.images flow-mnist --files mnist.npz --guidance 2

The presets: digits (8x8, no download), ffjord-mnist and ffjord-cifar10 (Grathwohl et al. 2019:
0.99 and 3.40 bits/dim), rnode-mnist (Finlay et al. 2020: kinetic and Jacobian regularizers, 4 rk4
steps per block; 0.97 bits/dim in a third of FFJORD's time) and flow-mnist (a U-Net given the class,
by flow matching).

Test log-densities are of x = (pixel + u) / levels, given the class with --conditional. Their
divergence is exact, or estimated by probes and reported with the estimator's standard error.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from experiments._runner.cli import main
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import Activation, TimeLayer
from experiments._runner.flow_config import FlowExperiment
from experiments._runner.objectives import ChainLikelihood, GuidedFlowMatching
from experiments._runner.settings import (
    MAX_COUNT,
    MAX_LAYERS,
    MAX_WIDTH,
    Count,
    Range,
    Settings,
    Width,
    choice,
)
from experiments._runner.solves import TrainingSolve
from experiments._runner.stages import Stage
from experiments._tasks.image_data import ImageData
from experiments._tasks.images import ImageExperiment, ImageMeasure, learn_images
from jcnf import Exact, Flow, Hutchinson, distributions, fields, flows, objectives
from jcnf.divergence import Divergence

CLASSES = 10

Shape = tuple[int, int, int]
Channels = Annotated[tuple[int, ...], Range(1, MAX_WIDTH, 1, MAX_LAYERS)]
SmallCount = Annotated[int, Range(1, 100)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv(Settings):
    """Convolutions of 3 x 3 pixels."""

    # hidden channels
    channels: Channels = (64, 64, 64)
    # how time enters the layers
    time: TimeLayer = "concat"
    # activation
    activation: Activation = "softplus"

    def make(self, shape: Shape, context_dim: int, key: Key[Array, ""]) -> fields.Conv:
        """Return the untrained field of images of this shape."""
        shared: Any = {"activation": self.activation, "context_dim": context_dim, "key": key}
        return fields.Conv(shape, self.channels, time=self.time, **shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet(Settings):
    """U-Net."""

    # channels of each level
    channels: Channels = (64, 64, 64)
    # number of sine-cosine pairs of time among the inputs, beside time itself
    time_frequencies: Annotated[int, Range(0, MAX_WIDTH)] = 4
    # activation
    activation: Activation = "softplus"

    def make(self, shape: Shape, context_dim: int, key: Key[Array, ""]) -> fields.UNet:
        """Return the untrained field of images of this shape."""
        shared: Any = {"activation": self.activation, "context_dim": context_dim, "key": key}
        return fields.UNet(shape, self.channels, time_frequencies=self.time_frequencies, **shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiscaleFlow(Settings):
    """The flow: the logit of pixels, and ODEs at one or more scales."""

    field: Annotated[Conv, choice("field:conv")] | Annotated[UNet, choice("field:unet")] = Conv()
    # scales; after each but the last the image is squeezed and half of the channels leave the flow
    scales: SmallCount = 1
    # ODEs in a row at each place within a scale
    blocks: SmallCount = 1
    # alpha of the logit of pixels, logit(alpha + (1 - 2 alpha) x)
    alpha: Annotated[float, Range(1e-7, math.nextafter(0.5, 0))] = 0.05
    t1: ClassVar[float] = 1.0  # of each ODE

    def make(self, shape: Shape, context_dim: int, key: Key[Array, ""]) -> Flow:
        """Return the untrained flow of images of this shape."""
        keys = iter(jr.split(key, 2 * self.scales * self.blocks))

        def odes(shape):
            made = (self.field.make(shape, context_dim, next(keys)) for _ in range(self.blocks))
            return [flows.ODE(field) for field in made]

        inner = flows.multiscale(shape, self.scales, odes)
        base = distributions.StandardNormal(math.prod(shape))
        return flows.Chain((*inner.parts, flows.Logit(self.alpha)), base)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageMatching(GuidedFlowMatching):
    """Flow matching, which needs no ODE solves, but --scales 1 --blocks 1."""

    # fraction of classes that are dropped, so that samples can be guided
    drop_context: Annotated[float, Range(0, 1 - 1e-9)] = 0.0
    # scale of classifier-free guidance for the samples; 1 for none
    guidance: Annotated[float, Range(0, 1e3)] = 1.0

    def check(self) -> None:
        if self.guidance != 1 and not self.drop_context:
            raise ValueError(
                "--guidance other than 1 needs a flow also trained without the class: set "
                "--drop-context above 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactDivergence(Settings):
    """Exact divergence for held-out numbers."""

    test_draws: ClassVar[int] = 1

    def make(self) -> Divergence:
        """Return the divergence."""
        return Exact()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimatedDivergence(Settings):
    """Hutchinson's estimate of the divergence for held-out numbers."""

    # number of probes
    test_probes: Width = 1
    # number of draws of the probes; their spread gives the estimator's standard error
    test_draws: Annotated[int, Range(2, MAX_COUNT)] = 4

    def make(self) -> Divergence:
        """Return the divergence."""
        return Hutchinson(self.test_probes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMeasure(ImageMeasure):
    """Held-out numbers."""

    test_divergence: (
        Annotated[ExactDivergence, choice("test-divergence:exact")]
        | Annotated[EstimatedDivergence, choice("test-divergence:hutchinson")]
    ) = ExactDivergence()
    # number of test images whose log-densities are compared with float64
    reference_images: Count = 20
    # number of images in one solve for held-out numbers and samples
    chunk: Count = 500

    @property
    def draws(self) -> int:
        return self.test_divergence.test_draws

    def make_divergence(self) -> Divergence:
        return self.test_divergence.make()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFlow(FlowExperiment, ImageExperiment):
    """Images and the CNF that learns them."""

    # learn the density given the class
    conditional: bool = False
    # precision of fields in training (states are float32 either way)
    precision: Literal["float32", "bfloat16"] = "float32"

    images: ImageData = ImageData()
    objective: (
        Annotated[ChainLikelihood, choice("objective:likelihood")]
        | Annotated[ImageMatching, choice("objective:flow-matching")]
    ) = ChainLikelihood()
    flow: MultiscaleFlow = MultiscaleFlow()  # pyright: ignore[reportIncompatibleVariableOverride]
    training: Training = Training()
    measure: FlowMeasure = FlowMeasure()
    loop: Loop = Loop()
    run: Run = Run()

    def check(self) -> None:
        super().check()
        if not isinstance(self.objective, ImageMatching):
            return
        if self.flow.scales * self.flow.blocks > 1:
            raise ValueError("flow matching trains one ODE: set --scales 1 --blocks 1")
        if self.objective.drop_context and not self.conditional:
            raise ValueError("--drop-context needs --conditional: there is no class to drop")

    def trace(self) -> None:
        self.trace_objectives(self.images.dim, self.classes)

    @property
    def classes(self) -> int:
        return CLASSES if self.conditional else 0

    def make_flow(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, dim: int, context_dim: int = 0
    ) -> flows.Flow:
        return self.flow.make(self.images.shape, context_dim, jr.fold_in(jr.key(self.run.seed), 0))

    def make_stages(self) -> list[Stage]:
        stages = super().make_stages()
        if self.precision == "float32":
            return stages
        return [
            stage._replace(objective=objectives.cast_fields(stage.objective, jnp.bfloat16))
            for stage in stages
        ]

    def make_sampler(self, flow: flows.Flow) -> flows.Flow:
        """Return the flow to draw samples from, with the guidance of --guidance."""
        guidance = self.objective.guidance if isinstance(self.objective, ImageMatching) else 1
        if guidance == 1:
            return flow
        return flows.with_fields(flow, lambda field: fields.Guided(field, guidance))


DIGITS = ImageFlow(
    objective=ChainLikelihood(
        solve=TrainingSolve(solver="rk4", fixed_step=0.25),
        divergence=Hutchinson(),
        regularizers=(("kinetic", 0.01), ("jacobian", 0.01)),
    ),
    flow=MultiscaleFlow(field=Conv(channels=(32, 32)), scales=2),
    training=Training(steps=600, batch=128, learning_rate=3e-3),
    loop=Loop(log_every=20, validate_every=100, checkpoint_every=100),
)
FFJORD_MNIST = ImageFlow(
    images=ImageData(data="mnist"),
    objective=ChainLikelihood(solve=TrainingSolve(rtol=1e-5, atol=1e-5), divergence=Hutchinson()),
    flow=MultiscaleFlow(scales=3, blocks=2, alpha=1e-6),
    training=Training(steps=150_000, batch=200, learning_rate=1e-3),
    measure=FlowMeasure(test_divergence=EstimatedDivergence(), validation_images=500),
)
RNODE_MNIST = dataclasses.replace(FFJORD_MNIST, objective=DIGITS.objective)
FFJORD_CIFAR10 = dataclasses.replace(
    FFJORD_MNIST, images=ImageData(data="cifar10"), flow=MultiscaleFlow(scales=4, blocks=2)
)
FLOW_MNIST = ImageFlow(
    conditional=True,
    images=ImageData(data="mnist"),
    objective=ImageMatching(drop_context=0.1),
    flow=MultiscaleFlow(field=UNet(channels=(16, 32), activation="silu"), alpha=1e-6),
    training=Training(batch=64, learning_rate=2e-3),
    measure=FlowMeasure(
        test_divergence=EstimatedDivergence(), test_images=1000, validation_images=200
    ),
    loop=Loop(validate_every=2500),
)


def run(settings: ImageFlow) -> None:
    """Train the flow, measure it on the test part, and draw the figures."""
    learn_images("images", settings)


if __name__ == "__main__":
    main(
        run,
        {
            "digits": DIGITS,
            "ffjord-mnist": FFJORD_MNIST,
            "rnode-mnist": RNODE_MNIST,
            "ffjord-cifar10": FFJORD_CIFAR10,
            "flow-mnist": FLOW_MNIST,
        },
    )
