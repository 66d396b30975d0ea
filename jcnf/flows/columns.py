"""Elementwise maps that make each column of a table about normal, within its support."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from jcnf.flows.fixed import Fixed

_FAR = -5.0  # log-probability below which Newton's method finds the normal quantile
_NEWTON_STEPS = 4


class Columns(Fixed):
    """Increasing maps of each column x to a z that is about standard normal, in three steps.

    1. The support is opened to the real line: y = log(x - lower) - log(upper - x), without the
       logarithms of bounds that are infinite; y = x if both are. Samples cannot leave the support.
    2. u = (y - loc) / scale.
    3. Where a column has knots, z is a monotone rational-quadratic spline of u (Gregory and
       Delbourgo 1982) between quantiles of the data and those of N(0, 1). The tails beyond its ends
       are generalized Pareto (Pickands 1975): with m the mass beyond the last knot u_k,
       P(U > u) = m (1 + i (u - u_k) / s)^(-1/i). An outlier then lies in the tail of z, and not far
       from everything else. Without knots, z = u.

    A circular column, whose bounds are one point, becomes an angle y = z from -pi to pi instead, of
    which 0 is opposite to `lower + turn`.

    `jcnf.sklearn.columns.fit_columns` chooses all of this from data. Arrays have one row for each
    column; unused places of `u`, `z` and `slope` are inf.
    """

    lower: Float[Array, " dim"]
    upper: Float[Array, " dim"]
    turn: Float[Array, " dim"]  # of a circle, whose bounds are one point; 0 for none
    loc: Float[Array, " dim"]
    scale: Float[Array, " dim"]
    knots: Int[Array, " dim"]  # number of knots, 0 for none
    u: Float[Array, "dim knots"]
    z: Float[Array, "dim knots"]
    slope: Float[Array, "dim knots"]  # dz/du
    log_mass: Float[Array, "dim 2"]  # of the lower and the upper tail
    tail_scale: Float[Array, "dim 2"]  # s
    tail_index: Float[Array, "dim 2"]  # i, positive

    def both(self, x, direction, context=None):
        one = _to_base if direction == "to_base" else _to_data
        # Over the columns, then over the rows.
        value, logdet = jax.vmap(jax.vmap(one), in_axes=(None, 0))(self, x)
        return value, jnp.sum(logdet, axis=1)


# The functions below are of one value of one column; `column` is a `Columns` whose arrays have lost
# their first axis.


def _to_base(column, x):
    """Return z and log dz/dx."""
    y, log_slope = _open(column, _turned(column, x, -column.turn))
    u = (y - column.loc) / column.scale
    z, log_spline = _by_knots(column, u, column.u, _spline, _tail)
    return z, log_slope - jnp.log(column.scale) + log_spline


def _to_data(column, z):
    """Return x and log dx/dz."""
    u, log_spline = _by_knots(column, z, column.z, _inverse_spline, _inverse_tail)
    x, log_slope = _close(column, column.loc + column.scale * u)
    return _turned(column, x, column.turn), log_spline + jnp.log(column.scale) + log_slope


def _turned(column, x, by):
    """Return x, turned if the column is a circle; strictly between the bounds."""
    period = jnp.where(column.turn == 0, 1, column.upper - column.lower)
    least = 2 * jnp.finfo(x.dtype).eps
    share = jnp.clip(jnp.mod(x - column.lower + by, period) / period, least, 1 - least)
    return jnp.where(column.turn == 0, x, column.lower + period * share)


def _open(column, x):
    """Return y and log dy/dx; NaN outside the support."""
    circle, rate = _circle(column)
    low, high = jnp.isfinite(column.lower), jnp.isfinite(column.upper)
    # Differences of bounds that do not exist become 1, so that no gradient is NaN.
    above, below = jnp.where(low, x - column.lower, 1), jnp.where(high, column.upper - x, 1)
    width = jnp.where(low & high, column.upper - column.lower, 1)
    log_above, log_below = jnp.log(above), jnp.log(below)
    y = jnp.where(low | high, log_above - log_below, x)
    slope = jnp.log(width) - log_above - log_below
    angle = rate * (x - column.lower) - math.pi
    return jnp.where(circle, angle, y), jnp.where(circle, jnp.log(rate), slope)


def _close(column, y):
    """Return x and log dx/dy."""
    circle, rate = _circle(column)
    low, high = jnp.isfinite(column.lower), jnp.isfinite(column.upper)
    lower, upper = jnp.where(low, column.lower, 0), jnp.where(high, column.upper, 0)
    width, single = upper - lower, jnp.exp(jnp.where(low, y, -y))
    both = lower + width * jax.nn.sigmoid(y)
    both_slope = jnp.log(jnp.where(low & high, width, 1))
    both_slope += jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y)
    x = jnp.where(low & high, both, jnp.where(low, lower + single, upper - single))
    slope = jnp.where(low & high, both_slope, jnp.where(low, y, -y))
    x, slope = jnp.where(low | high, x, y), jnp.where(low | high, slope, 0)
    turned = column.lower + (y + math.pi) / rate
    return jnp.where(circle, turned, x), jnp.where(circle, -jnp.log(rate), slope)


def _circle(column):
    """Return whether the column is a circle, and the radians in its unit."""
    circle = column.turn != 0
    return circle, 2 * math.pi / jnp.where(circle, column.upper - column.lower, 1)


def _by_knots(column, value, ends, inside, outside):
    """Return the image of a value and its log-slope: by `inside` or `outside` of the knots."""
    last = jnp.maximum(column.knots - 1, 1)
    first_end, last_end = ends[0], ends[last]
    image, log_slope = inside(column, jnp.clip(value, first_end, last_end), ends, last)
    for side, end, sign in ((0, first_end, -1), (1, last_end, 1)):
        beyond = sign * (value - end) > 0
        # The tail of a value that is not in it could be NaN, which spoils gradients.
        far = jnp.where(beyond, value, end + sign)
        tail, tail_slope = outside(column, far, side, sign, column.u[0 if side == 0 else last])
        image = jnp.where(beyond, tail, image)
        log_slope = jnp.where(beyond, tail_slope, log_slope)
    used = column.knots > 0
    return jnp.where(used, image, value), jnp.where(used, log_slope, 0)


def _bin(column, value, ends, last):
    """Return the bin of a value: where it starts, its widths, its mean slope, its end slopes."""
    k = jnp.clip(jnp.searchsorted(ends, value, side="right") - 1, 0, last - 1)
    width, height = column.u[k + 1] - column.u[k], column.z[k + 1] - column.z[k]
    return k, width, height, height / width, column.slope[k], column.slope[k + 1]


def _spline(column, u, ends, last):
    k, width, height, mean, start, end = _bin(column, u, ends, last)
    share = (u - column.u[k]) / width
    return _spline_at(column.z[k], height, mean, start, end, share)


def _spline_at(z, height, mean, start, end, share):
    """Return z and log dz/du at a share of a bin (Gregory and Delbourgo 1982)."""
    product = share * (1 - share)
    bottom = mean + (start + end - 2 * mean) * product
    value = z + height * (mean * share**2 + start * product) / bottom
    top = end * share**2 + 2 * mean * product + start * (1 - share) ** 2
    return value, 2 * jnp.log(mean) + jnp.log(top) - 2 * jnp.log(bottom)


def _inverse_spline(column, z, ends, last):
    k, width, height, mean, start, end = _bin(column, z, ends, last)
    rise, bend = z - column.z[k], start + end - 2 * mean
    a = height * (mean - start) + rise * bend
    b = height * start - rise * bend
    c = -mean * rise
    # The root in [0, 1], in the form that does not cancel.
    share = -2 * c / (b + jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 0)))
    _, log_slope = _spline_at(column.z[k], height, mean, start, end, share)
    return column.u[k] + width * share, -log_slope


def _tail(column, u, side, sign, end):
    """Return z and log dz/du beyond the last knot of a side."""
    index, scale = column.tail_index[side], column.tail_scale[side]
    growth = jnp.log1p(index * sign * (u - end) / scale)
    log_mass = column.log_mass[side] - growth / index
    z = _normal_quantile(log_mass)
    log_density = log_mass - growth - jnp.log(scale)
    return -sign * z, log_density - norm.logpdf(z)


def _inverse_tail(column, z, side, sign, end):
    """Return u and log du/dz beyond the last knot of a side."""
    index, scale = column.tail_index[side], column.tail_scale[side]
    log_mass = log_ndtr(-sign * z)
    growth = index * (column.log_mass[side] - log_mass)
    u = end + sign * scale * jnp.expm1(growth) / index
    return u, norm.logpdf(z) - (log_mass - growth - jnp.log(scale))


def _normal_quantile(log_mass: Any) -> Array:
    """Return the z with log P(N(0, 1) < z) = `log_mass`, below -700 too."""
    near = ndtri(jnp.exp(jnp.maximum(log_mass, _FAR)))
    far = jnp.minimum(log_mass, _FAR)
    # P(N < z) is about phi(z) / |z|; Newton's steps on its logarithm mend the start.
    z = -jnp.sqrt(-2 * far - jnp.log(-4 * jnp.pi * far))
    for _ in range(_NEWTON_STEPS):
        log_p = log_ndtr(z)
        z = z - (log_p - far) * jnp.exp(log_p - norm.logpdf(z))
    return jnp.where(log_mass < _FAR, z, near)
