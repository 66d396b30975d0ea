"""Composed flows: closed forms of affine parts, and bijections of images against autodiff."""

import dataclasses
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import drawn
from helpers import MATRIX, TIGHT, Linear, NotANumber, T, affine, astype, carried, linear, mlp
from jaxtyping import Array, Float
from scipy import linalg, stats

import jcnf
from jcnf import Exact, ForwardMode, Hutchinson, Solve, evaluate, objectives
from jcnf.distributions import StandardNormal
from jcnf.divergence import FixedNoise
from jcnf.fields import Cast, Conv, Field
from jcnf.flows import (
    CNF,
    ODE,
    Chain,
    ChannelSplit,
    Composition,
    Fixed,
    Logit,
    Squeeze,
    multiscale,
    with_fields,
)
from jcnf.regularizers import jacobian as jacobian_penalty
from jcnf.regularizers import kinetic

RNG = np.random.default_rng(0)
X, CONTEXT = jnp.asarray(RNG.normal(size=(30, 3))), jnp.asarray(RNG.normal(size=(30, 2)))
OTHER = np.array([[-0.3, 0.5, 0.1], [0.2, 0.6, -0.7], [0.4, 0.1, 0.2]])
S = 0.5  # t1 of the ODE with OTHER
STEPS = Solve(step=T / 8)
EULER = Solve("euler", step=T / 2)  # exact enough for estimates e'Ae, which do not depend on x

transform = eqx.filter_jit(jcnf.transform)


class Deaf(Linear):
    """A linear field that must not be given a context."""

    def __call__(self, t, x, context=None):
        assert context is None
        return self.matrix @ x


def other(kind=Linear):
    return ODE(kind(jnp.asarray(OTHER)), S)


def two_parts():
    """x = expm(OTHER S) expm(MATRIX T) z."""
    return Chain([ODE(linear().bijection.field, T), other()], StandardNormal(3))


def gaussian(matrix, mean=0.0):
    return stats.multivariate_normal(np.zeros(3) + mean, matrix @ matrix.T)


# Parts one after another


def test_affine_parts_have_the_exact_gaussian():
    flow, law = two_parts(), gaussian(linalg.expm(S * OTHER) @ linalg.expm(T * MATRIX))
    log_prob = eqx.filter_jit(jcnf.log_prob)(flow, X, solve=TIGHT)
    np.testing.assert_allclose(log_prob, law.logpdf(X), atol=1e-8)
    x = eqx.filter_jit(jcnf.sample)(flow, jr.key(0), 9, solve=TIGHT)
    z = flow.base.sample(jr.key(0), 9)
    np.testing.assert_allclose(x, carried(z) @ linalg.expm(S * OTHER).T, atol=1e-8)


@pytest.mark.parametrize("direction", ["to_base", "to_data"])
def test_logdets_penalties_and_statistics_add_up(direction):
    settings = {"solve": STEPS, "divergence": ForwardMode(), "direction": direction}
    settings["regularizers"] = kinetic, jacobian_penalty
    flow = two_parts()
    whole = transform(flow, X, **settings)
    x, ends = X, []
    order = flow.bijection.parts[::-1] if direction == "to_base" else flow.bijection.parts
    for part in order:
        ends.append(transform(CNF(part.field, flow.base, part.t1), x, **settings))
        x = ends[-1].value
    np.testing.assert_allclose(whole.value, x, atol=1e-12)
    np.testing.assert_allclose(whole.logdet, sum(end.logdet for end in ends), atol=1e-12)
    for name, value in whole.regularizers.items():
        assert np.min(value) > 0.1
        np.testing.assert_allclose(value, sum(e.regularizers[name] for e in ends), atol=1e-12)
    for name in ("nfe", "steps", "rejected"):
        assert getattr(whole.stats, name) == sum(getattr(e.stats, name) for e in ends)
    assert whole.stats.steps == 8 + 5
    assert not np.any(whole.stats.failed)


def test_a_solve_that_fails_in_one_part_fails_the_sample():
    """On the way to the base, the first solve takes 0.6 to where the second field is NaN."""
    flow = Chain([ODE(NotANumber(), T), ODE(Linear(-jnp.eye(2), dim=2), T)], StandardNormal(2))
    x = jnp.asarray(np.full((40, 2), 0.1)).at[7].set(0.6)
    scores = evaluate.log_prob(flow, x)
    np.testing.assert_array_equal(np.flatnonzero(scores.failed), [7])
    np.testing.assert_array_equal(np.isnan(scores.log_prob), scores.failed)
    expected = stats.norm.logpdf(0.1, scale=1).item() * 2  # the second solve undoes the first
    np.testing.assert_allclose(np.delete(scores.log_prob, 7), expected, atol=1e-4)


