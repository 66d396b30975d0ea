"""Flow matching: its minimizer for Gaussians, keys, contexts, pairs, weighted sums, training."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TIGHT, T, Tally, astype, mlp
from jaxtyping import Array, Float
from scipy import stats
from scipy.optimize import linear_sum_assignment

from jcnf import CNF, log_prob, training
from jcnf.distributions import StandardNormal
from jcnf.fields import Field
from jcnf.objectives import flow_matching, rectified, weighted_sum
from jcnf.objectives.couplings import COUPLINGS, ExactOT
from jcnf.objectives.paths import (
    PATHS,
    SigmaMin,
    Stochastic,
    VariancePreserving,
    linear,
    trigonometric,
)
from jcnf.objectives.times import data_biased, logit_normal, stratified, uniform

KEY = jr.key(0)
MEAN, SCALE = np.array([0.5, -1.0]), np.array([0.4, 1.5])


class Truth(Field):
    """The exact field for data N(m, diag s^2) and a standard normal base, plus an error `off`.

    The exact field is E[dx_t/dt | x_t = x]. With x_s = a x0 + b x1 + g z of variance
    V = a^2 + b^2 s^2 + g^2 it is b' m + (a a' + b b' s^2 + g g') / V (x - b m) per unit of s, and
    1 / t1 times this per unit of t = s t1.
    """

    off: Float[Array, " 3"]
    path: object = eqx.field(static=True, default=linear)
    t1: float = eqx.field(static=True, default=1.0)
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        s, zero, one = t / self.t1, jnp.zeros_like(t), jnp.ones_like(t)
        (a, da), (b, db), (g, dg) = (
            jax.jvp(lambda s, unit=unit: self.path(s, *unit), (s,), (one,))
            for unit in ((one, zero, zero), (zero, one, zero), (zero, zero, one))
        )
        variance = a**2 + (b * SCALE) ** 2 + g**2
        covariance = a * da + b * db * SCALE**2 + g * dg
        v = db * MEAN + covariance / variance * (x - b * MEAN)
        off = self.off[0] + self.off[1] * x + self.off[2] * s * x[::-1]
        return (v + off) / self.t1


def truth(path=linear, t1=1.0, off=0.0) -> CNF:
    field = Truth(jnp.broadcast_to(jnp.asarray(off), (3,)), path, t1)
    return CNF(field, StandardNormal(2), t1=t1)


class Told(Field):
    """v = c, the context."""

    dim: int = eqx.field(static=True, default=2)
    context_dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context):
        return context


class Constant(Field):
    """v = d + r t."""

    value: Float[Array, " dim"]
    rate: float = 0.0
    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        return self.value + self.rate * t


def constant(value, rate=0.0, t1=T):
    return CNF(Constant(jnp.asarray(value), rate), StandardNormal(2), t1=t1)


def still(s, x0, x1, z):
    """A path that stays at 0."""
    return 0 * x1


def draw(key, num):
    return jnp.asarray(MEAN)[None] + jnp.asarray(SCALE)[None] * jr.normal(key, (num, 2))


def test_the_truth_on_straight_lines_is_its_formula():
    t, x = 0.3, np.array([0.2, 0.7])
    variance = (1 - t) ** 2 + (t * SCALE) ** 2
    expected = MEAN + (t * SCALE**2 - (1 - t)) / variance * (x - t * MEAN)
    np.testing.assert_allclose(
        truth().bijection.field(jnp.asarray(t), jnp.asarray(x)), expected, rtol=1e-13
    )


def away_from_the_end(key, num):
    """Times below 0.95: near 1, the velocity of a variance-preserving path has no variance."""
    return 0.95 * stratified(key, num)


@pytest.mark.parametrize(
    ("path", "time", "t1"),
    [
        (linear, stratified, 1.0),
        (linear, logit_normal, T),
        (trigonometric, data_biased, T),
        (SigmaMin(0.3), uniform, 1.0),
        (VariancePreserving(), away_from_the_end, T),
        (Stochastic(0.7), stratified, T),
    ],
)
def test_the_truth_is_the_minimum(path, time, t1):
    """The gradient is zero there, and an error d in the field adds |d|^2 to the loss."""
    steps = np.array([[0, 0, 0], [0.3, 0, 0], [-0.3, 0, 0], [0, 0.3, 0], [0, -0.3, 0]])
    steps = np.append(steps, [[0, 0, 0.3], [0, 0, -0.3]], axis=0)

    @jax.jit
    @jax.vmap
    def losses(key):
        data_key, key = jr.split(key)
        x = draw(data_key, 32)

        def loss(off):
            return flow_matching(truth(path, t1, off), x, key, path=path, time=time)[0]

        return jax.grad(loss)(jnp.zeros(3)), jax.lax.map(loss, jnp.asarray(steps))

    num = 4000
    gradient, loss = (np.asarray(a) for a in losses(jr.split(KEY, num)))
    error = 4 * np.std(gradient, axis=0) / np.sqrt(num)
    assert np.max(error) < 0.15
    assert np.all(np.abs(np.mean(gradient, axis=0)) < error)
    more = loss[:, 1:] - loss[:, :1]
    error = 4 * np.std(more, axis=0) / np.sqrt(num)
    assert np.all(np.mean(more, axis=0) > error)
    # A constant error d adds |d|^2, summed over the two components.
    assert np.all(np.abs(np.mean(more[:, :2], axis=0) - 2 * (0.3 / t1) ** 2) < error[:2])


@pytest.mark.parametrize(("path", "t1"), [(linear, 1.0), (SigmaMin(0.3), T)])
def test_the_flow_of_the_truth_has_the_density_of_the_data(path, t1):
    x = draw(KEY, 20)
    blur = path.sigma if isinstance(path, SigmaMin) else 0
    expected = stats.norm(MEAN, np.sqrt(SCALE**2 + blur**2)).logpdf(np.asarray(x)).sum(axis=1)
    found = jax.jit(lambda x: log_prob(truth(path, t1), x, solve=TIGHT))(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_loss_follows_from_the_key():
    flow, x = truth(), draw(KEY, 8)
    loss = jax.jit(lambda key: flow_matching(flow, x, key)[0])
    assert loss(jr.key(1)) == loss(jr.key(1))
    assert loss(jr.key(1)) != loss(jr.key(2))


def test_what_is_drawn_is_independent():
    """E[x0^2 z^2] is 1 for each component, and would be 3 if x0 and z were the same draw."""

    def product(s, x0, x1, z):
        return s * x0 * z

    def loss(key):
        return flow_matching(constant([0.0, 0.0], t1=1.0), x, key, path=product)[0]

    x = jnp.zeros((64, 2))
    losses = np.asarray(jax.jit(jax.vmap(loss))(jr.split(KEY, 500)))
    assert abs(np.mean(losses) - 2) < 4 * np.std(losses) / np.sqrt(500) < 0.3


def test_x0_goes_where_the_coupling_says():
    seen = []

    def watched(key, x0, x1, context):
        seen.append((x0, context))
        return ExactOT()(key, x0, x1, context)

    x, flow = draw(KEY, 16), constant([0.0, 0.0], t1=1.0)
    loss, _ = flow_matching(flow, x, KEY, coupling=watched)
    apart, _ = flow_matching(flow, x, KEY)
    ((x0, context),) = seen
    costs = np.sum((np.asarray(x)[:, None] - np.asarray(x0)[None]) ** 2, axis=-1)
    assert context is None
    np.testing.assert_allclose(apart, np.mean(np.diag(costs)), rtol=1e-12)
    best = np.mean(costs[linear_sum_assignment(costs)])
    np.testing.assert_allclose(loss, best, rtol=1e-12)
    assert best < apart


def test_a_context_stays_with_its_data_point():
    """v = c = x1 is the velocity along s x1, however x0 is paired."""
    x, flow = draw(KEY, 16), CNF(Told(), StandardNormal(2))
    for coupling in COUPLINGS.values():
        loss, _ = flow_matching(
            flow, x, KEY, context=x, path=lambda s, x0, x1, z: s * x1, coupling=coupling
        )
        assert loss < 1e-28


def test_contexts_are_dropped_at_their_rate():
    """With v = c = (0, 1) and x at rest, the loss is the fraction of contexts that are kept."""
    num, x = 8000, jnp.zeros((8000, 2))
    context = jnp.tile(jnp.array([[0.0, 1.0]]), (num, 1))
    flow, seen = CNF(Told(), StandardNormal(2)), []

    def watched(key, x0, x1, context):
        seen.append(context)
        return jnp.arange(num)

    settings = {"context": context, "path": still, "coupling": watched}
    for rate in (0.0, 0.1, 0.7):
        loss, _ = flow_matching(flow, x, KEY, drop_context=rate, **settings)
        assert abs(loss - (1 - rate)) <= 4 * np.sqrt(rate * (1 - rate) / num)
    other, _ = flow_matching(flow, x, jr.key(1), drop_context=rate, **settings)
    assert other != loss
    assert all(c is context for c in seen)  # the coupling sees the contexts before any is dropped


def test_a_dropped_context_is_dropped_whole():
    x, flow = jnp.zeros((64, 2)), CNF(Told(), StandardNormal(2))
    shares = [
        flow_matching(flow, x, KEY, context=jnp.ones((64, 2)) * c, path=still, drop_context=0.5)[0]
        for c in (jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 1.0]]))
    ]
    assert shares[0] == shares[1]
    assert float(shares[2]) == pytest.approx(float(2 * shares[0]), rel=1e-12)
    assert 0 < shares[0] < 1


X, TWO = jnp.zeros((4, 2)), jnp.ones((4, 2))


class Short(Field):
    """A field of one number, which would broadcast."""

    dim: int = eqx.field(static=True, default=2)

    def __call__(self, t, x, context=None):
        return x[:1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(flow_matching, truth(), X, KEY, drop_context=0.1), "=0.1 needs a context"),
        *(
            (
                partial(
                    flow_matching, CNF(Told(), StandardNormal(2)), X, KEY, context=TWO,
                    drop_context=rate,
                ),
                f"drop_context must be in [0, 1); got {rate}",
            )
            for rate in (1.0, 1.5, -0.1, np.nan)
        ),
        (partial(flow_matching, truth(), X[0], KEY), "add a batch axis with x[None]"),
        (
            partial(flow_matching, CNF(Told(), StandardNormal(2)), X, KEY),
            "the flow takes a context of size 2; got none",
        ),
        (
            partial(flow_matching, CNF(Short(), StandardNormal(2)), X, KEY),
            "the field must give an array of shape (2,) for each sample; got (1,)",
        ),
        (partial(rectified, truth(), (X[:, :1], X), KEY), "pairs (x0, x1) of the same shape"),
        (partial(rectified, truth(), (X[:, :1], X[:, :1]), KEY), "expected x of shape (batch, 2)"),
        (
            partial(rectified, CNF(Told(), StandardNormal(2)), (X, X), KEY, context=TWO[:3]),
            "expected context of shape (4, context)",
        ),
        (partial(weighted_sum, truth(), X, KEY, weights={}), "expected weights to map"),
        (partial(weighted_sum, truth(), X, KEY, weights={flow_matching: -1.0}), "at least 0 and"),
        (
            partial(flow_matching, truth(), X, KEY, coupling=lambda *_: jnp.arange(3)),
            "whole numbers of shape (4,)",
        ),
        (
            partial(
                weighted_sum, truth(), X, KEY,
                weights={flow_matching: 1.0, partial(flow_matching, time=uniform): 1.0},
            ),
            "two objectives report a metric of the same name: matching",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_rectified_asks_for_the_displacement_of_each_pair():
    d, x0 = np.array([1.0, -2.0]), draw(KEY, 8)
    pairs = (x0, x0 + d[None])
    along, _ = rectified(constant(d / T), pairs, KEY)
    back, metrics = rectified(constant(-d / T), pairs, KEY)
    assert along < 1e-28
    np.testing.assert_allclose(back, 4 * np.sum(d**2) / T**2, rtol=1e-12)
    assert metrics == {"matching": back}


def test_rectified_takes_times_and_contexts():
    x, quarter = draw(KEY, 8), lambda key, num: jnp.full(num, 0.25)
    loss, _ = rectified(constant([0.0, 0.0], rate=1.0), (x, x), KEY, time=quarter)
    np.testing.assert_allclose(loss, 2 * (0.25 * T) ** 2, rtol=1e-12)
    loss, _ = rectified(CNF(Told(), StandardNormal(2)), (0 * x, x), KEY, context=x)
    assert loss < 1e-28


def test_mixed_is_the_weighted_sum_of_objectives_with_keys_of_their_own():
    flow, x, context = CNF(Told(), StandardNormal(2)), draw(KEY, 8), draw(jr.key(1), 8)

    def noise(flow, x, key, *, context):
        value = jr.normal(key) + jnp.sum(context)
        return value, {"noise": value, "failed": jnp.asarray(False)}

    loss, metrics = weighted_sum(
        flow, x, KEY, weights={flow_matching: 0.5, noise: 3.0}, context=context
    )
    first, second = jr.split(KEY)
    matching, _ = flow_matching(flow, x, first, context=context)
    other, _ = noise(flow, x, second, context=context)
    np.testing.assert_allclose(loss, 0.5 * matching + 3 * other, rtol=1e-12)
    assert metrics == {"matching": matching, "noise": other, "failed": jnp.asarray(False)}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_mixed_has_failed_where_one_has(first, second):
    def objective(name, failed, flow, x, key):
        return jnp.zeros(()), {name: jnp.zeros(()), "failed": jnp.asarray(failed)}

    weights = {partial(objective, "a", first): 1.0, partial(objective, "b", second): 2.0}
    _, metrics = weighted_sum(truth(), X, KEY, weights=weights)
    assert metrics.keys() == {"a", "b", "failed"}
    assert bool(metrics["failed"]) == (first or second)


def test_float32_in_float32_out():
    flow, x, context = astype(
        (CNF(mlp(2, (4,), context_dim=2), StandardNormal(2)), X, TWO), jnp.float32
    )
    call = partial(flow_matching, drop_context=0.1, context=context)
    settings = [{"path": p} for p in PATHS.values()] + [{"coupling": c} for c in COUPLINGS.values()]
    for setting in settings:
        loss, _ = jax.eval_shape(partial(call, **setting), flow, x, KEY)
        assert (loss.shape, loss.dtype) == ((), jnp.float32)


TRACES = Tally()
DATA = jnp.asarray(np.random.default_rng(0).normal([2.0, -1.0], [0.3, 0.6], (256, 2)))


def objective(flow, x, key):
    TRACES.count += 1
    return flow_matching(flow, x, key, coupling=ExactOT(group=16))


@pytest.fixture(scope="module")
def setup():
    """A flow, its optimizer and its training program; optax's Adam needs dtype promotion."""
    flow = CNF(mlp(2, (8,), time="concat", scale=0.5), StandardNormal(2), t1=T)
    optimizer = training.make_optimizer(0.02, 1000)

    def draw_batch(key, data):
        return data[jr.randint(key, (32,), 0, len(data))]

    run = training.make_train_loop(flow, objective, draw_batch, optimizer)
    with jax.numpy_dtype_promotion("standard"):
        yield flow, optimizer, run


