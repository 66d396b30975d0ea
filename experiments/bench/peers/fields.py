# pyright: reportMissingImports=false
"""Our fields in torch, with our weights, and code shared by all torch programs."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.bench.timing import Program
from jcnf import Flow, distributions, fields
from jcnf.fields import layers

ACTIVATIONS: dict[Callable, Callable] = {
    layers.tanh: torch.tanh,
    layers.softplus: F.softplus,
    layers.silu: F.silu,
}


def tensor(array: Any) -> torch.Tensor:
    """Return a copy of an array as a tensor."""
    return torch.tensor(np.asarray(array))


class ConcatSquashLinear(nn.Module):
    """(W x + b) * sigmoid(g t + c) + w t, as FFJORD writes it."""

    def __init__(self, layer: layers.ConcatSquash):
        super().__init__()
        self.layer = _linear(layer.squash.linear.weight, layer.squash.linear.bias)
        self.gate = _linear(layer.squash.gate_weight[:, None], layer.squash.gate_bias)
        self.shift = _linear(layer.time_weight[:, None], None)

    def forward(self, t, x):
        t = t.view(1, 1)
        return self.layer(x) * torch.sigmoid(self.gate(t)) + self.shift(t)


class ConcatLinear(nn.Module):
    """W [x, t] + b, with time as another column; `t` is one number or one per sample."""

    def __init__(self, layer: layers.Concat):
        super().__init__()
        weight = jnp.concatenate([layer.linear.weight, layer.time_weight[:, None]], axis=1)
        self.layer = _linear(weight, layer.linear.bias)

    def forward(self, t, x):
        return self.layer(torch.cat([x, torch.ones_like(x[:, :1]) * t.reshape(-1, 1)], 1))


class MLP(nn.Module):
    """`jcnf.fields.MLP` without context."""

    KINDS = {layers.ConcatSquash: ConcatSquashLinear, layers.Concat: ConcatLinear}  # noqa: RUF012

    def __init__(self, field: fields.MLP):
        super().__init__()
        self.layers = nn.ModuleList(self.KINDS[type(layer)](layer) for layer in field.layers)
        self.activation = ACTIVATIONS[field.activation]

    def forward(self, t, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(t, x))
        return self.layers[-1](t, x)


class Planar(nn.Module):
    """`jcnf.fields.Planar`, as in torchdiffeq's example of continuous normalizing flows."""

    def __init__(self, field: fields.Planar):
        super().__init__()
        self.hypernet = nn.ModuleList(_linear(f.weight, f.bias) for f in field.hypernet)
        self.dim, self.average = field.dim, field.average
        self.width = self.hypernet[-1].out_features // (3 * field.dim + 1)

    def forward(self, t, x):
        *hidden, last = self.hypernet
        h = t.reshape(1, 1)
        for layer in hidden:
            h = torch.tanh(layer(h))
        h = last(h).reshape(-1)
        block = self.width * self.dim
        w = h[:block].reshape(self.width, self.dim, 1)
        u = h[block : 2 * block].reshape(self.width, 1, self.dim)
        u = u * torch.sigmoid(h[2 * block : 3 * block].reshape(self.width, 1, self.dim))
        b = h[3 * block :].reshape(self.width, 1, 1)
        h = torch.tanh(torch.matmul(x.unsqueeze(0).repeat(self.width, 1, 1), w) + b)
        terms = torch.matmul(h, u)
        return terms.mean(0) if self.average else terms.sum(0)


class Counted(nn.Module):
    """A field that counts its evaluations."""

    def __init__(self, field: Any):
        super().__init__()
        self.field = {fields.MLP: MLP, fields.Planar: Planar}[type(field)](field)
        self.nfe = 0

    def forward(self, t, x):
        self.nfe += 1
        return self.field(t, x)


def base_log_prob(flow: Flow, z: torch.Tensor) -> torch.Tensor:
    """Return the log-densities (batch,) under a normal base with mean zero."""
    scale = z.new_ones(z.shape[1])
    if isinstance(flow.base, distributions.ScaledNormal):
        scale = tensor(flow.base.scale)
    logs = -0.5 * (z / scale) ** 2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)
    return logs.sum(1)


def training_step(nll: Callable[[], torch.Tensor], field: Counted) -> Program:
    """Return a step of loss, gradient and Adam, at a rate of 0 to repeat the same work."""
    parameters = list(field.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.0)

    def step():
        optimizer.zero_grad()
        field.nfe = 0
        loss = nll()
        nfe = field.nfe
        loss.backward()
        optimizer.step()
        return float(loss.detach()), nfe

    loss, nfe = step()
    squares = sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None)
    figures: dict[str, float] = {"loss": loss, "nfe": nfe, "grad_norm": squares**0.5}
    return Program(step, figures | {"nfe_backward": field.nfe - nfe})


def without_graph(function: Callable[[torch.Tensor], torch.Tensor], x: Any) -> np.ndarray:
    """Return `function` of all rows at once, without gradients."""
    with torch.no_grad():
        return function(tensor(x)).numpy()


def _linear(weight, bias):
    """Return a linear layer of torch with these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(tensor(weight))
    if bias is not None:
        layer.bias = nn.Parameter(tensor(bias))
    return layer