def test_contexts_reach_the_parts_that_take_them():
    flow = Chain([ODE(affine().bijection.field, T), other(Deaf)], StandardNormal(3))
    assert flow.context_dim == 2
    log_prob = eqx.filter_jit(jcnf.log_prob)(flow, X, context=CONTEXT, solve=TIGHT)
    means = carried(np.zeros((30, 3)), context=CONTEXT) @ linalg.expm(S * OTHER).T
    law = gaussian(linalg.expm(S * OTHER) @ linalg.expm(T * MATRIX))
    np.testing.assert_allclose(log_prob, law.logpdf(X - means), atol=1e-8)
    assert Composition([other(Deaf)]).context_dim == 0
    with pytest.raises(ValueError, match="takes a context of size 2; got none"):
        jcnf.log_prob(flow, X)


def test_errors_say_what_to_do(unchecked):
    with pytest.raises(ValueError, match=r"at least one part, .*; got 0 parts"):
        Composition([])
    with pytest.raises(ValueError, match=r"each part must be a .* use jcnf.flows.ODE"):
        Composition([affine().bijection.field])
    of_3 = drawn(Conv, (1, 3, 1), (2,), context_dim=3)
    with pytest.raises(ValueError, match=r"contexts of one size if any; got 2 .* sizes \[2, 3\]"):
        Chain([ODE(of_3), ODE(affine().bijection.field)], StandardNormal(3))
    with pytest.raises(ValueError, match="t1 must be positive"):
        ODE(linear().bijection.field, 0.0)


# Noise


def nested():
    """Return a chain of a solve of the first two components and a solve of all three."""
    half = ODE(Linear(jnp.asarray(MATRIX[:2, :2]), dim=2), T)
    inner = ChannelSplit(Composition([Marker(0.0), half]), (1, 1, 3), 2)
    return Chain([inner, Marker(0.0), ODE(linear().bijection.field, T)], StandardNormal(3))


class Marker(Fixed):
    """Add `number` to the data on the way to the base."""

    number: float | Float[Array, ""]

    def both(self, x, direction, context=None):
        sign = 1 if direction == "to_base" else -1
        return x + sign * self.number, jnp.zeros(len(x), x.dtype)


def quadratic(matrix, noise):
    """Return e'Ae, the estimated divergence of a linear field, which is the same everywhere."""
    return np.einsum("bi,ij,bj->b", noise[:, 0], matrix, noise[:, 0])


@pytest.mark.slow
def test_each_part_has_noise_of_its_own_and_is_unbiased():
    n, flow = 4000, nested()
    x = jnp.zeros((n, 3))
    estimate = partial(transform, flow, x, solve=EULER)
    noise = flow.bijection.draw_noise(Hutchinson(), jr.key(1), n, 3, x.dtype)
    (nothing, first), nor_here, last = noise
    assert nothing is nor_here is None
    parts = [quadratic(MATRIX[:2, :2], first), quadratic(MATRIX, last)]
    found = estimate(key=jr.key(1), divergence=Hutchinson()).logdet
    np.testing.assert_allclose(found, -T * sum(parts), atol=1e-10)
    again = estimate(divergence=FixedNoise(Hutchinson(), noise)).logdet
    np.testing.assert_array_equal(found, again)
    assert abs(np.corrcoef(parts)[0, 1]) < 4 / np.sqrt(n)
    expected = -T * (np.trace(MATRIX[:2, :2]) + np.trace(MATRIX))
    assert abs(np.mean(found) - expected) < 4 * evaluate.standard_error(np.asarray(found))


@pytest.mark.slow
def test_scores_by_an_estimator_do_not_depend_on_the_chunk():
    flow, settings = nested(), {"key": jr.key(2), "solve": EULER, "divergence": Hutchinson(2)}
    whole, pieces = (evaluate.log_prob(flow, X, **settings, chunk=chunk) for chunk in (30, 7))
    np.testing.assert_allclose(pieces.log_prob, whole.log_prob, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [Hutchinson(), Exact()])
def test_a_certificate_of_a_chain(divergence):
    flow = nested()
    found = evaluate.accuracy_report(
        flow, X, key=jr.key(3), solve=STEPS, divergence=divergence, draws=3, reference_points=5
    )
    assert found.nll_error < 1e-4  # solver error only: both solves use the same noise
    assert found.failures == 0
    assert found.roundtrip_error < 1e-4
    half, all_three = linalg.expm(T * MATRIX[:2, :2]), linalg.expm(T * MATRIX)
    law = gaussian(all_three @ linalg.block_diag(half, 1))
    error = found.scores.log_prob - law.logpdf(X)
    assert np.max(np.abs(error)) < 1e-4 or isinstance(divergence, Hutchinson)
    assert abs(np.mean(error)) < 4 * found.estimator_stderr + 1e-4


