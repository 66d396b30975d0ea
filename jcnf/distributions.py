"""Base distributions: arrays in a module, a distrax distribution built from them when asked.

distrax is imported when used, for it brings TensorFlow Probability along. A distrax object is never
stored: inside an Equinox module it would break `eqx.filter`.
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


class Base(eqx.Module):
    """A distribution over (dim,) vectors. Subclass it and give `distribution`.

    A base is not trained: `jcnf.training.loop` leaves its arrays as they are.
    """

    dim: eqx.AbstractVar[int]

    @abstractmethod
    def distribution(self, dtype=None) -> Any:
        """The distrax distribution, event shape (dim,), computing in `dtype`."""

    def log_prob(self, z: Float[Array, "batch dim"]) -> Float[Array, " batch"]:
        """Log-density in nats, per sample."""
        with _rank_promotion():
            return self.distribution(z.dtype).log_prob(z)

    def sample(
        self, key: Key[Array, ""], num_samples: int, dtype=None
    ) -> Float[Array, "num_samples dim"]:
        """Independent draws; consumes `key`.

        **Raises:** `ValueError` for fewer than 1 sample, and for what is no key.
        """
        check_key(key)
        check_int(num_samples=num_samples)
        with _rank_promotion():
            return self.distribution(dtype).sample(seed=key, sample_shape=(num_samples,))


def _rank_promotion():
    # distrax broadcasts (batch, dim) with (dim,), even where people have made that an error.
    return jax.numpy_rank_promotion("allow")


def _independent(family, loc, scale):
    import distrax

    # Independent(Normal), not MultivariateNormalDiag: a fresh one of those retraces each call.
    return distrax.Independent(getattr(distrax, family)(loc, scale), 1)


class StandardNormal(Base):
    """N(0, I)."""

    dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_int(dim=self.dim)

    def distribution(self, dtype=None):
        """Independent normals."""
        return _independent("Normal", jnp.zeros(self.dim, dtype), jnp.ones(self.dim, dtype))


class ScaledNormal(Base):
    """N(loc, diag(scale^2)); `loc` and `scale` broadcast to (dim,)."""

    loc: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    dim: int = eqx.field(static=True)

    def __init__(self, dim: int, scale=1.0, loc=0.0):
        check_int(dim=dim)
        for name, value in (("loc", loc), ("scale", scale)):
            if jnp.shape(value) not in ((), (1,), (dim,)):
                raise ValueError(f"expected {name} of shape ({dim},); got {jnp.shape(value)}")
        self.dim = dim
        self.loc = jnp.broadcast_to(jnp.asarray(loc, float), (dim,))
        self.scale = jnp.broadcast_to(jnp.asarray(scale, float), (dim,))
        check_finite(loc=self.loc, scale=self.scale)
        if not isinstance(self.scale, Tracer) and not np.all(np.asarray(self.scale) > 0):
            raise ValueError(f"scale must be positive; got {scale}")

    def distribution(self, dtype=None):
        """Independent normals."""
        return _independent("Normal", self.loc.astype(dtype), self.scale.astype(dtype))


class Logistic(Base):
    """Independent standard logistics: log p = -sum_i [log(1 + e^z_i) + log(1 + e^-z_i)]."""

    dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_int(dim=self.dim)

    def distribution(self, dtype=None):
        """Independent logistics."""
        return _independent("Logistic", jnp.zeros(self.dim, dtype), jnp.ones(self.dim, dtype))


BASES: dict[str, type[Base]] = {
    "normal": StandardNormal,
    "logistic": Logistic,
}
