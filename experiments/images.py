"""Learn the density of images: FFJORD's multiscale CNF by likelihood, or a CNF by flow matching.

Presets: digits (8x8, no download), ffjord-mnist and ffjord-cifar10 (Grathwohl et al. 2019),
rnode-mnist (Finlay et al. 2020: kinetic and Jacobian regularizers, 4 rk4 steps per block) and
flow-mnist (a U-Net by flow matching, given the class). Name files of MNIST by --path.

Test log-densities are of x = (pixel + u) / levels, given the class with --conditional. Their
divergence is exact, or estimated by probes and reported with the estimator's standard error.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from experiments._runner import likelihood_config
from experiments._runner.cli import main
from experiments._runner.config import MAX_WIDTH, preset
from experiments._runner.likelihood_config import LikelihoodSettings, named
from experiments._runner.stages import Stage
from experiments._tasks.images import ImageLoop, Measure, learn_images
from jcnf import Exact, Hutchinson, distributions, fields, flows, objectives
from jcnf._checks import InputError
from jcnf.flows import ODE, Chain, Flow, with_fields

CLASSES = 10
PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16}
USERS = likelihood_config.USERS | {
    ("flow_matching",): ("drop_context", "guidance"),
    ("conv",): ("time",),
    ("unet",): ("frequencies",),
    ("--conditional",): ("drop_context", "guidance"),
    ("--test-probes",): ("test_draws",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFlow(LikelihoodSettings, ImageLoop):
    """Images and the CNF that learns them."""

    # training objective: likelihood, flow_matching (needs one scale and one block)
    objective: str = "likelihood"
    # field of each block: conv (3 x 3 convolutions), unet
    field: str = "conv"
    # hidden channels of the field; unet: channels of each level
    channels: tuple[int, ...] = (64, 64, 64)
    # conv: how time enters the layers: ignore, concat, squash, concatsquash, hyper, blend
    time: str = "concat"
    # unet: sine and cosine pairs of time, as inputs beside the time itself
    frequencies: int = 4
    # activation: tanh, softplus, silu, elu, sine, identity, logcosh
    activation: str = "softplus"
    # scales; after each but the last the image is squeezed and half of the channels leave the flow
    scales: int = 1
    # ODEs in a row at each place within a scale
    blocks: int = 1
    # alpha of the logit of pixels, logit(alpha + (1 - 2 alpha) x)
    alpha: float = 0.05
    # learn the density given the class
    conditional: bool = False
    # flow matching: share of samples trained without their class, for guidance
    drop_context: float = 0.0
    # scale of classifier-free guidance for the samples; 1 for none
    guidance: float = 1.0
    # precision of fields in training: float32, bfloat16 (states are float32 either way)
    precision: str = "float32"
    # probes of Hutchinson's estimator for held-out numbers; 0 for the exact divergence
    test_probes: int = 0
    # draws of the test probes; their spread gives the estimator's standard error
    test_draws: int = 4
    # test images whose log-densities are compared with float64
    reference_images: int = 20
    # images in one solve for held-out numbers and samples
    chunk: int = 500

    def check(self) -> None:
        super().check()
        self.sizes("channels", fewest=1)
        self.at_least(1, "scales", "blocks", most=100)
        self.at_least(1, "chunk", "reference_images")
        self.at_least(2, "test_draws")
        self.at_least(0, "test_probes", "frequencies", most=MAX_WIDTH)
        self.at_least(0, "guidance", most=1e3)
        self.check_steps(1.0)
        if self.steer:
            raise InputError(
                "--steer needs a flow that is a single ODE, and flows of images have a logit too: "
                "leave out --steer"
            )
        self.check_use(USERS)
        if self.drop_context and not 0 < self.drop_context < 1:
            raise InputError(f"--drop-context must be in [0, 1); got {self.drop_context}")
        if self.guidance != 1 and not self.drop_context:
            raise InputError(
                "--guidance other than 1 needs a flow also trained without the class: set "
                "--drop-context above 0"
            )
        try:
            x = jax.ShapeDtypeStruct((2, self.dim), float)
            context = jax.ShapeDtypeStruct((2, self.classes), float)
            objective = self.make_stages()[0].objective
            eqx.filter_eval_shape(
                lambda batch: objective(self.make_flow(self.dim, self.classes), batch, jr.key(0)),
                (x, context) if self.classes else x,
            )
        except ValueError as error:
            raise InputError(str(error)) from None

    def uses(self) -> set[str]:
        flags = {"--conditional": self.conditional, "--test-probes": self.test_probes}
        given = {flag for flag, value in flags.items() if value}
        return super().uses() | {self.objective, self.field} | given

    @property
    def loss_units(self) -> str:
        return "nats" if self.objective == "likelihood" else "no unit"

    def make_field(self, shape: tuple[int, int, int], context_dim: int, key: Any) -> Any:
        """Return an untrained field of images of that shape."""
        shared: Any = {"activation": self.activation, "context_dim": context_dim, "key": key}
        if named("field", self.field, {"conv": 0, "unet": 1}):
            return fields.UNet(shape, self.channels, time_frequencies=self.frequencies, **shared)
        return fields.Conv(shape, self.channels, time=self.time, **shared)

    def make_flow(self, dim: int, context_dim: int = 0) -> Flow:
        keys = iter(jr.split(jr.fold_in(jr.key(self.seed), 0), 2 * self.scales * self.blocks))

        def blocks(shape):
            return [
                ODE(self.make_field(shape, context_dim, next(keys))) for _ in range(self.blocks)
            ]

        inner = flows.multiscale(self.shape, self.scales, blocks)
        parts = (*inner.parts, flows.Logit(self.alpha))
        return Chain(parts, distributions.StandardNormal(dim))

    def make_stages(self) -> list[Stage]:
        matching = functools.partial(objectives.flow_matching, drop_context=self.drop_context)
        table: dict[str, Callable] = {
            "likelihood": self.make_likelihood(),
            "flow_matching": objectives.for_first_ode(matching),
        }
        objective = named("objective", self.objective, table)
        if self.objective == "flow_matching" and self.scales * self.blocks > 1:
            raise ValueError("flow matching trains one ODE: give --scales 1 --blocks 1")
        dtype = named("precision", self.precision, PRECISIONS)
        if dtype is not None:
            objective = objectives.cast_fields(objective, dtype)
        solved = self.objective == "likelihood"
        return self.then_lbfgs(
            [
                Stage(
                    objectives.with_context(objective),
                    self.steps,
                    self.make_optimizer(self.steps, self.learning_rate),
                    self.make_solve() if solved else None,
                    self.average,
                    self.batch,
                )
            ]
        )

    @property
    def classes(self) -> int:
        """Return the number of classes to condition on, 0 without --conditional."""
        return CLASSES if self.conditional else 0

    def make_sampler(self, flow: Flow) -> Flow:
        """Return the flow to draw samples from, with the guidance of --guidance."""
        if self.guidance == 1:
            return flow
        return with_fields(flow, lambda field: fields.Guided(field, self.guidance))

    def make_measure(self) -> Measure:
        return Measure(
            solve=self.make_test_solve(),
            quick=self.make_validation_solve(),
            divergence=Hutchinson(self.test_probes) if self.test_probes else Exact(),
            draws=self.test_draws,
            reference_points=self.reference_images,
            chunk=self.chunk,
        )


@preset
class Digits(ImageFlow):
    """Multiscale CNF of the 8x8 digits."""

    channels = (32, 32)
    scales = 2
    steps = 600
    batch = 128
    learning_rate = 3e-3
    validate_every = 100
    checkpoint_every = 100
    log_every = 20
    solver = "rk4"
    fixed_step = 0.25
    regularizers = (("kinetic", 0.01), ("jacobian", 0.01))
    divergence = "hutchinson"


@preset
class FFJORDMnist(ImageFlow):
    """FFJORD's flow of MNIST; the paper has 0.99 bits/dim."""

    data = "mnist"
    scales = 3
    blocks = 2
    alpha = 1e-6
    divergence = "hutchinson"
    rtol = 1e-5
    atol = 1e-5
    learning_rate = 1e-3
    batch = 200
    steps = 150_000
    test_probes = 1
    validation_images = 500