# Images


def both_ways(bijection, x):
    """Yield the end, log-det and autodiff Jacobian from x to the base, then for the way back."""
    for direction in ("to_base", "to_data"):

        def end(x, direction=direction):
            return bijection.both(x[None], direction)[0][0]

        there, logdet = bijection.both(x, direction)
        yield there, logdet, jax.vmap(jax.jacfwd(end))(x)
        x = there


def test_the_logit_by_hand_and_by_autodiff():
    x = jnp.asarray(RNG.uniform(-0.04, 1.04, size=(5, 3))).at[0].set(jnp.array([0.5, 0.0, 1.0]))
    (y, logdet, there), (back, _, _) = pairs = list(both_ways(Logit(0.05), x))
    np.testing.assert_allclose(y[0], [0, np.log(0.05 / 0.95), np.log(0.95 / 0.05)], atol=1e-12)
    slopes = 0.9 * np.array([4, 1 / (0.05 * 0.95), 1 / (0.05 * 0.95)])
    np.testing.assert_allclose(logdet[0], np.log(slopes).sum(), atol=1e-12)
    np.testing.assert_allclose(back, x, atol=1e-12)
    np.testing.assert_allclose(pairs[1][1], -logdet, atol=1e-12)
    for _, found, jacobian in pairs:
        np.testing.assert_allclose(found, jnp.linalg.slogdet(jacobian)[1], atol=1e-11)
    assert np.all(np.diagonal(there, axis1=1, axis2=2) > 0)


def test_what_is_outside_of_the_logit_fails_alone():
    x = jnp.array([[0.2, 0.3], [-0.06, 0.3], [0.3, 1.06], [jnp.nan, 0.1]])
    _, stats = Logit(0.05).inverse(x, None, Solve())
    np.testing.assert_array_equal(stats.failed, [False, True, True, True])
    flow = Chain([ODE(Linear(jnp.eye(2), dim=2)), Logit(0.05)], StandardNormal(2))
    scores = evaluate.log_prob(flow, jnp.tile(x[:1], (40, 1)).at[3].set(x[1]))
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(scores.log_prob)), [3])
    for alpha in (0.0, 0.5, 0.7):
        with pytest.raises(ValueError, match=r"alpha must be in \[1e-7, 0.5\)"):
            Logit(alpha)


def test_the_logit_keeps_its_digits_at_both_ends_in_float32():
    x = jnp.asarray([[1e-6, 2**-24, 0.5, 1 - 2**-24, 1 - 2**-22]], jnp.float32)
    logit = Logit(1e-6)
    y, logdet = logit.both(x, "to_base")
    wide, wide_logdet = logit.both(astype(x, jnp.float64), "to_base")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, wide, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(logdet, wide_logdet, rtol=1e-6)


def test_squeezing_takes_two_by_two_pixels_to_one():
    picture = np.arange(32.0).reshape(4, 4, 2)
    by_hand = np.zeros((2, 2, 8))
    for row, column in np.ndindex(4, 4):
        for channel in range(2):
            place = (row % 2 * 2 + column % 2) * 2 + channel
            by_hand[row // 2, column // 2, place] = picture[row, column, channel]
    squeeze = Squeeze((4, 4, 2))
    end, logdet = squeeze.both(jnp.asarray(picture).reshape(1, -1), "to_base")
    np.testing.assert_array_equal(end[0], by_hand.ravel())
    np.testing.assert_array_equal(logdet, [0])
    back, _ = squeeze.both(end, "to_data")
    np.testing.assert_array_equal(back[0], picture.ravel())
    wide = jnp.asarray(RNG.normal(size=(3, 2 * 6 * 1)))
    (_, _, jacobian), (back, _, _) = both_ways(Squeeze((2, 6, 1)), wide)
    np.testing.assert_array_equal(back, wide)
    np.testing.assert_array_equal(np.sort(jacobian[0], 1)[:, -1], 1)
    with pytest.raises(ValueError, match="even height and width"):
        Squeeze((4, 3, 1))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 1\); got vectors of length 12"):
        Squeeze((2, 2, 1)).both(wide, "to_base")


