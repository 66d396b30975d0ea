"""The velocity fields that `--field` can name, built from the settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.random as jr
from jaxtyping import Array, Key

from jcnf import fields

if TYPE_CHECKING:
    from experiments._runner.flow_config import FlowSettings

Make = Callable[["FlowSettings", int, int, Key[Array, ""]], Any]


def _mlp(settings, dim, context_dim, key, output=None):
    return fields.MLP(
        dim,
        settings.widths,
        time=settings.time,
        activation=settings.activation,
        output=output,
        context_dim=context_dim,
        key=key,
    )


def _bounded(settings, dim, context_dim, key):
    return _mlp(settings, dim, context_dim, key, output="tanh")


def _mixture(settings, dim, context_dim, key):
    *expert_keys, key = jr.split(key, 3)
    experts = [_mlp(settings, dim, context_dim, k) for k in expert_keys]
    return fields.Mixture(experts, key=key)


def _residual(settings, dim, context_dim, key):
    return fields.MinusIdentity(_mlp(settings, dim, context_dim, key))


def _resnet(settings, dim, context_dim, key):
    if len(set(settings.widths)) != 1:
        raise ValueError(
            f"the resnet field takes one width, repeated for each block; got {settings.widths}"
        )
    return fields.ResNet(
        dim,
        settings.widths[0],
        len(settings.widths),
        activation=settings.activation,
        time_frequencies=settings.frequencies,
        fourier_features=settings.waves,
        context_dim=context_dim,
        key=key,
    )


def _two_widths(make):
    def field(settings, dim, context_dim, key):
        if len(settings.widths) != 2:
            raise ValueError(f"the {settings.field} field takes two widths; got {settings.widths}")
        if context_dim:
            raise ValueError(f"the {settings.field} field takes no context: use mlp or resnet")
        return make(dim, *settings.widths, key=key)

    return field


FIELDS: dict[str, Make] = {
    "resnet": _resnet,
    "mlp": _mlp,
    "bounded": _bounded,
    "residual": _residual,
    "mixture": _mixture,
    "planar": _two_widths(fields.Planar),
    "potential": _two_widths(fields.Potential),
}
