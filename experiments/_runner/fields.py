"""Settings of the velocity fields, of the base distributions, and of the flow they make."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax.random as jr
from jaxtyping import Array, Key

from experiments._runner.settings import Positive, Range, Settings, Width, Widths, choice
from jcnf import CNF, Flow, distributions, fields

Activation = Literal["tanh", "softplus", "silu", "elu", "sine", "identity", "logcosh"]
TimeLayer = Literal["ignore", "concat", "squash", "concatsquash", "hyper", "blend"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet(Settings):
    """Residual network, which suits flow matching."""

    # width of the hidden layers
    width: Width = 96
    # number of blocks, each of two layers
    blocks: Annotated[int, Range(1, 1000)] = 2
    # activation
    activation: Activation = "silu"
    # number of sine-cosine pairs of time among the inputs, beside time itself
    time_frequencies: Annotated[int, Range(0, 65_536)] = 4
    # number of sine-cosine pairs of x among the inputs, beside x itself, for sharp edges
    fourier_features: Annotated[int, Range(0, 65_536)] = 0

    def make(self, dim: int, context_dim: int, key: Key[Array, ""]) -> Any:
        """Return the untrained field."""
        return fields.ResNet(
            dim,
            self.width,
            self.blocks,
            activation=self.activation,
            time_frequencies=self.time_frequencies,
            fourier_features=self.fourier_features,
            context_dim=context_dim,
            key=key,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP(Settings):
    """Multilayer perceptron."""

    # hidden widths
    widths: Widths = (96, 96)
    # how time enters
    time: TimeLayer = "concat"
    # activation
    activation: Activation = "silu"
    # end in a tanh, so that velocities are at most 1
    bounded: bool = False
    # subtract x from the output
    residual: bool = False

    def make(self, dim: int, context_dim: int, key: Key[Array, ""]) -> Any:
        """Return the untrained field."""
        field = fields.MLP(
            dim,
            self.widths,
            time=self.time,
            activation=self.activation,
            output="tanh" if self.bounded else None,
            context_dim=context_dim,
            key=key,
        )
        return fields.MinusIdentity(field) if self.residual else field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(MLP):
    """Mixture of two multilayer perceptrons, with weights that depend on time."""

    def make(self, dim: int, context_dim: int, key: Key[Array, ""]) -> Any:
        *expert_keys, key = jr.split(key, 3)
        experts = [MLP.make(self, dim, context_dim, k) for k in expert_keys]
        return fields.Mixture(experts, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planar(Settings):
    """Planar units whose parameters a gated hypernetwork computes from time (no context)."""

    # number of units
    units: Width = 64
    # width of the hypernetwork
    hyper_width: Width = 32

    def make(self, dim: int, context_dim: int, key: Key[Array, ""]) -> Any:
        """Return the untrained field; `ValueError` for a context."""
        _refuse_context("planar", context_dim)
        return fields.Planar(dim, self.units, self.hyper_width, key=key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Potential(Settings):
    """Gradient of a potential, as in OT-Flow (no context)."""

    # width of the network
    width: Width = 32
    # rank of the quadratic part
    rank: Width = 10

    def make(self, dim: int, context_dim: int, key: Key[Array, ""]) -> Any:
        """Return the untrained field; `ValueError` for a context."""
        _refuse_context("potential", context_dim)
        return fields.Potential(dim, self.width, self.rank, key=key)


def _refuse_context(name, context_dim):
    if context_dim:
        raise ValueError(f"field:{name} takes no context: use field:mlp or field:resnet")


Field = (
    Annotated[ResNet, choice("field:resnet")]
    | Annotated[MLP, choice("field:mlp")]
    | Annotated[Mixture, choice("field:mixture")]
    | Annotated[Planar, choice("field:planar")]
    | Annotated[Potential, choice("field:potential")]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normal(Settings):
    """Normal base distribution."""

    # standard deviation
    base_scale: Positive = 1.0

    def make(self, dim: int) -> distributions.BaseDistribution:
        """Return the distribution."""
        if self.base_scale == 1:
            return distributions.StandardNormal(dim)
        return distributions.ScaledNormal(dim, self.base_scale)

    @property
    def std(self) -> float:
        """The standard deviation of a coordinate."""
        return self.base_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logistic(Settings):
    """Logistic base distribution."""

    def make(self, dim: int) -> distributions.BaseDistribution:
        """Return the distribution."""
        return distributions.Logistic(dim)

    @property
    def std(self) -> float:
        """The standard deviation of a coordinate."""
        return math.pi / 3**0.5


Base = Annotated[Normal, choice("base:normal")] | Annotated[Logistic, choice("base:logistic")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSettings(Settings):
    """The flow: its field, its base distribution and its end time."""

    field: Field = ResNet()
    base: Base = Normal()
    # end time T of the flow; scale the field rather than time beyond these limits
    t1: Annotated[float, Range(1e-3, 1e3)] = 1.0
    # train the end time too, starting from --t1 (--weight-decay pulls it toward 0)
    trainable_end_time: bool = False

    def make(self, dim: int, context_dim: int, key: Key[Array, ""]) -> Flow:
        """Return the untrained flow.

        **Raises:** `ValueError` if the field takes no context and gets one.
        """
        field = self.field.make(dim, context_dim, key)
        base = self.base.make(dim)
        if self.trainable_end_time:
            return CNF(fields.TimeRescaling(field, rate=self.t1), base)
        return CNF(field, base, t1=self.t1)
