"""The divergence of a field, tr(dv/dx): exactly or by a stochastic estimate.

A strategy is called on one sample, `strategy(field, t, x, context, noise)`, and returns the
velocity beside the divergence, for the two share their work. Its noise is drawn by `draw` once per
solve, per sample and probe: an estimate that changed within a solve would not be a field at all
(FFJORD, Grathwohl et al. 2019, section 3.1).
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

VelocityDivergence = tuple[Float[Array, " dim"], Float[Array, ""]]


class Divergence(eqx.Module):
    """How tr(dv/dx) is found. Subclass it to add an estimator."""

    def draw(self, key: Key[Array, ""] | None, batch: int, dim: int, dtype) -> Array | None:
        """Noise for a whole batch with leading axis `batch`, or None; consumes `key`."""
        return None

    @abstractmethod
    def __call__(self, field, t, x, context, noise) -> VelocityDivergence:
        """v(t, x) of shape (dim,) and its divergence, a scalar, for one sample."""


class ForwardMode(Divergence):
    """The trace of the Jacobian by `dim` forward-mode products: exact for every field.

    The reference that closed forms are tested against; costs about `dim` evaluations.
    """

    def __call__(self, field, t, x, context, noise):
        """Velocity and trace over the basis vectors, pushed through together."""
        basis = jnp.eye(x.shape[0], dtype=x.dtype)
        v, columns = _products(field, t, x, context, basis)
        return v, jnp.trace(columns)


class Exact(Divergence):
    """The field's closed form where it has one, forward mode otherwise."""

    def __call__(self, field, t, x, context, noise):
        """Velocity and exact divergence."""
        if hasattr(field, "velocity_and_divergence"):
            return field.velocity_and_divergence(t, x, context)
        return ForwardMode()(field, t, x, context, noise)


class Hutchinson(Divergence):
    """mean_k e_k' (dv/dx) e_k with E[e e'] = I: unbiased (Hutchinson 1989; FFJORD, section 3.1).

    One `jax.jvp` a probe gives v and (dv/dx) e together; reverse mode flows through it.

    **Arguments:**

    - `probes`: number of probes averaged; the variance falls as 1/probes.
    - `noise`: "rademacher" (+-1; no variance from the Jacobian's diagonal) or "gaussian".
    """

    probes: int = eqx.field(static=True, default=1)
    noise: str = eqx.field(static=True, default="rademacher")

    def __check_init__(self):
        if self.probes < 1:
            raise ValueError(f"Hutchinson needs at least 1 probe; got {self.probes}")
        if self.noise not in ("rademacher", "gaussian"):
            raise ValueError(f"unknown noise {self.noise!r}: use 'rademacher' or 'gaussian'")

    def draw(self, key, batch, dim, dtype):
        """Probes (batch, probes, dim); consumes `key`, and raises `ValueError` without one."""
        if key is None:
            raise ValueError(
                "Hutchinson draws noise: pass key=jax.random.key(seed), "
                "or use divergence=jcnf.Exact()"
            )
        draw = jr.rademacher if self.noise == "rademacher" else jr.normal
        return draw(key, (batch, self.probes, dim), dtype)

    def __call__(self, field, t, x, context, noise):
        """Velocity and the probes' mean."""
        v, products = _products(field, t, x, context, noise)
        return v, jnp.sum(noise * products) / self.probes


def _products(field, t, x, context, tangents):
    """v (dim,), and (dv/dx) e for each row e of `tangents` (k, dim), at the price of k jvps."""

    def push(tangent):
        return jax.jvp(lambda x: field(t, x, context), (x,), (tangent,))

    return jax.vmap(push, out_axes=(None, 0))(tangents)
