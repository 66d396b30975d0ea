"""Base distributions: modules of arrays that build a distrax distribution when asked.

distrax is imported only when used, because it imports TensorFlow Probability. No module stores a
distrax object: it would break `eqx.filter`.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from jcnf._checks import check_finite, check_int, check_key

_MIN_RELATIVE_VARIANCE = 1e-9


class BaseDistribution(eqx.Module):
    """A distribution over vectors of shape (dim,). Subclass it and define `distribution`.

    A base is not trained: `jcnf.training.loop` leaves its arrays unchanged.
    """

    # To a type checker, an abstract variable would be the first argument of `__init__`.
    if TYPE_CHECKING:
        dim = 0
    else:
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


class FullNormal(BaseDistribution):
    """The normal distribution N(mean, C), by the axes and standard deviations of C.

    C = basis diag(std^2) basis', where the columns of the orthogonal `basis` are the axes.

    **Arguments:**

    - `mean`: (dim,).
    - `covariance`: C, (dim, dim), symmetric. An axis whose variance is below 1e-9 of the largest
      gets that variance.

    **Raises:** `ValueError` for wrong shapes, values that are not finite, and a covariance that is
    0, not symmetric, or negative along an axis.
    """

    mean: Float[Array, " dim"]
    basis: Float[Array, "dim dim"]
    std: Float[Array, " dim"]
    dim: int = eqx.field(static=True)

    def __init__(self, mean, covariance):
        mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                "expected a mean of shape (dim,) and a covariance of shape (dim, dim); got "
                f"{mean.shape} and {covariance.shape}"
            )
        check_finite(mean=mean, covariance=covariance)
        rounding = 1e-6 * np.abs(covariance).max()
        if np.abs(covariance - covariance.T).max() > rounding:
            raise ValueError("covariance must be symmetric; got a matrix that is not")
        variances, basis = np.linalg.eigh(covariance)
        if variances[-1] <= 0:
            raise ValueError("covariance must have a positive variance; got none")
        if variances[0] < -len(mean) * rounding:
            raise ValueError(
                f"covariance must have no negative variance; got {variances[0]:g} along an axis"
            )
        variances = np.maximum(variances, _MIN_RELATIVE_VARIANCE * variances[-1])
        self.mean, self.basis = jnp.asarray(mean, float), jnp.asarray(basis, float)
        self.std = jnp.asarray(np.sqrt(variances), float)
        self.dim = len(mean)

    @classmethod
    def fit(cls, x: Float[np.ndarray, "n dim"]) -> "FullNormal":
        """Return the distribution with the mean and the covariance of the rows of `x`."""
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"expected x of shape (n, dim), with n at least 2; got {x.shape}")
        return cls(x.mean(axis=0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]))

    def distribution(self, dtype=None):
        import distrax

        # C = F F' = R' R with F' = Q R: a Cholesky factor of C would lose half of the digits.
        upper = jnp.linalg.qr((self.basis * self.std[None]).T, mode="r")
        tri = upper.T * jnp.sign(jnp.diagonal(upper))[None]
        return distrax.MultivariateNormalTri(self.mean.astype(dtype), tri.astype(dtype))


class Logistic(BaseDistribution):
    """Independent standard logistic components.

    log p = -sum_i [log(1 + e^z_i) + log(1 + e^-z_i)].
    """

    dim: int = eqx.field(static=True)

    def __check_init__(self):
        check_int(dim=self.dim)

    def distribution(self, dtype=None):
        return _independent("Logistic", jnp.zeros(self.dim, dtype), jnp.ones(self.dim, dtype))
