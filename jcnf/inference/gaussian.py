"""A Gaussian of table rows, and its conditional given a row's known entries; NumPy, float64."""

from typing import NamedTuple

import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jcnf._checks import check_finite, check_int, check_key


class Gaussian(NamedTuple):
    """A full-covariance Gaussian."""

    mean: Float[np.ndarray, " dim"]
    covariance: Float[np.ndarray, "dim dim"]

    @classmethod
    def fit(cls, rows: Float[np.ndarray, "rows dim"]) -> "Gaussian":
        """Return the Gaussian with the mean and covariance of `rows`.

        **Raises:** `ValueError` for fewer than 2 rows (n, dim) and for rows that are not finite.
        """
        rows = np.asarray(rows, np.float64)
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f"expected rows of shape (n, dim), at least 2; got {rows.shape}")
        check_finite(rows=rows)
        return cls(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False, bias=True)))

    @property
    def independent(self) -> "Gaussian":
        """A copy with its marginals but no correlations, as imputing column means assumes."""
        return self._replace(covariance=np.diag(np.diag(self.covariance)))

    def given(self, x: Float[np.ndarray, "n dim"]) -> "Conditional":
        """Return the Gaussian of each row's missing entries (NaN), given its known ones.

        **Raises:** `ValueError` for a wrong number of columns, infinite entries or a singular
        covariance.
        """
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"expected x of shape (n, {len(self.mean)}); got {x.shape}")
        if (infinite := np.isinf(x).any(axis=1)).any():
            raise ValueError(
                f"x has infinite entries in row {np.argmax(infinite)}: mark missing entries by NaN"
            )
        missing = np.isnan(x)
        known = ~missing
        eye = np.eye(len(self.mean))
        # The covariance among known entries, with the rows and columns of missing ones replaced by
        # those of the identity: this way rows with different patterns form one batch of solves.
        among = np.where(known[:, :, None] & known[:, None], self.covariance, eye)
        across = np.where(missing[:, :, None] & known[:, None], self.covariance, 0.0)
        try:
            gain = np.swapaxes(np.linalg.solve(among, np.swapaxes(across, 1, 2)), 1, 2)
            centered = np.where(known, x - self.mean, 0.0)
            mean = np.where(missing, self.mean + np.einsum("nij,nj->ni", gain, centered), x)
            rest = self.covariance - gain @ np.swapaxes(across, 1, 2)
            rest = np.where(missing[:, :, None] & missing[:, None], rest, eye)
            factor = np.linalg.cholesky(rest)
        except np.linalg.LinAlgError:
            raise ValueError(
                "the covariance is singular: remove columns that are linear in the others"
            ) from None
        return Conditional(mean, factor, missing)


class Conditional(NamedTuple):
    """The Gaussian of each row's missing entries, given its known ones."""

    mean: Float[np.ndarray, "n dim"]  # x itself where known
    factor: Float[np.ndarray, "n dim dim"]  # lower Cholesky factor; identity where known
    missing: Bool[np.ndarray, "n dim"]

    @property
    def std(self) -> Float[np.ndarray, "n dim"]:
        """Standard deviations; 1 where known."""
        return np.sqrt(np.sum(self.factor**2, axis=2))

    def sample(self, key: Key[Array, ""], samples: int) -> Float[np.ndarray, "samples n dim"]:
        """Draw whole rows, in which known entries are kept; consumes `key`."""
        check_key(key)
        check_int(samples=samples)
        e = np.asarray(jr.normal(key, (samples, *self.mean.shape)), np.float64)
        return self.mean + np.where(self.missing, np.einsum("nij,snj->sni", self.factor, e), 0.0)

    def log_prob(self, rows: Float[np.ndarray, "*s n dim"]) -> Float[np.ndarray, "*s n"]:
        """Log-density of the missing entries of whole rows, in nats; 0 if nothing is missing."""
        squares = np.sum(
            whiten(self.factor, np.where(self.missing, rows - self.mean, 0.0)) ** 2, -1
        )
        count = self.missing.sum(axis=1)
        return -squares / 2 - log_det(self.factor) - count * np.log(2 * np.pi) / 2


def whiten(
    factor: Float[np.ndarray, "n dim dim"], rows: Float[np.ndarray, "*s n dim"]
) -> Float[np.ndarray, "*s n dim"]:
    """Multiply rows (..., n, dim) by the inverses L^-1 of factors L (n, dim, dim)."""
    return np.einsum("nij,...nj->...ni", np.linalg.inv(factor), rows)


def log_det(factor: Float[np.ndarray, "n dim dim"]) -> Float[np.ndarray, " n"]:
    """Return log det L of each lower triangular factor L (n, dim, dim)."""
    return np.sum(np.log(np.diagonal(factor, axis1=1, axis2=2)), axis=1)
