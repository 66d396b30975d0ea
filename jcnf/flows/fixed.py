"""Bijections that are not trained: the preprocessing of data as parts of a flow."""

import math
from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import check_finite, check_number
from jcnf.flows.base import Bijection, Contexts, Direction, Transformed
from jcnf.ode import Stats


class Fixed(Bijection):
    """A bijection in closed form whose arrays training leaves as they are. Subclass it to add one.

    Between an ODE and the data it stands for preprocessing, with its log-det in the density:
    `jcnf.flows.Chain([ODE(field), Affine.whiten(x)], base)`. Flow matching trains the ODE of such a
    chain on the data that the fixed parts have carried to it.

    A subclass defines `both`, for a copy of itself in the dtype of the batch. Rows whose end or
    log-det is not finite, such as those outside the support, are flagged in `stats.failed`.
    """

    is_trained: ClassVar[bool] = False

    @property
    def context_dim(self) -> int:
        """Size of the context, 0 for none."""
        return 0

    @abstractmethod
    def both(
        self, x: Float[Array, "batch dim"], direction: Direction, context: Contexts = None
    ) -> tuple[Float[Array, "batch dim"], Float[Array, " batch"]]:
        """Return the batch at the other end and its log-det."""

    def forward_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        return self._apply(x, "to_data", context, regularizers)

    def inverse_and_log_det(self, x, context, solve, divergence, noise, regularizers):
        return self._apply(x, "to_base", context, regularizers)

    def _apply(self, x, direction, context, regularizers):
        cast = jax.tree.map(lambda a: a.astype(x.dtype) if eqx.is_inexact_array(a) else a, self)
        value, logdet = cast.both(x, direction, context)
        stats = Stats.unsolved(jnp.concatenate([value, logdet[:, None]], axis=1))
        return Transformed.unsolved(value, logdet, regularizers)._replace(stats=stats)


class Affine(Fixed):
    """The map x = loc + scale z + weight c, for a context c.

    **Arguments:**

    - `loc`: (dim,).
    - `scale`: an invertible matrix (dim, dim).
    - `weight`: (dim, context); None for a map without a context.

    **Raises:** `ValueError` for wrong shapes, values that are not finite, and a singular `scale`.
    """

    loc: Float[Array, " dim"]
    scale: Float[Array, "dim dim"]
    inverse_scale: Float[Array, "dim dim"]
    log_det: Float[Array, ""]  # log|det scale|
    weight: Float[Array, "dim context"] | None

    def __init__(self, loc, scale, weight=None):
        loc, scale = np.asarray(loc, np.float64), np.asarray(scale, np.float64)
        if loc.ndim != 1 or scale.shape != (len(loc), len(loc)):
            raise ValueError(
                "expected loc of shape (dim,) and scale of shape (dim, dim); got "
                f"{loc.shape} and {scale.shape}"
            )
        weight = None if weight is None else np.asarray(weight, np.float64)
        if weight is not None and (weight.ndim != 2 or len(weight) != len(loc)):
            raise ValueError(f"expected weight of shape ({len(loc)}, context); got {weight.shape}")
        check_finite(loc=loc, scale=scale, weight=weight)
        sign, log_det = np.linalg.slogdet(scale)
        if sign == 0 or not math.isfinite(log_det):
            raise ValueError("scale must be invertible; got a singular matrix")
        self.loc, self.scale = jnp.asarray(loc, float), jnp.asarray(scale, float)
        self.inverse_scale = jnp.asarray(np.linalg.inv(scale), float)
        self.log_det = jnp.asarray(log_det, float)
        self.weight = None if weight is None else jnp.asarray(weight, float)

    @classmethod
    def whiten(
        cls,
        x: Float[np.ndarray, "n dim"],
        context: Float[np.ndarray, "n context"] | None = None,
        ridge: float = 1e-6,
    ) -> "Affine":
        """Return the map whose base side has mean 0 and the identity as its covariance.

        With a context, these are the moments of what is left of x after linear regression on the
        context. The axes are the principal ones. `ridge` is added to the variance of each, relative
        to the mean variance, so that the map exists even if columns determine one another.

        **Raises:** `ValueError` for wrong shapes, fewer than 2 rows, values that are not finite,
        and an x that does not vary.
        """
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"expected x of shape (n, dim), at least 2 rows; got {x.shape}")
        check_number("[0, inf)", ridge=ridge)
        check_finite(x=x)
        weight, loc = None, x.mean(axis=0)
        if context is not None:
            context = np.asarray(context, np.float64)
            if context.ndim != 2 or len(context) != len(x):
                raise ValueError(
                    f"expected context of shape ({len(x)}, context); got {context.shape}"
                )
            check_finite(context=context)
            center = context.mean(axis=0)
            weight = np.linalg.lstsq(context - center, x - loc, rcond=1e-6)[0].T
            x = x - context @ weight.T
            loc = x.mean(axis=0)
        covariance = np.atleast_2d(np.cov(x, rowvar=False, ddof=0))
        variances, axes = np.linalg.eigh(covariance)
        if not variances.mean() > 0:
            raise ValueError("x must vary; got one point in all rows")
        floor = ridge * variances.mean()
        return cls(loc, axes * np.sqrt(np.maximum(variances, 0) + floor), weight)

    @property
    def context_dim(self) -> int:
        """Size of the context, 0 for none."""
        return 0 if self.weight is None else self.weight.shape[1]

    def both(self, x, direction, context=None):
        loc = self.loc[None]
        center = loc if self.weight is None else loc + jnp.asarray(context) @ self.weight.T
        logdet = jnp.full(len(x), self.log_det)
        if direction == "to_data":
            return x @ self.scale.T + center, logdet
        return (x - center) @ self.inverse_scale.T, -logdet