def test_other_channels_pass_through_bit_by_bit():
    shape, channels = (2, 1, 3), 2
    inner = ODE(mlp(4, (5,)), T)
    part = ChannelSplit(inner, shape, channels)
    x = jnp.asarray(RNG.normal(size=(5, 6)))
    flow, alone = Chain([part], StandardNormal(6)), CNF(inner.field, StandardNormal(4), T)
    settings = {"solve": STEPS, "regularizers": (kinetic,)}
    found = transform(flow, x, **settings)
    before, after = (np.asarray(a).reshape(5, 2, 3) for a in (x, found.value))
    np.testing.assert_array_equal(after[..., 2], before[..., 2])
    of_first = transform(alone, jnp.asarray(before[..., :2].reshape(5, 4)), **settings)
    np.testing.assert_allclose(after[..., :2].reshape(5, 4), of_first.value, atol=1e-12)
    assert np.max(np.abs(of_first.value - before[..., :2].reshape(5, 4))) > 0.1
    np.testing.assert_allclose(found.logdet, of_first.logdet, atol=1e-12)
    np.testing.assert_allclose(
        found.regularizers["kinetic"], of_first.regularizers["kinetic"], atol=1e-12
    )
    plain, stats = eqx.filter_jit(part.inverse)(x, None, STEPS)
    np.testing.assert_allclose(plain, found.value, atol=1e-12)
    assert stats.nfe == found.stats.nfe == of_first.stats.nfe
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="channels must be"):
            ChannelSplit(inner, shape, wrong)


def test_scales_end_where_they_should():
    shapes = []

    def blocks(shape):
        shapes.append(shape)
        return [Marker(10.0 ** (len(shapes) - 1))]

    flow = multiscale((4, 4, 1), 3, blocks)
    # From the data side: each scale before and after its squeeze; the last is not squeezed.
    assert shapes == [(4, 4, 1), (2, 2, 4), (2, 2, 2), (1, 1, 8), (1, 1, 4)]
    x = jnp.asarray(RNG.permutation(16) / 16.0)[None]
    end, stats = flow.inverse(x, None, Solve())
    assert stats.nfe == 0
    added = np.floor(np.asarray(end)).reshape(2, 2, 4)
    values = (np.asarray(end).reshape(2, 2, 4) - added) % 1
    squeezed, _ = Squeeze((4, 4, 1)).both(x, "to_base")
    np.testing.assert_allclose(values[..., 2:], np.asarray(squeezed).reshape(2, 2, 4)[..., 2:])
    np.testing.assert_array_equal(added[..., 2:], 11)  # channels 2 and 3 end at the first scale
    # Half of the 2 x 2 x 2 values that go on end at the second scale and the rest at the last.
    rest = added[..., :2].ravel()
    np.testing.assert_array_equal(np.sort(rest), [1111] * 4 + [11111] * 4)
    np.testing.assert_array_equal(rest, [11111] * 4 + [1111] * 4)
    back, _ = flow.forward(end, None, Solve())
    np.testing.assert_allclose(back, x, atol=1e-9)
    assert multiscale((3, 5, 1), 1, blocks).parts[0].number == 10.0**5
    for shape, scales in (((6, 4, 1), 3), ((4, 6, 1), 3)):
        with pytest.raises(ValueError, match=f"{scales} scales need images"):
            multiscale(shape, scales, blocks)


def pictures_flow(shape=(4, 4, 1), scales=2):
    """Return a multiscale flow whose convolutional fields are all far from linear."""
    seeds = iter(range(9))

    def blocks(shape):
        return [ODE(drawn(Conv, shape, (2,), scale=1.5, seed=next(seeds)), T)]

    inner = multiscale(shape, scales, blocks)
    return Chain([*inner.parts, Logit(0.05)], StandardNormal(int(np.prod(shape))))


@pytest.mark.slow
def test_the_logdet_of_a_multiscale_flow_is_that_of_its_jacobian():
    flow, x = pictures_flow(), jnp.asarray(RNG.uniform(size=(1, 16)))
    solve = Solve(rtol=1e-10, atol=1e-10, adjoint=diffrax.ForwardMode())

    @eqx.filter_jit
    def run(x, direction):
        def carry(x):
            result = jcnf.transform(flow, x, direction=direction, solve=solve)
            return result.value[0], result

        return jax.jacfwd(carry, has_aux=True)(x)

    derivative, there = run(x, "to_base")
    expected = jnp.linalg.slogdet(derivative[:, 0])[1]
    assert there.logdet[0] == pytest.approx(float(expected), abs=1e-8)
    back = transform(flow, there.value, direction="to_data", solve=TIGHT)
    np.testing.assert_allclose(back.value, x, atol=1e-8)
    np.testing.assert_allclose(back.logdet, -there.logdet, atol=1e-8)
    resting = jax.tree.map(lambda leaf: 0 * leaf, flow)
    still, _ = eqx.filter_jit(resting.bijection.inverse)(x, None, EULER)
    assert np.median(np.abs(there.value - still)) > 0.05


