"""The rotations of space."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from jcnf._checks import check_int
from jcnf.manifolds._smooth import angle_over_sine, dot, norm, sinc
from jcnf.manifolds.base import Manifold, within

Matrix = Float[Array, "3 3"]
Rotation = Float[Array, "3"]

# The derivatives of rotations about the three axes.
GENERATORS = np.array(
    [
        [[0, 0, 0], [0, 0, -1], [0, 1, 0]],
        [[0, 0, 1], [0, 0, 0], [-1, 0, 0]],
        [[0, -1, 0], [1, 0, 0], [0, 0, 0]],
    ],
    float,
)
POLAR_STEPS = 5  # singular values between 1/2 and 2 become 1 up to rounding


class SO3(Manifold):
    """The rotations of R^3, as matrices written row by row, (9,).

    The metric is |omega| for a tangent vector p hat(omega), where omega is the angular velocity in
    the body's frame: the distance of two rotations is the angle of the rotation between them, and
    the volume is 8 pi^2. In R^9 the same vector has the length sqrt(2) |omega|.

    The quadrature has 4 n^3 points: n Gauss-Legendre nodes in the cosine of the second Euler angle,
    and 2n values of the first and the third.
    """

    @property
    def dim(self):
        """Number of coordinates, 9."""
        return 9

    @property
    def intrinsic_dim(self):
        """Dimension of the group, 3."""
        return 3

    @property
    def log_volume(self):
        """Logarithm of 8 pi^2."""
        return math.log(8 * math.pi**2)

    def project(self, x, tolerance=np.inf):
        """Return the rotation of the polar decomposition x = p S; NaN unless det x > 0."""
        return within(tolerance, x, _polar(x.reshape(3, 3)).reshape(9))

    def tangent(self, x, v):
        p = x.reshape(3, 3)
        return _times(p, _hat(_body_rate(p, v))).reshape(9)

    def frame(self, x):
        p = x.reshape(3, 3)
        return jnp.stack([_times(p, g).reshape(9) for g in _generators(x.dtype)]) / math.sqrt(2)

    def exp(self, x, v):
        """Return p R(omega) by the formula of Rodrigues."""
        p = x.reshape(3, 3)
        omega = _body_rate(p, v)
        square, k = dot(omega, omega), _hat(omega)
        turn = (
            jnp.eye(3, dtype=x.dtype) + sinc(square) * k + sinc(square / 4) ** 2 / 2 * _times(k, k)
        )
        return self.project(_times(p, turn).reshape(9))

    def log(self, x, y):
        p = x.reshape(3, 3)
        return _times(p, _hat(_rotation_vector(_times(p.T, y.reshape(3, 3))))).reshape(9)

    def distance(self, x, y):
        return norm(_rotation_vector(_times(x.reshape(3, 3).T, y.reshape(3, 3))))

    def uniform(self, key, num_samples, dtype=None):
        """Draw the rotations of unit quaternions that are uniform on S^3; consumes `key`."""
        w, x, y, z = (q := jr.normal(key, (4, num_samples), dtype)) / jnp.linalg.norm(
            q, axis=0, keepdims=True
        )
        entries = [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ]
        return jnp.stack(entries, axis=1)

    def quadrature(self, n):
        check_int(n=n)
        cosines, weights = np.polynomial.legendre.leggauss(n)
        turns = np.stack([_about(2, math.pi / n * i) for i in range(2 * n)])
        tilts = np.stack([_about(1, math.acos(c)) for c in cosines])
        points = np.einsum("aij,bjk,ckl->abcil", turns, tilts, turns).reshape(-1, 9)
        # The volume element is sin(b) da db dc in Euler angles.
        each = np.broadcast_to((math.pi / n) ** 2 * weights[None, :, None], (2 * n, n, 2 * n))
        return points, each.reshape(-1)

    def extend_velocity(self, x, p, v):
        """Return v p'x: with x = p S, p moves with velocity v and S stays."""
        p, v, x = (m.reshape(3, 3) for m in (p, v, x))
        return _times(v, _times(p.T, x)).reshape(9)


def _times(a, b):
    return jnp.sum(a[:, :, None] * b[None], axis=1)


def _generators(dtype):
    return jnp.asarray(GENERATORS, dtype)


def _hat(omega):
    return jnp.sum(omega[:, None, None] * _generators(omega.dtype), axis=0)


def _body_rate(p, v):
    """Return omega, where p hat(omega) is the tangent part of v at p."""
    m = _times(p.T, v.reshape(3, 3))
    return jnp.stack([m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]]) / 2


@jax.custom_jvp
def _polar(m):
    """Return the orthogonal factor by Newton's method, m <- (m + m'^-1) / 2 (Higham 1986)."""
    inverse, determinant = _inverse_transposed(m)
    for _ in range(POLAR_STEPS - 1):
        m = (m + inverse) / 2
        inverse, _ = _inverse_transposed(m)
    return jnp.where(determinant > 0, (m + inverse) / 2, jnp.nan)


@_polar.defjvp
def _polar_jvp(primals, tangents):
    # From m = p s follows p'dm = hat(omega) s + ds, whose antisymmetric part gives omega, because
    # hat(omega) s + s hat(omega) = hat((tr(s) - s) omega).
    (m,), (dm,) = primals, tangents
    p = _polar(m)
    s = _times(p.T, m)
    inverse, _ = _inverse_transposed(jnp.trace(s) * jnp.eye(3, dtype=s.dtype) - s)
    omega = jnp.sum(inverse * 2 * _body_rate(p, dm)[None], axis=1)
    return p, _times(p, _hat(omega))


def _inverse_transposed(m):
    """Return the transposed inverse and the determinant."""
    rows, after = jnp.roll(m, -1, axis=0), jnp.roll(m, -2, axis=0)
    cofactors = _rotated(rows, 1) * _rotated(after, 2) - _rotated(rows, 2) * _rotated(after, 1)
    determinant = dot(m[0], cofactors[0])
    return cofactors / determinant, determinant


def _rotated(m, by):
    return jnp.roll(m, -by, axis=1)


def _rotation_vector(r):
    """Return omega with r = R(omega) and |omega| at most pi, through the unit quaternion.

    All entries of 4 q q' are linear in r. Its row with the largest diagonal entry is not small, so
    no angle is a special case.
    """
    (a, b, c), (d, e, f), (g, h, i) = r
    products = jnp.stack(
        [
            jnp.stack([1 + a + e + i, h - f, c - g, d - b]),
            jnp.stack([h - f, 1 + a - e - i, b + d, c + g]),
            jnp.stack([c - g, b + d, 1 - a + e - i, f + h]),
            jnp.stack([d - b, c + g, f + h, 1 - a - e + i]),
        ]
    )
    q = products[jnp.argmax(jnp.diagonal(products))]
    q = q * jnp.where(q[0] < 0, -1, 1) / jnp.sqrt(dot(q, q))
    return 2 * angle_over_sine(dot(q[1:], q[1:]), q[0]) * q[1:]


def _about(axis, angle):
    k = GENERATORS[axis]
    return np.eye(3) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k