@preset
class RNODEMnist(FFJORDMnist):
    """RNODE's flow of MNIST; the paper has 0.97 bits/dim, in a third of FFJORD's time."""

    solver = "rk4"
    fixed_step = 0.25
    rtol = ImageFlow.rtol
    atol = ImageFlow.atol
    regularizers = (("kinetic", 0.01), ("jacobian", 0.01))


@preset
class FFJORDCifar10(FFJORDMnist):
    """FFJORD's flow of CIFAR-10; the paper has 3.40 bits/dim."""

    data = "cifar10"
    scales = 4
    alpha = 0.05


@preset
class FlowMnist(ImageFlow):
    """U-Net of MNIST given the class, trained by flow matching."""

    data = "mnist"
    objective = "flow_matching"
    field = "unet"
    channels = (16, 32)
    activation = "silu"
    alpha = 1e-6
    conditional = True
    drop_context = 0.1
    steps = 10_000
    batch = 64
    learning_rate = 2e-3
    test_probes = 1
    validation_images = 200
    validate_every = 2500
    test_images = 1000


def run(settings: ImageFlow) -> None:
    """Train the flow, measure it on the test part, and draw the figures."""
    learn_images("images", settings, lambda _: settings.make_flow(settings.dim, settings.classes))


if __name__ == "__main__":
    main(
        run,
        {
            "digits": Digits,
            "ffjord-mnist": FFJORDMnist,
            "rnode-mnist": RNODEMnist,
            "ffjord-cifar10": FFJORDCifar10,
            "flow-mnist": FlowMnist,
        },
    )
