"""Flow matching on manifolds: paths along geodesics, and couplings by embedded points."""

import dataclasses
from collections.abc import Callable

import jax

from jcnf.manifolds.base import TOLERANCE, Manifold


@dataclasses.dataclass(frozen=True)
class Geodesic:
    """Path exp_x0(s log_x0(x1)) along a shortest geodesic, at constant speed (Chen & Lipman 2024).

    Between antipodes it takes one of the shortest geodesics. Points that are farther off the
    manifold than `jcnf.manifolds.TOLERANCE` give NaN.

    **Arguments:**

    - `manifold`: a `jcnf.manifolds.Manifold`.
    """

    manifold: Manifold

    def __call__(self, s, x0, x1, z):
        x0, x1 = (self.manifold.project(x, TOLERANCE) for x in (x0, x1))
        return self.manifold.exp(x0, s * self.manifold.log(x0, x1))


@dataclasses.dataclass(frozen=True)
class EmbeddedCoupling:
    """A coupling applied to embedded points, so that angles on both sides of pi are close.

    On spheres, SO(3) and a single angle, |x0 - x1| increases with the distance; on other tori and
    on products it only approximates it.

    **Arguments:**

    - `manifold`: a `jcnf.manifolds.Manifold`.
    - `coupling`: one of `jcnf.objectives.couplings`, such as `ExactOT()`.
    """

    manifold: Manifold
    coupling: Callable

    def __call__(self, key, x0, x1, context):
        """Return the partners that `coupling` finds; passes `key` on."""
        x0, x1 = (jax.vmap(self.manifold.embed)(x) for x in (x0, x1))
        return self.coupling(key, x0, x1, context)
