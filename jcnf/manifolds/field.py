"""Fields on manifolds, and estimates of their divergence with probes in the tangent space.

The velocity is defined in R^dim around the manifold such that each point moves along with its
nearest point p, and keeps its place beside it (`Manifold.extend_velocity`). So truncation errors
that take a solution off the manifold do not change where its nearest point goes, every solver and
adjoint works as it is, and the nearest point of the end is the solution on the manifold. The trace
of the Jacobian in R^dim is the Riemannian divergence:

- on the sphere, V(x) = |x| u(x/|x|) is tangent to every sphere around 0 and independent of the
  radius, up to scale;
- on SO(3), V(p S) = u(p) S, and the volume of matrices is the product of the volume of p and a
  measure of S, because multiplication by a rotation preserves it.

In both, the quadratic form e'(dV/dx)e at p depends on the tangent part of e alone, so normal parts
of probes add no noise.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jcnf._checks import check_instance
from jcnf.divergence import Estimator, FieldEvaluation
from jcnf.fields import Field, check_field
from jcnf.fields.base import trace_and_frobenius
from jcnf.manifolds.base import Manifold


class TangentField(Field):
    """The field on a manifold whose velocity at p is the tangent part of f(t, embed(p), c).

    Here f is any field of the space that contains the manifold (Chen & Lipman 2024, "Flow matching
    on general geometries"; Mathieu & Nickel 2020). On a torus, f is given cosines and sines.
    `jcnf.CNF` and `jcnf.trajectory` put starts and ends on the manifold: a start that is farther
    off than `jcnf.manifolds.TOLERANCE` fails.

    The exact divergence takes `manifold.intrinsic_dim` Jacobian-vector products.

    **Arguments:**

    - `field`: f, a field whose `dim` is `manifold.embedding_dim`.
    - `manifold`: a `jcnf.manifolds.Manifold`.

    **Raises:** `ValueError` for another type or another `dim`.
    """

    field: Field
    manifold: Manifold = eqx.field()

    def __check_init__(self):
        check_field(self.field)
        check_instance(
            Manifold, "a manifold, such as jcnf.manifolds.Sphere(2)", manifold=self.manifold
        )
        if self.field.dim != self.manifold.embedding_dim:
            raise ValueError(
                f"field must have the dim {self.manifold.embedding_dim} of an embedded point of "
                f"{self.manifold}; got {self.field.dim}"
            )

    @property
    def dim(self) -> int:
        """Number of coordinates of a point."""
        return self.manifold.dim

    @property
    def context_dim(self) -> int:
        """Size of the conditioning vector, 0 for none."""
        return self.field.context_dim

    def __call__(self, t, x, context=None):
        p = self.manifold.project(x)
        return self.manifold.extend_velocity(
            x, p, _TangentPart(self.field, self.manifold)(t, p, context)
        )

    def velocity_and_divergence(self, t, x, context=None):
        """Return v (dim,) and the Riemannian divergence, by products with a tangent basis."""
        p = self.manifold.project(x)
        # Derivatives in tangent directions depend on values on the manifold only, so they need not
        # go through the projection.
        tangent_part = _TangentPart(self.field, self.manifold)
        v, divergence, _ = trace_and_frobenius(tangent_part, t, p, context, self.manifold.frame(p))
        return self.manifold.extend_velocity(x, p, v), divergence


class _TangentPart(Field):
    """The velocity of a `TangentField` at points that lie on the manifold."""

    field: Field
    manifold: Manifold = eqx.field()

    @property
    def dim(self):
        return self.manifold.dim

    def __call__(self, t, x, context=None):
        return self.manifold.pull_back(x, self.field(t, self.manifold.embed(x), context))


class TangentProbes(Estimator):
    """An estimate of the divergence whose probes are drawn in an orthonormal basis of the tangent.

    Probes in R^dim are unbiased for a `TangentField` too, but the tangent space has fewer
    dimensions: there, `intrinsic_dim` orthogonal probes are exact, Rademacher probes have
    less variance, and the bases of `HutchPlusPlus` and `XTrace` are spent on tangent directions.

    **Arguments:**

    - `strategy`: `jcnf.Hutchinson`, `jcnf.HutchPlusPlus` or `jcnf.XTrace`.
    - `manifold`: the manifold of the field.

    **Raises:** `ValueError` for another type, and for more probes than the strategy can use in
    `manifold.intrinsic_dim` dimensions.
    """

    strategy: Estimator = eqx.field(init=False)
    manifold: Manifold = eqx.field(init=False)

    def __init__(self, strategy: Estimator, manifold: Manifold):
        check_instance(Estimator, "an estimate, such as jcnf.Hutchinson()", strategy=strategy)
        check_instance(Manifold, "a manifold, such as jcnf.manifolds.Sphere(2)", manifold=manifold)
        self.strategy, self.manifold, self.probes = strategy, manifold, strategy.probes

    @property
    def products(self):
        return self.strategy.products

    def _noise(self, key, batch, dim, dtype):
        return self.strategy.draw_noise(key, batch, self.manifold.intrinsic_dim, dtype)

    def __call__(self, field, t, x, context, noise):
        """Return the velocity, and estimates of the divergence and of |dv/dx|_F^2 on the manifold.

        **Raises:** `ValueError` for a field that is not on the manifold.
        """
        if field.manifold != self.manifold:
            raise ValueError(
                f"field must be on {self.manifold}; got one on {field.manifold} (None is R^dim): "
                "wrap it in jcnf.manifolds.TangentField"
            )
        p = self.manifold.project(x)
        frame = self.manifold.frame(p)
        origin = jnp.zeros(len(frame), frame.dtype)
        local = self.strategy(_InFrame(field, p, frame), t, origin, context, noise)
        velocity = self.manifold.extend_velocity(
            x, p, jnp.sum(local.velocity[:, None] * frame, axis=0)
        )
        return FieldEvaluation(velocity, local.divergence, local.frobenius)


class _InFrame(Field):
    """A field near the point p in coordinates of a basis: u -> E v(p + E'u), with E the rows."""

    field: Field
    point: Float[Array, " dim"]
    frame: Float[Array, "k dim"]

    @property
    def dim(self):
        return len(self.frame)

    def __call__(self, t, x, context=None):
        v = self.field(t, self.point + jnp.sum(x[:, None] * self.frame, axis=0), context)
        return jnp.sum(self.frame * v[None], axis=1)
