"""Planar toys, each with its sampler and its true log-density: FFJORD's eight, and three more.

Source: the toy generators of FFJORD (Grathwohl et al. 2019, arXiv:1810.01367), except that samples
here are independent: each draws its component, where FFJORD gives all an equal count, and its
angle, where FFJORD spaces the angles of moons, circles and rings evenly. "6gaussians" is from
torchdyn (radius 4, sigma 0.5, standardized), "2circles" from torchdiffeq's CNF example (noise 0.06,
factor 0.5). "parabola" is ours: x1 ~ N(0, 0.5^2) and x2 = x1^2 + 0.1 N(0, 1). Its points are
(x1, (x2 - 1) / 2), so that both coordinates fill one window.

To add a toy, write `sample(key, num_samples)` and `density(x)` at one point x (2,), and add a row
to the table at the end. Both use the same curve or centers, so that they cannot disagree.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.scipy.special import erfc, i0e
from jaxtyping import Array, Float, Key

from jcnf._checks import InputError, check_int, check_key

Point = Float[Array, "2"]
Points = Float[Array, "num 2"]
Density = Callable[[Point], Float[Array, ""]]  # the log-density at one point, in nats

_CHUNK = 512  # points per step of log_prob, which keeps its memory at tens of MB for any batch


@dataclasses.dataclass(frozen=True)
class Toy:
    """A planar distribution whose density is known.

    - `sample(key, num_samples)` draws points (num_samples, 2) in the default float dtype. It
      consumes `key`, and traces under `jax.jit` with `num_samples` static.
    - `log_prob(x)` is the true log-density in nats, (batch, 2) -> (batch,), in the dtype of `x`,
      within 1e-6 where the density is above 1e-12 (float32: 2e-5). NaN gives NaN, and a point
      off the checkerboard -inf, its true value. Any other shape or dtype raises `ValueError`.
    - `entropy`, in nats, is the mean of -log_prob(x), which no model's test NLL can beat;
      `entropy_error` bounds its numerical error.
    - `extent` is the half width of the plotting window [-extent, extent]^2, which holds all but
      1e-6 of the mass.
    """

    name: str
    sample: Callable[[Key[Array, ""], int], Float[Array, "num_samples 2"]]
    log_prob: Callable[[Float[Array, "batch 2"]], Float[Array, " batch"]]
    entropy: float
    entropy_error: float
    extent: float


def toy(name: str) -> Toy:
    """Return the toy called `name`; an unknown name raises `InputError`, which lists the toys."""
    if name in TOYS:
        return TOYS[name]
    close = difflib.get_close_matches(str(name), TOYS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"no toy is called {name!r}: {hint}The toys are {', '.join(TOYS)}")


def batched(density: Density) -> Callable[[Array], Array]:
    """Return a compiled function of a batch (batch, 2) from the log-density of one point."""

    @jax.jit  # without it, every eager call would compile the loop again
    def log_prob(x: Float[Array, "batch 2"]) -> Float[Array, " batch"]:
        if x.ndim != 2 or x.shape[1] != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"expected floating x of shape (batch, 2); got {x.dtype} {x.shape}: "
                "for a single point, use x[None]"
            )
        # Comparisons inside a density would turn NaN into -inf and so hide bad data.
        bad = jnp.any(jnp.isnan(x), axis=1)
        return jnp.where(bad, jnp.nan, jax.lax.map(density, x, batch_size=_CHUNK))

    return log_prob


def checked_sampler(sample: Callable) -> Callable[[Array, int], Array]:
    """Return `sample` with checks of its key and its number of samples."""

    def checked(key: Key[Array, ""], num_samples: int) -> Float[Array, "num_samples 2"]:
        check_key(key)
        check_int(num_samples=num_samples)
        return sample(key, num_samples)

    return checked


# The parts of toys: points, curves and circles, with noise


def _mixture(centers: Points, log_weights: Array, log_kernel: Callable) -> Density:
    """Return log sum_i w_i kernel(x - c_i), where the c_i are points or the nodes of a curve."""
    return lambda x: jax.nn.logsumexp(log_weights + log_kernel(x[None] - centers))


def _log_gaussian(sigma: float) -> Callable[[Points], Array]:
    """Log-density of N(0, sigma^2) in both coordinates."""
    log_norm = math.log(2 * math.pi * sigma**2)
    return lambda d: -0.5 * jnp.sum((d / sigma) ** 2, axis=-1) - log_norm


def _log_blurred_square(width: float, sigma: float) -> Callable[[Points], Array]:
    """Log-density of U(-width/2, width/2) + N(0, sigma^2) in both coordinates.

    Each coordinate gives a difference of two normal cdfs. Beyond 11 sigma, where it would underflow
    in float32, only the nearer cdf counts, and its asymptotic series gives it (`log_ndtr` would
    cost three times as much).
    """
    scale = sigma * math.sqrt(2)

    def log_kernel(d: Points) -> Array:
        a = (jnp.abs(d) - 0.5 * width) / scale
        far, y = a > 8, 0.5 / jnp.maximum(a, 8) ** 2
        series = (1 - y * (1 - 3 * y * (1 - 5 * y))) * jnp.sqrt(2 / math.pi * y)  # e^(a^2) erfc(a)
        mass = jnp.where(far, series, erfc(a) - erfc(a + width / scale))
        return jnp.sum(jnp.log(mass / (2 * width)) - jnp.where(far, a**2, 0), axis=-1)

    return log_kernel


def curve(path, num_nodes, noise, jitter=0.0, mirrored=False, center=(0.0, 0.0)):
    """Return sampler and density of center + path(U) + jitter U(-1/2, 1/2)^2 + N(0, noise^2).

    `mirrored` adds the path's reflection in the center, equally likely. The density is a
    Gauss-Legendre rule over v = sqrt(u), in which spirals that start as sqrt(u) are smooth. With
    nodes one standard deviation of the noise apart, its error is negligible: `num_nodes` is chosen
    for an error of 1e-8 at the samples, and the tests compare it with a much finer rule.
    """
    log_kernel = _log_blurred_square(jitter, noise) if jitter else _log_gaussian(noise)

    def sample(key, num_samples):
        path_key, jitter_key, mirror_key, noise_key = jr.split(key, 4)
        x = path(jr.uniform(path_key, (num_samples,)))
        x = x + jitter * (jr.uniform(jitter_key, (num_samples, 2)) - 0.5)
        if mirrored:
            x = x * jr.rademacher(mirror_key, (num_samples, 1), dtype=float)
        return jnp.asarray(center)[None] + x + noise * jr.normal(noise_key, (num_samples, 2))

    def density(x):
        node, weight = np.polynomial.legendre.leggauss(num_nodes)
        v = 0.5 * (node + 1)
        log_weights = jnp.asarray(np.log(weight * v), x.dtype)
        path_density = _mixture(path(jnp.asarray(v**2, x.dtype)), log_weights, log_kernel)
        x = x - jnp.asarray(center, x.dtype)
        if mirrored:
            return jnp.logaddexp(path_density(x), path_density(-x)) - math.log(2)
        return path_density(x)

    return sample, density


def _rings(radii, noise):
    """Return sampler and density of equally likely circles with Gaussian noise."""

    def sample(key, num_samples):
        radius_key, angle_key, noise_key = jr.split(key, 3)
        r = jr.choice(radius_key, jnp.asarray(radii), (num_samples,))
        t = jr.uniform(angle_key, (num_samples,), maxval=2 * math.pi)
        ring = jnp.stack([r * jnp.cos(t), r * jnp.sin(t)], axis=-1)
        return ring + noise * jr.normal(noise_key, (num_samples, 2))

    def density(x):
        # The mean of the Gaussian over the angle is exp(-(r^2 + R^2) / 2 s^2) I0(r R / s^2), which
        # overflows unless it is written with i0e(z) = exp(-z) I0(z).
        r, centers = jnp.hypot(x[0], x[1]), jnp.asarray(radii, x.dtype)
        terms = jnp.log(i0e(r * centers / noise**2)) - 0.5 * ((r - centers) / noise) ** 2
        return jax.nn.logsumexp(terms) - math.log(len(radii) * 2 * math.pi * noise**2)

    return sample, density


def _gaussians(number, radius, sigma):
    """Return sampler and density of equally likely Gaussians, evenly spaced on a circle."""

    def centers(k):
        angle = k * (2 * math.pi / number)
        return radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)

    def sample(key, num_samples):
        center_key, noise_key = jr.split(key)
        k = jr.randint(center_key, (num_samples,), 0, number).astype(float)
        return centers(k) + sigma * jr.normal(noise_key, (num_samples, 2))

    def density(x):
        log_weights = jnp.full(number, -math.log(number), x.dtype)
        nodes = centers(jnp.arange(number, dtype=x.dtype))
        return _mixture(nodes, log_weights, _log_gaussian(sigma))(x)

    return sample, density


# The toys


def _spiral(u):
    n = 3 * math.pi * jnp.sqrt(u)
    # FFJORD adds U(0, 1/2) before it divides by 3; 1/4 is the mean of that noise.
    return (jnp.stack([-n * jnp.cos(n), n * jnp.sin(n)], axis=-1) + 0.25) / 3


def _checkerboard_sample(key, num_samples):
    across_key, up_key, row_key = jr.split(key, 3)
    x1 = jr.uniform(across_key, (num_samples,), minval=-2.0, maxval=2.0)
    # Uniforms are multiples of a power of two, so these sums are exact: rounding moves no point off
    # its square, to where the density is zero.
    row = jr.rademacher(row_key, (num_samples,), dtype=float) - 1 + jnp.floor(x1) % 2
    return 2 * jnp.stack([x1, jr.uniform(up_key, (num_samples,)) + row], axis=-1)


def _checkerboard_density(x):
    square = jnp.floor(x / 2)
    inside = jnp.all(jnp.abs(square + 0.5) < 2) & (jnp.sum(square) % 2 == 0)
    return jnp.where(inside, jnp.asarray(-math.log(32), x.dtype), -jnp.inf)


def _pinwheel_sample(key, num_samples):
    arm_key, feature_key = jr.split(key)
    f1, f2 = jr.normal(feature_key, (2, num_samples)) * jnp.array([[0.3], [0.1]])
    f1 = f1 + 1
    arm = jr.randint(arm_key, (num_samples,), 0, 5).astype(float)
    c, s = (f(arm * (2 * math.pi / 5) + 0.25 * jnp.exp(f1)) for f in (jnp.cos, jnp.sin))
    return 2 * jnp.stack([c * f1 + s * f2, c * f2 - s * f1], axis=-1)  # FFJORD turns clockwise


def _pinwheel_density(x):
    """Sum the change of variables over the preimages of `x`.

    With f = r (cos a, sin a), the map to x / 2 keeps r and takes the angle a to g(a) - 2 pi k / 5,
    g(a) = a - exp(r cos a) / 4, so its Jacobian determinant is g'(a). The preimages from all five
    arms are the roots of g(a) = angle(x) modulo 2 pi / 5. A scan of the circle brackets the roots,
    and Newton's method refines them. Roots closer together than a step of the scan (at the folds
    g' = 0, where 1e-7 of the mass is, and at radii beyond 8) count by the number of levels crossed,
    but share one position.
    """
    radius, turn = jnp.hypot(x[0], x[1]) / 2, 2 * math.pi / 5

    def excess(a):
        """Return g(a) - angle(x), its derivative, and f."""
        f1, f2 = radius * jnp.cos(a), radius * jnp.sin(a)
        swirl = 0.25 * jnp.exp(jnp.minimum(f1, 50))  # no overflow in float32 for any x
        return a - swirl - jnp.arctan2(x[1], x[0]), 1 + swirl * f2, f1, f2

    scan = jnp.linspace(-math.pi, math.pi, 129, dtype=x.dtype)
    left, right, value = scan[:-1], scan[1:], excess(scan)[0]
    level = jnp.floor(value / turn)
    crossings, target = jnp.abs(jnp.diff(level)), turn * jnp.maximum(level[1:], level[:-1])
    a = left + (right - left) * (target - value[:-1]) / jnp.diff(value)
    for _ in range(4):
        e, slope, _, _ = excess(a)
        a = jnp.clip(a - (e - target) / slope, left, right)
    _, slope, f1, f2 = excess(a)
    log_f = -0.5 * (((f1 - 1) / 0.3) ** 2 + (f2 / 0.1) ** 2) - math.log(2 * math.pi * 0.3 * 0.1)
    terms = jnp.where(crossings > 0, log_f - jnp.log(jnp.abs(slope) / crossings), -jnp.inf)
    return jax.nn.logsumexp(terms) - math.log(5 * 4)  # 1/5 for an arm; x has 4 times the area


def _moon(u):
    """Return the upper moon relative to (0, .3), the midpoint; the lower is its reflection."""
    t = math.pi * u
    return jnp.stack([2 * jnp.cos(t) - 1, 2 * jnp.sin(t) - 0.5], axis=-1)


MOON = {"path": _moon, "num_nodes": 80, "noise": 0.2, "center": (0.0, 0.3)}


def _roll(u):
    t = 1.5 * math.pi * (1 + 2 * u)
    return jnp.stack([t * jnp.cos(t), t * jnp.sin(t)], axis=-1) / 5


PARABOLA = (0.5, 0.05)  # standard deviations of x1, and of x2 given x1


def _parabola(x1):
    return (x1**2 - 1) / 2


def _parabola_sample(key, num_samples):
    x1, noise = jr.normal(key, (2, num_samples)) * jnp.array(PARABOLA)[:, None]
    return jnp.stack([x1, _parabola(x1) + noise], axis=-1)


def _parabola_density(x):
    z = jnp.stack([x[0], x[1] - _parabola(x[0])]) / jnp.asarray(PARABOLA, x.dtype)
    return -0.5 * jnp.sum(z**2) - math.log(2 * math.pi * math.prod(PARABOLA))


# torchdyn divides its data by their standard deviation over both coordinates. This is the standard
# deviation of the distribution: its variance is half the squared radius plus sigma squared.
TORCHDYN_STD = math.sqrt(4**2 / 2 + 0.5**2)

PARABOLA_ENTROPY = math.log(2 * math.pi * math.e * math.prod(PARABOLA))

# Entropies are -sum p log p over a grid in float64, with sum p = 1 (tests/data/test_toys.py
# recomputes them); their errors are the change from one grid to finer and wider ones. The entropies
# of the checkerboard and the parabola (two normals, after a shift of x2) are exact.
_TABLE = (
    # name, sampler, density, entropy, error of the entropy, extent
    ("8gaussians", *_gaussians(8, 4 / 1.414, 0.5 / 1.414), 2.83188041, 1e-8, 5.0),
    ("2spirals", *curve(_spiral, 320, 0.1, jitter=1 / 6, mirrored=True), 2.64545028, 1e-8, 4.0),
    ("checkerboard", _checkerboard_sample, _checkerboard_density, math.log(32), 1e-15, 4.0),
    ("pinwheel", _pinwheel_sample, _pinwheel_density, 2.31778798, 1e-7, 5.0),
    ("moons", *curve(**MOON, mirrored=True), 2.39387920, 1e-8, 4.0),
    ("circles", *_rings((3.0, 1.5), 0.24), 3.26813571, 1e-8, 4.5),
    ("swissroll", *curve(_roll, 256, 0.2), 2.66964617, 1e-8, 4.0),
    ("rings", *_rings((3.0, 2.25, 1.5, 0.75), 0.08), 2.62318277, 1e-8, 4.0),
    ("6gaussians", *_gaussians(6, 4 / TORCHDYN_STD, 0.5 / TORCHDYN_STD), 1.13294190, 1e-8, 3.0),
    ("2circles", *_rings((1.0, 0.5), 0.06), 0.78764529, 1e-8, 1.5),
    ("parabola", _parabola_sample, _parabola_density, PARABOLA_ENTROPY, 1e-15, 2.5),
)

TOYS: dict[str, Toy] = {
    name: Toy(name, checked_sampler(sample), batched(density), *numbers)
    for name, sample, density, *numbers in _TABLE
}
