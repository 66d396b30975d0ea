"""Unbiased estimates of the trace of A = dv/dx, from products A e with random vectors e."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from jcnf._checks import check_int, check_key
from jcnf.divergence.base import Divergence, FieldEvaluation
from jcnf.fields.base import jvps

# Hutch++ and XTrace need an orthonormal basis of the columns of A S. If A has almost no rank, these
# are nearly dependent and the basis has bad derivatives. The estimates are unbiased for any
# subspace that is independent of the noise that probes its complement, so the basis is taken of the
# columns of (A + SKETCH_SHIFT I) S instead, which have full rank whatever the rank of A.
SKETCH_SHIFT = 1e-2


class Estimator(Divergence):
    """A divergence from `probes` noise vectors, at `products` Jacobian-vector products a sample."""

    probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_int(probes=self.probes)

    @property
    @abstractmethod
    def products(self) -> int:
        """Number of Jacobian-vector products per sample and evaluation."""

    def draw_noise(self, key, batch, dim, dtype):
        """Return noise with leading axis `batch`; consumes `key`.

        **Raises:** `ValueError` without a key.
        """
        if key is None:
            raise ValueError(
                f"{type(self).__name__} draws noise: pass key=jax.random.key(seed), "
                "or use divergence=jcnf.Exact()"
            )
        check_key(key)
        return self._noise(key, batch, dim, dtype)

    @abstractmethod
    def _noise(self, key, batch, dim, dtype) -> Array: ...

    def _at_most(self, dim):
        if self.probes > dim:
            raise ValueError(
                f"{type(self).__name__} needs orthogonal directions, at most {dim} probes in "
                f"dimension {dim}; got probes={self.probes}"
            )


def _rademacher(key, batch, probes, dim, dtype):
    return jr.rademacher(key, (batch, probes, dim), dtype)


def _gaussian(key, batch, probes, dim, dtype):
    return jr.normal(key, (batch, probes, dim), dtype)


def _orthogonal(key, batch, probes, dim, dtype):
    bases, _ = jax.vmap(orthonormalize)(jr.normal(key, (batch, probes, dim), dtype))
    return dim**0.5 * bases


NOISES = {"rademacher": _rademacher, "gaussian": _gaussian, "orthogonal": _orthogonal}


class Hutchinson(Estimator):
    """Hutchinson's estimate, mean_k e_k' A e_k with E[e e'] = I, which is unbiased.

    From Hutchinson 1989; FFJORD, section 3.1. One `jax.jvp` per probe gives v and A e together, and
    can be differentiated in reverse mode.

    **Arguments:**

    - `probes`: number of probes averaged; if they are independent, the variance falls as 1/probes.
    - `noise`: "rademacher" (+-1; the diagonal of A adds no variance), "gaussian", or "orthogonal"
      (mutually orthogonal directions, uniform up to sign: the variance falls faster, and is 0 with
      `dim` probes).

    **Raises:** `ValueError` for an unknown noise and for fewer than 1 probe.
    """

    noise: str = eqx.field(static=True, default="rademacher")

    def __check_init__(self):
        if self.noise not in NOISES:
            raise ValueError(f"unknown noise {self.noise!r}: use one of {', '.join(NOISES)}")

    @property
    def products(self):
        return self.probes

    def _noise(self, key, batch, dim, dtype):
        if self.noise == "orthogonal":
            self._at_most(dim)
        return NOISES[self.noise](key, batch, self.probes, dim, dtype)

    def __call__(self, field, t, x, context, noise):
        """Return the velocity and the means of e' A e and |A e|^2 over the probes."""
        v, images = jvps(field, t, x, context, noise)
        return FieldEvaluation(
            v, jnp.sum(noise * images) / self.probes, jnp.sum(images**2) / self.probes
        )


class HutchPlusPlus(Estimator):
    """Hutch++: tr(Q'AQ) + mean_k g_k' (I-QQ') A (I-QQ') g_k, with Q an orthonormal basis of A S.

    The trace over the range of Q is exact, and only the rest is estimated (Meyer, Musco, Musco &
    Woodruff 2021, algorithm 1). S has `probes` Gaussian columns, because no two of them may be
    parallel, as Rademacher vectors often are in few dimensions. The g_k are `probes` Rademacher
    vectors.
    """

    @property
    def products(self):
        return 3 * self.probes  # one for each column of S and Q, and for each g_k

    def _noise(self, key, batch, dim, dtype):
        self._at_most(dim)
        sketch_key, probe_key = jr.split(key)
        sketch = _gaussian(sketch_key, batch, self.probes, dim, dtype)
        return jnp.concatenate(
            [sketch, _rademacher(probe_key, batch, self.probes, dim, dtype)], axis=1
        )

    def __call__(self, field, t, x, context, noise):
        """Return the velocity, the estimate, and the mean of |A s|^2 over the columns s of S."""
        sketch, probes = noise[: self.probes], noise[self.probes :]
        v, images = jvps(field, t, x, context, sketch)
        basis, _ = orthonormalize(images + SKETCH_SHIFT * sketch)
        rest = probes - (probes @ basis.T) @ basis
        _, moved = jvps(field, t, x, context, jnp.concatenate([basis, rest]))
        inside, outside = moved[: self.probes], moved[self.probes :]
        trace = jnp.sum(basis * inside) + jnp.sum(rest * outside) / self.probes
        return FieldEvaluation(v, trace, jnp.sum(images**2) / self.probes)


class XTrace(Estimator):
    """XTrace: mean over i of Hutch++ with Q_i from all test vectors but the i-th, its only probe.

    Every product is used twice, and the estimate does not depend on the order of the vectors
    (Epperly, Tropp & Webber 2024, section 2.2). The vectors are Gaussian, and the residual is
    scaled to its expected length (their section 2.3), which leaves the estimate unbiased because
    the distribution is rotation-invariant.
    """

    @property
    def products(self):
        return 2 * self.probes  # one for each test vector and each column of Q

    def _noise(self, key, batch, dim, dtype):
        self._at_most(dim)
        return _gaussian(key, batch, self.probes, dim, dtype)

    def __call__(self, field, t, x, context, noise):
        """Return the velocity, the estimate, and the mean of |A e|^2 over the test vectors e."""
        v, images = jvps(field, t, x, context, noise)
        basis, r = orthonormalize(images + SKETCH_SHIFT * noise)
        _, moved = jvps(field, t, x, context, basis)
        # `basis` holds the columns of Q as rows. Column i of `left_out` is s_i, the direction in
        # the range of Q that Q_i lacks: Q_i Q_i' = Q (I - s_i s_i') Q', with s_i along the i-th
        # column of the inverse of R'.
        left_out = inverse_transposed(r)
        left_out /= jnp.linalg.norm(left_out, axis=0, keepdims=True)
        inner = moved @ basis.T  # its transpose is Q'AQ
        # Column i of `caught` is (I - s_i s_i') Q'e_i, of `rest` the residual (I - Q_i Q_i') e_i,
        # and of `rest_images` its product with A, which takes no further product with the field.
        caught = basis @ noise.T
        caught -= left_out * jnp.sum(left_out * caught, axis=0, keepdims=True)
        rest = noise.T - basis.T @ caught
        rest_images = images.T - moved.T @ caught
        inside = jnp.trace(inner) - jnp.sum(left_out * (inner.T @ left_out), axis=0)
        freedom = x.shape[0] - self.probes + 1
        outside = freedom * jnp.sum(rest * rest_images, axis=0) / jnp.sum(rest**2, axis=0)
        return FieldEvaluation(v, jnp.mean(inside + outside), jnp.sum(images**2) / self.probes)


# Orthonormal bases by elementary operations, for use under `vmap` inside a solve.
#
# LAPACK's factorizations are not an option: on CPU, jaxlib 0.10.2 hands each batch of them to the
# thread pool that it already runs on, and two batches at a time can deadlock.


def orthonormalize(
    rows: Float[Array, "k dim"],
) -> tuple[Float[Array, "k dim"], Float[Array, "k k"]]:
    """Return an orthonormal basis Q of independent rows Y, and the upper triangular R of Y' = Q' R.

    Gram-Schmidt is applied twice to each row, which makes Q orthonormal up to rounding (Giraud et
    al. 2005).
    """
    basis, columns = rows[:0], []
    for row in rows:
        first = basis @ row
        row = row - first @ basis
        second = basis @ row
        row = row - second @ basis
        length = jnp.sqrt(row @ row)
        basis = jnp.concatenate([basis, (row / length)[None]])
        rest = jnp.zeros(len(rows) - len(basis), row.dtype)
        columns.append(jnp.concatenate([first + second, length[None], rest]))
    return basis, jnp.stack(columns, axis=1)


def inverse_transposed(upper: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Invert the transpose of an upper triangular matrix, by forward substitution."""
    found = upper[:0]
    for i, unit in enumerate(jnp.eye(len(upper), dtype=upper.dtype)):
        row = (unit - upper[:i, i] @ found) / upper[i, i]
        found = jnp.concatenate([found, row[None]])
    return found