# Objectives of the ODE inside


def test_flow_matching_inside_is_that_of_preprocessed_data():
    field = drawn(Conv, (2, 2, 1), (3,), scale=2.0)
    logit, base = Logit(0.05), StandardNormal(4)
    chain, x = Chain([ODE(field, T), logit], base), jnp.asarray(RNG.uniform(size=(6, 4)))
    loss = eqx.filter_value_and_grad(
        lambda flow, objective, x: objective(flow, x, jr.key(0))[0].astype(x.dtype)
    )
    inner = objectives.flow_matching
    value, gradient = eqx.filter_jit(loss)(chain, inner, x)
    y, _ = logit.both(x, "to_base")
    expected = eqx.filter_jit(loss)(CNF(field, base, T), objectives.flow_matching, y)
    assert value == pytest.approx(float(expected[0]), rel=1e-12)
    for a, b in zip(*(jax.tree.leaves(g) for g in (gradient, expected[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    for parts in ([logit, ODE(field)], [ODE(field), ODE(field)]):
        with pytest.raises(ValueError, match="Chain of an ODE and"):
            inner(Chain(parts, base), x, jr.key(0))


def test_parts_outside_have_no_gradient():
    flow = Chain([ODE(linear().bijection.field, T), Marker(jnp.asarray(0.5))], StandardNormal(3))
    inner = objectives.flow_matching
    gradient = eqx.filter_grad(lambda flow: inner(flow, X, jr.key(0))[0])(flow)
    assert np.max(np.abs(gradient.bijection.parts[0].field.matrix)) > 0.1
    assert gradient.bijection.parts[1].number == 0


def test_in_less_precision_the_loss_is_near_and_gradients_are_of_float32():
    flow = astype(CNF(mlp(3, (8,)), StandardNormal(3), T), jnp.float32)
    x = X.astype(jnp.float32)

    @eqx.filter_jit
    def loss(flow, objective):
        return eqx.filter_value_and_grad(lambda flow: objective(flow, x, jr.key(0))[0])(flow)

    whole = objectives.flow_matching
    low = objectives.cast_fields(whole, jnp.bfloat16)
    (value, gradient), (rounded, of_rounded) = loss(flow, whole), loss(flow, low)
    assert rounded.dtype == jnp.float32
    assert 0 < abs(value - rounded) < 0.02 * value
    for a, b in zip(*(jax.tree.leaves(g) for g in (gradient, of_rounded)), strict=True):
        assert b.dtype == jnp.float32
        assert 0 < np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


def test_fields_are_changed_wherever_they_are():
    flow = with_fields(pictures_flow(), lambda field: Cast(field, jnp.float32))
    odes = [
        node
        for node in jax.tree.leaves(flow, is_leaf=lambda node: isinstance(node, ODE))
        if isinstance(node, ODE)
    ]
    assert len(odes) == 3
    assert all(isinstance(ode.field, Cast) and ode.t1 == T for ode in odes)
    changed = with_fields(linear(), lambda field: Linear(2 * field.matrix))
    np.testing.assert_array_equal(changed.bijection.field.matrix, 2 * MATRIX)


class Pulse(Field):
    """x' = r(t) x with r a normal density around `at`: over all times x grows by a factor of e."""

    at: float
    width: float
    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        return jax.scipy.stats.norm.pdf(t, self.at, self.width) * x


@pytest.mark.parametrize(
    "adjoint", ["checkpoint", pytest.param("reversible", marks=pytest.mark.slow)]
)
def test_parts_that_share_a_step_plan_take_fewer_steps_and_are_as_accurate(adjoint):
    chain = Chain([ODE(Pulse(0.2, 10.0)), ODE(Pulse(0.2, 0.07))], StandardNormal(3))
    solve = Solve(rtol=1e-5, atol=1e-5, adjoint=adjoint)
    first = transform(chain, X, solve=solve)
    second = transform(chain, X, solve=dataclasses.replace(solve, step_plan=first.stats.step_plan))
    assert int(second.stats.nfe) < 0.9 * int(first.stats.nfe)
    grown = sum(
        np.diff(stats.norm.cdf([0.0, 1.0], part.field.at, part.field.width))[0]
        for part in chain.bijection.parts
    )
    for found in (first, second):
        np.testing.assert_allclose(found.logdet, -3 * grown, atol=3e-4)
        np.testing.assert_allclose(found.value, X * np.exp(-grown), atol=3e-4)
