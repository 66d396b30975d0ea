"""Base distributions: modules of arrays that build a distrax distribution when asked.

distrax is imported only when used, because it imports TensorFlow Probability. No module stores a
distrax object: it would break `eqx.filter`.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from jcnf._checks import check_finite, check_int, check_key


class BaseDistribution(eqx.Module):
    """A distribution over vectors of shape (dim,). Subclass it and define `distribution`.

    A base is not trained: `jcnf.training.loop` leaves its arrays unchanged.
    """

    dim: eqx.AbstractVar[int]

    @abstractmethod
    def distribution(self, dtype=None) -> Any:
        """Return the distrax distribution with event shape (dim,) that computes in `dtype`."""

    def log_prob(self, z: Float[Array, "batch dim"]) -> Float[Array, " batch"]:
        """Return the log-density of each sample, in nats."""
        with _rank_promotion():
            return self.distribution(z.dtype).log_prob(z)

    def sample(
        self, key: Key[Array, ""], num_samples: int, dtype=None
    ) -> Float[Array, "num_samples dim"]:
        """Draw independent samples; consumes `key`.

        **Raises:** `ValueError` if `num_samples` is below 1 or `key` is not a single typed key.
        """
        check_key(key)
        check_int(num_samples=num_samples)
        with _rank_promotion():
            return self.distribution(dtype).sample(seed=key, sample_shape=(num_samples,))


def _rank_promotion():
    # distrax broadcasts (batch, dim) with (dim,), which jax may be configured to refuse.
    return jax.numpy_rank_promotion("allow")


def _independent(family, loc, scale):
    import distrax

    # Independent(Normal), because every new MultivariateNormalDiag object is traced again.
    return distrax.Independent(getattr(distrax, family)(loc, scale), 1)


class StandardNormal(BaseDistribution):
    """The standard normal distribution N(0, I)."""

    dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_int(dim=self.dim)

    def distribution(self, dtype=None):
        return _independent("Normal", jnp.zeros(self.dim, dtype), jnp.ones(self.dim, dtype))


class ScaledNormal(BaseDistribution):
    """The normal distribution N(loc, diag(scale^2)); `loc` and `scale` broadcast to (dim,).

    **Raises:** `ValueError` if `loc` or `scale` does not broadcast or is not finite, or if `scale`
    is not positive.
    """

    loc: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, scale=1.0, loc=0.0):
        check_int(dim=dim)
        for name, value in (("loc", loc), ("scale", scale)):
            if jnp.shape(value) not in ((), (1,), (dim,)):
                raise ValueError(
                    f"expected {name} to be a scalar or of shape ({dim},); got {jnp.shape(value)}"
                )
        self.dim = dim
        self.loc = jnp.broadcast_to(jnp.asarray(loc, float), (dim,))
        self.scale = jnp.broadcast_to(jnp.asarray(scale, float), (dim,))
        check_finite(loc=self.loc, scale=self.scale)
        if not isinstance(self.scale, Tracer) and not np.all(np.asarray(self.scale) > 0):
            raise ValueError(f"scale must be positive; got {scale}")

    def distribution(self, dtype=None):
        return _independent("Normal", self.loc.astype(dtype), self.scale.astype(dtype))


class Logistic(BaseDistribution):
    """Independent standard logistic components.

    log p = -sum_i [log(1 + e^z_i) + log(1 + e^-z_i)].
    """

    dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_int(dim=self.dim)

    def distribution(self, dtype=None):
        return _independent("Logistic", jnp.zeros(self.dim, dtype), jnp.ones(self.dim, dtype))


BASES: dict[str, type[BaseDistribution]] = {
    "normal": StandardNormal,
    "logistic": Logistic,
}
