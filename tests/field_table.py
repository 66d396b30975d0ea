"""A small instance of every field, for the tests that every field must pass.

A row is a function without arguments, because building a field takes time. The fields have
dimension 3; those with `context_dim` take a context of size 2.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from helpers import MATRIX, Linear
from jaxtyping import Array, Float

from jcnf.distributions import FullNormal
from jcnf.fields import (
    LAYERS,
    MLP,
    Cast,
    Conv,
    Embedded,
    Field,
    GaussianTails,
    Guided,
    MinusIdentity,
    Mixture,
    Planar,
    Potential,
    ResNet,
    TimeRescaling,
    UNet,
)
from jcnf.objectives import paths


def drawn(make, *args, scale=1.5, seed=0, **settings):
    """Return a field whose arrays NumPy draws, scaled by fan-in: compiling initializers is slow."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[1:]) if leaf.ndim > 1 else 4
        return jnp.asarray(rng.normal(0, scale / np.sqrt(fan_in), leaf.shape))

    return jax.tree.map(draw, eqx.filter_eval_shape(make, *args, key=jr.key(0), **settings))


def doubled_sine(context):
    return jnp.sin(2 * context)


def mixture(*experts):
    """Return a mixture of `experts` with fixed weights of their shares."""
    w, b = jnp.array([1.3, -0.4]), jnp.array([-0.2, 0.5])
    shell = eqx.filter_eval_shape(Mixture, experts, key=jr.key(0))
    return eqx.tree_at(lambda m: (m.fields, m.share_weight, m.share_bias), shell, (experts, w, b))


class Normalizing(Field):
    """v = A x / sqrt(1 + |x|^2): the kind of field that jaxlib 0.10.2 gets wrong on CPU."""

    matrix: Float[Array, "dim dim"]
    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        return self.matrix @ x / jnp.sqrt(1 + jnp.sum(x**2))


def gaussian_tails(field, path):
    covariance = np.asarray(MATRIX) @ np.asarray(MATRIX).T + np.eye(3)
    return GaussianTails(field, FullNormal([0.5, -1.0, 0.2], covariance), path, reach=1.5)


concat = partial(drawn, MLP, 3, (4, 5), context_dim=2)
planar = partial(drawn, Planar, 3, width=5, hidden=4)
no_closed_form = partial(Linear, jnp.asarray(MATRIX))

FIELDS = {
    **{f"mlp {time}": partial(drawn, MLP, 3, (4, 5), time=time) for time in LAYERS},
    "mlp one hidden layer": partial(drawn, MLP, 3, (4,), activation="softplus"),
    "mlp three hidden layers": partial(drawn, MLP, 3, (4, 5, 4), activation="silu", scale=2.5),
    "mlp bounded": partial(drawn, MLP, 3, (4, 5), output="tanh", seed=1),
    "mlp four hidden layers bounded": partial(drawn, MLP, 3, (2, 5, 4, 3), output="tanh", seed=3),
    "mlp context": concat,
    "mlp modulated": partial(concat, conditioning="modulate"),
    "planar": planar,
    "planar summed": partial(planar, average=False),
    "potential": partial(drawn, Potential, 3, width=5, rank=2),
    "resnet": partial(drawn, ResNet, 3, 5, 2, time_frequencies=2, context_dim=2),
    **{
        f"conv {time}": partial(drawn, Conv, (1, 3, 1), (3, 3), time=time, context_dim=2, scale=3.0)
        for time in ("concat", "concatsquash")
    },
    "unet": partial(drawn, UNet, (1, 3, 1), (3,), context_dim=2, time_frequencies=2),
    "cast": lambda: Cast(concat(), jnp.float64),
    "resnet with fourier features": partial(drawn, ResNet, 3, 5, 2, fourier_features=3, seed=2),
    "embedded": lambda: Embedded(concat(seed=4), doubled_sine, 2),
    "guided": lambda: Guided(concat(seed=3), 2.5),
    "residual": lambda: MinusIdentity(concat()),
    "residual without closed form": lambda: MinusIdentity(no_closed_form()),
    "time change": lambda: TimeRescaling(concat(), 1.4, start=0.2),
    "gaussian_tails": lambda: gaussian_tails(concat(), paths.linear),
    "gaussian_tails without closed form": lambda: gaussian_tails(
        no_closed_form(), paths.trigonometric
    ),
    "mixture": lambda: mixture(concat(), concat(seed=1)),
    "normalizing": lambda: Normalizing(jnp.asarray(MATRIX)),
    "mixture without closed form": lambda: mixture(no_closed_form(), drawn(MLP, 3, (4,), seed=1)),
}
