"""The convolution, its derivatives and the fields built on it, against loops, lax and traces."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import drawn
from helpers import astype
from jax.experimental.jet import jet

from jcnf import ForwardMode, Hutchinson
from jcnf.fields import Cast, Conv, UNet, base, conv
from jcnf.fields._xla_cpu import LAYOUT, convolve
from jcnf.fields.unet import normalize

T = jnp.asarray(0.3)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def by_lax(h, weight, bias):
    """Reference for `convolve`, with the derivatives of jax."""
    kernel = weight.T.reshape(3, 3, h.shape[-1], -1)
    return (
        jax.lax.conv_general_dilated(h[None], kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)[0]
        + bias[None, None]
    )


@pytest.mark.parametrize("shape", [(4, 3), (1, 2), (1, 1)])
def test_convolve_equals_the_sum_over_neighbors(shape):
    h, weight, bias = normal(*shape, 2), normal(3, 18, seed=1), normal(3, seed=2)
    expected = np.zeros((*shape, 3)) + np.asarray(bias)
    kernel = np.asarray(weight).T.reshape(3, 3, 2, 3)
    for row, column, down, right in product(*map(range, shape), range(3), range(3)):
        y, x = row + down - 1, column + right - 1
        if 0 <= y < shape[0] and 0 <= x < shape[1]:
            expected[row, column] += np.asarray(h)[y, x] @ kernel[down, right]
    np.testing.assert_allclose(convolve(h, weight, bias), expected, atol=1e-12)


def derivatives(function):
    """Return products with derivatives of up to third order, in both arguments at once."""

    def of(h, weight):
        def f(h, weight):
            return function(h, weight, jnp.zeros(3, h.dtype))

        at = h, weight
        rng = np.random.default_rng(3)

        def like(a):
            return jnp.asarray(rng.normal(size=a.shape), a.dtype)

        way, other, back = jax.tree.map(like, at), jax.tree.map(like, at), like(f(*at))
        pull = lambda *at: jax.vjp(f, *at)[1](back)  # noqa: E731
        push = lambda *at: jax.jvp(f, at, way)[1]  # noqa: E731
        square = lambda *at: jnp.sum(f(*at) ** 2)  # noqa: E731
        series = tuple([first, second] for first, second in zip(way, other, strict=True))
        return (
            f(*at),
            push(*at),
            pull(*at),
            jax.jvp(pull, at, other)[1],
            jax.vjp(push, *at)[1](back),
            jax.jvp(jax.grad(square, (0, 1)), at, way)[1],
            jax.grad(lambda *at: jnp.sum(jax.jvp(square, at, way)[1]), (0, 1))(*at),
            jet(f, at, series),
        )

    return of


@pytest.mark.parametrize("axes", [None, (0, None), (None, 0), (0, 0)])
def test_convolve_derivatives_equal_those_of_lax(axes):
    h, weight = normal(2, 4, 3, 2), normal(2, 3, 18, seed=1)
    if axes is None:
        h, weight = h[0], weight[0]
        over = lambda function: function  # noqa: E731
    else:
        h, weight = (a if axis == 0 else a[0] for a, axis in zip((h, weight), axes, strict=True))
        over = partial(jax.vmap, in_axes=axes)
    expected = jax.jit(over(derivatives(by_lax)))(h, weight)
    found = jax.jit(over(derivatives(convolve)))(h, weight)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(b)) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-11)
    low = jax.jit(over(derivatives(convolve)))(*astype((h, weight), jnp.float32))
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.max(np.abs(b)))


def test_convolve_bfloat16_is_close_to_float64():
    h, weight, bias = normal(4, 3, 2), normal(3, 18, seed=1), normal(3, seed=2)
    low = astype((h, weight, bias), jnp.bfloat16)
    found = convolve(*low)
    assert found.dtype == jnp.bfloat16
    wide = convolve(*astype(low, jnp.float64))
    np.testing.assert_allclose(
        found.astype(float), wide, rtol=2**-7, atol=2**-7 * np.max(np.abs(wide))
    )
    gradients = jax.grad(lambda *a: jnp.sum(convolve(*a)), (0, 1, 2))(*low)
    assert {g.dtype for g in gradients} == {jnp.dtype("bfloat16")}


def test_convolve_precision_reaches_lowering_and_derivatives():
    """The primitive is lowered after the context has ended, where XLA would use TF32 on a GPU."""

    @jax.jit
    def gradients(h, weight):
        with jax.default_matmul_precision("highest"):
            return jax.grad(lambda *a: jnp.sum(convolve(*a, jnp.zeros(3)) ** 2), (0, 1))(h, weight)

    text = gradients.lower(normal(4, 3, 2), normal(3, 18)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(lines) == 3
    assert all("HIGHEST" in line for line in lines)


# The convolutional field

CASES = {
    "linear": ((3, 4, 2), ()),
    "one hidden layer": ((5, 4, 2), (3,)),
    "two": ((4, 7, 1), (3, 2)),
    "three, by pieces": ((6, 5, 3), (2, 2, 2)),
    "smaller than the reach": ((2, 3, 2), (3, 2, 2)),
    "a row": ((1, 9, 1), (2, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_conv_divergence_equals_the_trace_by_few_products(case, monkeypatch):
    shape, channels = CASES[case]
    field = drawn(Conv, shape, channels, scale=3.0)
    x = normal(field.dim)
    counted, plain = [], base.trace_and_frobenius
    monkeypatch.setattr(
        conv, "trace_and_frobenius", lambda *a: counted.append(len(a[-1])) or plain(*a)
    )
    v, divergence = jax.jit(lambda *a: field.velocity_and_divergence(*a))(T, x)
    local = jax.jit(lambda t, x: ForwardMode()(field, t, x, None, None))(T, x)
    assert abs(local.divergence) > 0.05
    assert divergence == pytest.approx(float(local.divergence), abs=1e-10)
    np.testing.assert_allclose(v, local.velocity, atol=1e-12)
    r = len(channels) + 1
    expected = min(r + 1, shape[0]) * min(r + 1, shape[1]) * shape[2]
    assert counted == [expected]
    assert expected <= (r + 1) ** 2 * shape[2]


def test_conv_velocity_depends_only_on_pixels_within_reach():
    field = drawn(Conv, (7, 1, 1), (2,), scale=3.0)
    jacobian = jax.jacfwd(lambda x: field(T, x))(normal(7))
    distance = np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    assert np.all(np.asarray(jacobian)[distance > 2] == 0)
    assert np.all(np.asarray(jacobian)[distance <= 2] != 0)


# The U-Net


def test_normalize_groups_have_mean_0_and_variance_1():
    for channels, size in ((3, 1), (8, 1), (16, 2)):
        h = normal(4, 6, channels) * jnp.arange(1.0, channels + 1)[None, None] + 5
        groups = np.asarray(normalize(h)).reshape(24, -1, size)
        np.testing.assert_allclose(groups.mean((0, 2)), 0, atol=1e-12)
        np.testing.assert_allclose(groups.std((0, 2)), 1, atol=1e-4)


def test_unet_is_0_at_first_and_depends_on_every_input():
    make = partial(UNet, (4, 4, 1), (8, 16), context_dim=2, time_frequencies=1)
    x, context = normal(16), normal(2)
    first = jax.jit(lambda key: make(key=key)(T, x, context))(jr.key(0))
    np.testing.assert_array_equal(first, np.zeros(16))
    field = drawn(make)
    jacobian = jax.jit(jax.jacrev(lambda *a: field(*a), (0, 1, 2)))(T, x, context)
    assert [j.shape for j in jacobian] == [(16,), (16, 16), (16, 2)]
    for j in jacobian:
        # Every output depends on every pixel, the time and the context.
        assert np.all(np.abs(j) > 1e-9)


@pytest.mark.usefixtures("unchecked")
def test_image_fields_bad_arguments_raise():
    key = jr.key(0)
    with pytest.raises(ValueError, match="unknown time layer 'gate': use one of ignore"):
        Conv((4, 4, 1), time="gate", key=key)
    with pytest.raises(ValueError, match="at least"):
        Conv((4, 0, 1), key=key)
    with pytest.raises(ValueError, match="channels must be"):
        UNet((4, 4, 1), (), key=key)
    with pytest.raises(ValueError, match=r"halved 2 times for 3 levels of channels; got 6 x 4"):
        UNet((6, 4, 1), (2, 2, 2), key=key)
    with pytest.raises(ValueError, match="multiples of 8; got 12"):
        UNet((4, 4, 1), (12,), key=key)
    with pytest.raises(ValueError, match="got 12 from"):
        UNet((4, 4, 1), (4, 8), key=key)


# Mixed precision


def test_cast_rounds_and_keeps_the_dtypes_around_it():
    field = astype(drawn(Conv, (3, 4, 1), (3,), scale=2.0), jnp.float32)
    t, x = astype((T, normal(12)), jnp.float32)
    low = Cast(field, jnp.bfloat16)
    v, divergence = jax.jit(lambda *a: field.velocity_and_divergence(*a))(t, x)
    found, found_divergence = jax.jit(lambda *a: low.velocity_and_divergence(*a))(t, x)
    assert {found.dtype, found_divergence.dtype, low(t, x).dtype} == {jnp.dtype("float32")}
    unit = 2**-8  # the rounding error of bfloat16, which has 8 significant bits
    assert 0 < np.max(np.abs(found - v)) < 10 * unit * np.max(np.abs(v))
    assert 0 < abs(found_divergence - divergence) < 20 * unit * np.max(np.abs(v))
    noise = Hutchinson().draw_noise(jr.key(0), 1, 12, jnp.float32)[0]
    estimates = [
        jax.jit(lambda t, x, f=f: Hutchinson()(f, t, x, None, noise).divergence)(t, x)
        for f in (field, low)
    ]
    assert estimates[1].dtype == jnp.float32
    assert 0 < abs(estimates[0] - estimates[1]) < 0.1 * (1 + abs(estimates[0]))

    loss = lambda field, x: jnp.sum(field(t, x) ** 2)  # noqa: E731
    whole, rounded = (jax.jit(jax.grad(loss))(f, x) for f in (field, low))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.05 * np.max(np.abs(a)))
    assert Cast(field, jnp.bfloat16).dim == 12
