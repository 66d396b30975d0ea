"""Unbiased estimates of the trace of the Jacobian A = dv/dx, from products A e with noise e."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from jcnf._checks import check_int, check_key
from jcnf.divergence.base import Divergence, Local
from jcnf.fields.base import products

# Hutch++ and XTrace span a subspace by A S, which differentiates badly where A has hardly any rank.
# Any subspace that the noise it is judged by had no part in gives an unbiased estimate, so that of
# (A + SHIFT I) S serves, which has full rank whether A has or not.
SHIFT = 1e-2


class Estimator(Divergence):
    """A divergence by `probes` noise vectors, at `products` Jacobian-vector products a sample."""

    probes: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_int(probes=self.probes)

    @property
    @abstractmethod
    def products(self) -> int:
        """Jacobian-vector products a sample and evaluation."""

    def draw(self, key, batch, dim, dtype):
        """Noise with leading axis `batch`; consumes `key`, and raises `ValueError` without one."""
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
                f"{type(self).__name__} has {self.probes} orthogonal directions in dimension "
                f"{dim}: use at most {dim} probes"
            )


def _rademacher(key, batch, probes, dim, dtype):
    return jr.rademacher(key, (batch, probes, dim), dtype)


def _gaussian(key, batch, probes, dim, dtype):
    return jr.normal(key, (batch, probes, dim), dtype)


def _orthogonal(key, batch, probes, dim, dtype):
    bases, _ = jax.vmap(orthonormalise)(jr.normal(key, (batch, probes, dim), dtype))
    return dim**0.5 * bases


NOISES = {"rademacher": _rademacher, "gaussian": _gaussian, "orthogonal": _orthogonal}


class Hutchinson(Estimator):
    """mean_k e_k' A e_k with E[e e'] = I: unbiased (Hutchinson 1989; FFJORD, section 3.1).

    One `jax.jvp` a probe gives v and A e together; reverse mode flows through it.

    **Arguments:**

    - `probes`: number of probes averaged; the variance of independent ones falls as 1/probes.
    - `noise`: "rademacher" (+-1; no variance from the diagonal of A), "gaussian", or "orthogonal"
      (directions at right angles, uniform up to sign: a variance that falls faster, to 0 for as
      many as dimensions).
    """

    noise: str = eqx.field(static=True, default="rademacher")

    def __check_init__(self):
        if self.noise not in NOISES:
            raise ValueError(f"unknown noise {self.noise!r}: use one of {', '.join(NOISES)}")

    @property
    def products(self):
        """One a probe."""
        return self.probes

    def _noise(self, key, batch, dim, dtype):
        if self.noise == "orthogonal":
            self._at_most(dim)
        return NOISES[self.noise](key, batch, self.probes, dim, dtype)

    def __call__(self, field, t, x, context, noise):
        """Velocity, the mean of e' A e and that of |A e|^2."""
        v, images = products(field, t, x, context, noise)
        return Local(v, jnp.sum(noise * images) / self.probes, jnp.sum(images**2) / self.probes)


class HutchPlusPlus(Estimator):
    """tr(Q'AQ) + mean_k g_k' (I-QQ') A (I-QQ') g_k, with Q an orthonormal basis of A S.

    The trace over the range that A S catches is exact, and only the rest is estimated (Meyer,
    Musco, Musco & Woodruff 2021, algorithm 1). S has `probes` Gaussian columns, for no two of
    them may be parallel, as Rademacher's often are in few dimensions; G as many of Rademacher's.
    """

    @property
    def products(self):
        """One each for S, Q and G."""
        return 3 * self.probes

    def _noise(self, key, batch, dim, dtype):
        self._at_most(dim)
        sketch_key, probe_key = jr.split(key)
        sketch = _gaussian(sketch_key, batch, self.probes, dim, dtype)
        return jnp.concatenate(
            [sketch, _rademacher(probe_key, batch, self.probes, dim, dtype)], axis=1
        )

    def __call__(self, field, t, x, context, noise):
        """Velocity, the estimate, and the mean of |A s|^2 over the columns of S."""
        sketch, probes = noise[: self.probes], noise[self.probes :]
        v, images = products(field, t, x, context, sketch)
        basis, _ = orthonormalise(images + SHIFT * sketch)
        rest = probes - (probes @ basis.T) @ basis
        _, moved = products(field, t, x, context, jnp.concatenate([basis, rest]))
        inside, outside = moved[: self.probes], moved[self.probes :]
        trace = jnp.sum(basis * inside) + jnp.sum(rest * outside) / self.probes
        return Local(v, trace, jnp.sum(images**2) / self.probes)


class XTrace(Estimator):
    """The mean over i of Hutch++ with Q_i from all test vectors but the i-th, judged by the i-th.

    Every product serves twice, and the estimate does not depend on the order of the vectors
    (Epperly, Tropp & Webber 2024, section 2.2). Gaussian vectors, with the residual scaled to its
    expected length (their section 2.3), which a rotation-invariant law leaves unbiased.
    """

    @property
    def products(self):
        """One each for the test vectors and their basis."""
        return 2 * self.probes

    def _noise(self, key, batch, dim, dtype):
        self._at_most(dim)
        return _gaussian(key, batch, self.probes, dim, dtype)

    def __call__(self, field, t, x, context, noise):
        """Velocity, the estimate, and the mean of |A e|^2."""
        v, images = products(field, t, x, context, noise)
        basis, r = orthonormalise(images + SHIFT * noise)
        _, moved = products(field, t, x, context, basis)
        # Column i of `left_out` is the direction in the range of Q that Q_i lacks:
        # Q_i Q_i' = Q (I - s_i s_i') Q', with s_i along the i-th column of the inverse of R'.
        left_out = inverse_transposed(r)
        left_out /= jnp.linalg.norm(left_out, axis=0, keepdims=True)
        inner = moved @ basis.T  # its transpose is Q'AQ
        caught = basis @ noise.T
        caught -= left_out * jnp.sum(left_out * caught, axis=0, keepdims=True)
        rest = noise.T - basis.T @ caught
        rest_images = images.T - moved.T @ caught
        inside = jnp.trace(inner) - jnp.sum(left_out * (inner.T @ left_out), axis=0)
        freedom = x.shape[0] - self.probes + 1
        outside = freedom * jnp.sum(rest * rest_images, axis=0) / jnp.sum(rest**2, axis=0)
        return Local(v, jnp.mean(inside + outside), jnp.sum(images**2) / self.probes)


# Orthonormal bases by elementary operations, for use under `vmap` inside a solve.
#
# Not LAPACK's: on CPUs jaxlib (0.10.2) gives each batch of factorisations to the thread pool that
# runs it, and two at a time can wait for each other for ever.


def orthonormalise(
    rows: Float[Array, "k dim"],
) -> tuple[Float[Array, "k dim"], Float[Array, "k k"]]:
    """An orthonormal basis Q of the span of independent rows Y, and the upper R with Y' = Q' R.

    Gram-Schmidt, each row twice, which leaves Q orthonormal up to rounding (Giraud et al. 2005).
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
    """The inverse of the transpose of an upper triangular matrix, by forward substitution."""
    found = upper[:0]
    for i, unit in enumerate(jnp.eye(len(upper), dtype=upper.dtype)):
        row = (unit - upper[:i, i] @ found) / upper[i, i]
        found = jnp.concatenate([found, row[None]])
    return found
