"""The manifolds that every test of the room goes through, and a field on each."""

import equinox as eqx
from helpers import mlp
from jaxtyping import Array, Float

from jcnf.fields import Field
from jcnf.manifolds import SO3, Euclidean, Product, Sphere, TangentField, Torus

MANIFOLDS = {
    "sphere": Sphere(2),
    "torus": Torus(2),
    "rotations": SO3(),
    "product": Product((Sphere(1), Torus(1), Euclidean(1))),
}


class AffineField(Field):
    """v = A x + b, whose tangent parts are fields with known flows."""

    matrix: Float[Array, "dim dim"]
    shift: Float[Array, " dim"]
    dim: int = eqx.field(static=True, default=0)

    def __call__(self, t, x, context=None):
        return self.matrix @ x + self.shift


def random_field(manifold, seed=0):
    """Return a nonlinear field on `manifold`."""
    return TangentField(mlp(manifold.embedding_dim, (6, 6), seed=seed), manifold)
