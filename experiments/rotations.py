"""Learn a known density of rotations in space, such as orientations of bodies or crystals.

    python -m experiments.rotations
    python -m experiments.rotations --steps 5000 --width 128

Rotations are matrices, and densities are with respect to the volume of SO(3) that has distances
equal to angles of rotation: the uniform density is 1 / (8 pi^2). The known one is a mixture of
angular central Gaussians of quaternions (Tyler 1987, Biometrika 74): two orientations, and one
whose angle about its third axis is nearly free.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from experiments._runner.cli import main
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import ResNet
from experiments._runner.objectives import Coupling
from experiments._tasks.manifold_density import (
    Data,
    ManifoldExperiment,
    ManifoldMeasure,
    Mixture,
    learn,
)
from jcnf import plot
from jcnf.manifolds import SO3


class Orientations(NamedTuple):
    """The rotations p R(q), with q = (z0, s1 z1, s2 z2, s3 z3) / |...| and z standard normal.

    The density of the quaternion q is (w^2 + sum_i (q_i / s_i)^2)^-2 / (2 pi^2 s1 s2 s3). On SO(3),
    where q and -q are one point, and lengths are twice those of quaternions, it is a quarter of
    this.
    """

    center: Float[np.ndarray, "3 3"]  # p
    scales: Float[np.ndarray, "3"]  # s, about half an angle in radians if it is small

    @classmethod
    def of(cls, quaternion, scales) -> "Orientations":
        """Return the distribution about the rotation of a quaternion of any length."""
        center = to_rotations(jnp.array([quaternion], float))[0].reshape(3, 3)
        return cls(np.asarray(center), np.array(scales, float))

    def sample(self, key, num_samples):
        scales = jnp.append(1.0, jnp.asarray(self.scales, float))
        turned = to_rotations(scales[None] * jr.normal(key, (num_samples, 4)))
        return jnp.einsum(
            "ij,njk->nik", self.center, turned.reshape(-1, 3, 3), precision="highest"
        ).reshape(-1, 9)

    def log_prob(self, x):
        scales = jnp.asarray(self.scales, x.dtype)
        center = jnp.asarray(self.center, x.dtype)
        turned = jnp.einsum("ji,njk->nik", center, x.reshape(-1, 3, 3), precision="highest")
        squares = quaternion_squares(turned)
        form = squares[:, 0] + jnp.sum(squares[:, 1:] / scales[None] ** 2, axis=1)
        return -2 * jnp.log(form) - jnp.sum(jnp.log(scales)) - math.log(8 * math.pi**2)


def to_rotations(quaternions: Float[Array, "n 4"]) -> Float[Array, "n 9"]:
    """Return the rotation matrices, row by row, of quaternions (w, x, y, z) of any length."""
    w, x, y, z = quaternions.T
    rows = [
        *(w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z),
    ]
    return jnp.stack(rows, axis=1) / jnp.sum(quaternions**2, axis=1, keepdims=True)


def quaternion_squares(matrices: Float[Array, "n 3 3"]) -> Float[Array, "n 4"]:
    """Return the squares of the four parts of the unit quaternions of rotation matrices."""
    a, b, c = jnp.diagonal(matrices, axis1=1, axis2=2).T
    return jnp.stack([1 + a + b + c, 1 + a - b - c, 1 - a + b - c, 1 - a - b + c], axis=1) / 4


DENSITY = Mixture(
    (
        (0.4, Orientations.of((1.0, 0.2, 0.3, -0.4), (0.2, 0.2, 0.2))),
        (0.25, Orientations.of((0.2, 1.0, -0.5, 0.1), (0.1, 0.3, 0.15))),
        (0.35, Orientations.of((0.1, 0.4, 1.0, 0.6), (0.2, 0.2, 2.0))),
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotationFlow(ManifoldExperiment):
    """The flow that learns the density of rotations."""

    # how base samples are paired with data: exact is optimal transport in the batch
    coupling: Coupling = "exact"
    # how times on the path are drawn
    times: Literal["uniform", "stratified", "data_biased", "logit_normal"] = "data_biased"

    field: ResNet = ResNet()
    training: Training = Training(steps=2000)
    measure: ManifoldMeasure = ManifoldMeasure(test_points=5000, cells=20)
    loop: Loop = Loop()
    run: Run = Run()

    def make_manifold(self, dim: int) -> SO3:
        return SO3()


def run(settings: RotationFlow) -> None:
    """Train the flow, measure it on fresh rotations, and draw where they take the axes."""
    data = Data.fresh(DENSITY, settings.run.seed, settings.measure.test_points)
    learn(
        "rotations",
        settings,
        data,
        lambda found: {
            "rotations": plot.rotations(found.test, found.samples, title=found.title),
        },
    )


if __name__ == "__main__":
    main(run, RotationFlow)