def test_training_by_flow_matching_is_one_program_and_lowers_the_loss(setup):
    flow, optimizer, run = setup
    state, start = run(training.init(flow, optimizer), DATA, KEY, 20)
    traces = TRACES.count
    state, _ = run(state, DATA, KEY, 280)
    state, end = run(state, DATA, KEY, 300)
    assert TRACES.count == traces > 0
    assert run.program._cache_size() == 1
    start, end = training.means(start), training.means(end)
    reasons = {"skipped_solve", "skipped_loss", "skipped_gradient"}
    assert end.keys() == {"loss", "matching", "grad_norm", "skipped"} | reasons
    assert end["skipped"] == 0
    assert end["loss"] < start["loss"] / 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_steps_on_bad_data_are_skipped_and_counted(setup, bad):
    flow, optimizer, run = setup
    state, _ = run(training.init(flow, optimizer), DATA, KEY, 2)
    before = jax.tree.map(np.array, (state.params, state.average, state.opt_state))
    state, totals = run.program(state, DATA.at[:].set(bad), KEY, 5)
    assert int(state.skipped) == totals.skipped["skipped"] == 3
    after = (state.params, state.average, state.opt_state)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    state, _ = run(state, DATA, KEY, 6)
    assert int(state.skipped) == 3
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(before[0])[0])
