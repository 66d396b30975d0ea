"""Flows of distrax bijectors, and NICE, against NumPy, autodiff and known distributions."""

from functools import partial

import distrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import astype, slope
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from scipy import stats

import jcnf
from jcnf import NICE, Flow, Hutchinson, evaluate, objectives
from jcnf.data.toys import PARABOLA, TOYS
from jcnf.distributions import Logistic, StandardNormal
from jcnf.flows import DistraxBijection, calibrated, solve_transform
from jcnf.regularizers import kinetic

pytestmark = pytest.mark.optimized

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 5)))

log_prob = eqx.filter_jit(jcnf.log_prob)
transform = eqx.filter_jit(jcnf.transform)


def nice(dim=5, widths=(8, 7), couplings=4, *, seed=0, scale=0.6, **settings) -> Flow:
    """Return a NICE without zero weights; NumPy draws them, because initializers compile slowly."""
    rng = np.random.default_rng(seed)
    make = partial(NICE, dim, widths, couplings, **settings)
    shapes = eqx.filter_eval_shape(make, key=jr.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape)), shapes)


def in_numpy(flow, x):
    """Return the latents of data `x`, the paper's forward direction."""
    h, components = np.array(x), np.arange(x.shape[1])
    parts = [components < (x.shape[1] + 1) // 2, components % 2 == 0][
        flow.bijection.split == "odd_even"
    ]
    for i, network in enumerate(flow.bijection.networks):
        given = parts if i % 2 == 0 else ~parts
        m = h[:, given]
        layers = [
            (np.asarray(w), np.asarray(b))
            for w, b in zip(network.weights, network.biases, strict=True)
        ]
        for weight, bias in layers[:-1]:
            m = np.maximum(m @ weight.T + bias, 0)
        h[:, ~given] += m @ layers[-1][0].T + layers[-1][1]
    return np.exp(np.asarray(flow.bijection.log_scale)) * h


# The map and its log-det


@pytest.mark.parametrize(
    ("split", "base", "prior"),
    [("halves", StandardNormal, stats.norm), ("odd_even", Logistic, stats.logistic)],
)
def test_it_is_the_papers(split, base, prior):
    flow = nice(split=split, base=base(5))
    h = in_numpy(flow, X)
    there = transform(flow, X)
    np.testing.assert_allclose(there.value, h, atol=1e-12)
    np.testing.assert_allclose(there.logdet, np.sum(flow.bijection.log_scale), atol=1e-12)
    expected = prior.logpdf(h).sum(axis=1) + np.sum(flow.bijection.log_scale)
    np.testing.assert_allclose(log_prob(flow, X), expected, atol=1e-12)
    scaled = np.exp(np.asarray(flow.bijection.log_scale)) * np.asarray(X)
    assert np.ptp(h - scaled, axis=0).min() > 0.1  # every component moves
    assert (int(there.stats.nfe), int(there.stats.steps), int(there.stats.rejected)) == (1, 0, 0)
    assert there.regularizers == {}
    back = transform(flow, there.value, direction="to_data")
    np.testing.assert_allclose(back.value, X, atol=1e-12)
    np.testing.assert_allclose(back.logdet, -there.logdet, atol=1e-12)


def test_an_answer_by_hand():
    """m(x1) = |x1| and s = (log 2, log 1/2) take (-3, 1) to (-6, 2)."""
    flow = nice(2, (2,), 1)
    arrays = [np.array([[1.0], [-1.0]]), np.array([[1.0, 1.0]]), np.zeros(2), np.zeros(1)]
    flow = eqx.tree_at(
        lambda f: (
            *f.bijection.networks[0].weights,
            *f.bijection.networks[0].biases,
            f.bijection.log_scale,
        ),
        flow,
        [jnp.asarray(a) for a in (*arrays, np.log([2, 0.5]))],
    )
    x, h = jnp.array([[-3.0, 1.0]]), np.array([[-6.0, 2.0]])
    np.testing.assert_allclose(transform(flow, x).value, h, atol=1e-14)
    np.testing.assert_allclose(log_prob(flow, x), stats.logistic.logpdf(h).sum(), atol=1e-14)


@eqx.filter_jit
def jacobian(flow, x, direction):
    def one(x):
        result = jcnf.transform(flow, x[None], direction=direction)
        return result.value[0], (result.value[0], result.logdet[0])

    derivative, (end, logdet) = jax.vmap(jax.jacfwd(one, has_aux=True))(x)
    alone, _ = solve_transform(flow, direction, jcnf.Solve(), x, None)
    return end, logdet, derivative, alone


class Spline(DistraxBijection):
    """An example of another distrax bijector behind the same functions."""

    knots: Float[Array, "dim parameters"]

    def bijector(self):
        return distrax.Block(distrax.RationalQuadraticSpline(self.knots, -3.0, 3.0), 1)


def spline():
    return Flow(Spline(jnp.asarray(RNG.normal(size=(5, 13)))), StandardNormal(5))


@pytest.mark.parametrize("make", [nice, partial(nice, split="odd_even"), spline])
def test_logdet_is_that_of_the_jacobian_both_ways_and_the_way_back_leads_home(make):
    flow, x = make(), X
    for direction in ("to_base", "to_data"):
        end, logdet, derivative, alone = jacobian(flow, x, direction)
        sign, expected = jnp.linalg.slogdet(derivative)
        assert np.all(np.abs(sign) == 1)
        np.testing.assert_allclose(logdet, expected, atol=1e-10)
        np.testing.assert_allclose(alone, end, atol=1e-12)
        assert np.max(np.abs(end - x)) > 0.1
        x = end
    np.testing.assert_allclose(x, X, atol=1e-9)


def test_the_parabola_is_one_coupling_and_one_scaling():
    class Bent(DistraxBijection):
        def bijector(self):
            shift = lambda m: distrax.Block(distrax.ScalarAffine(m), 1)  # noqa: E731
            bend = distrax.SplitCoupling(1, 1, lambda x1: (x1**2 - 1) / 2, shift)
            scale = distrax.ScalarAffine(0.0, scale=jnp.asarray(PARABOLA))
            return distrax.Chain([bend, distrax.Block(scale, 1)])

    toy = TOYS["parabola"]
    x = toy.sample(jr.key(0), 100)
    flow = Flow(Bent(), StandardNormal(2))
    np.testing.assert_allclose(log_prob(flow, x), toy.log_prob(x), atol=1e-10)


def test_training_starts_near_the_identity_and_leaves_it():
    flow, x = NICE(2, (9,), 2, key=jr.key(0)), X[:, :2]
    assert 0 < np.max(np.abs(transform(flow, x).value - x)) < 0.1
    np.testing.assert_array_equal(flow.bijection.log_scale, 0)
    assert np.all(flow.bijection.networks[0].weights[0] != flow.bijection.networks[1].weights[0])
    symmetric = jnp.concatenate([x, x * jnp.array([[1.0, -1.0]])])
    symmetric = jnp.concatenate([symmetric, -symmetric])
    loss = lambda flow: objectives.likelihood(flow, symmetric, None)[0]  # noqa: E731
    gradient = eqx.filter_jit(eqx.filter_grad(loss))(flow)
    assert (
        min(np.max(np.abs(network.weights[-1])) for network in gradient.bijection.networks) > 1e-3
    )


@pytest.mark.parametrize(("base", "spread"), [(StandardNormal, 1.0), (Logistic, np.pi / 3**0.5)])
def test_calibrated_latents_have_mean_0_and_the_spread_of_the_prior(base, spread):
    flow = nice(5, (8,), 3, base=base(5))  # odd: the parts have 3 and 2 components
    x = 7 + X * jnp.array([1e-3, 0.1, 1.0, 10.0, 100.0])[None]
    ready = calibrated(flow, x)
    h = transform(ready, x).value
    np.testing.assert_allclose(np.mean(h, axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.std(h, axis=0), spread, rtol=1e-9)
    np.testing.assert_allclose(in_numpy(ready, x), h, atol=1e-9)
    again = calibrated(ready, x)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(ready), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


def test_calibration_leaves_the_scale_of_what_never_varies():
    flow = eqx.tree_at(lambda f: f.bijection.log_scale, nice(3, (), 1), jnp.array([0.3, 0.4, 0.5]))
    x = X[:, :3].at[:, 1].set(0.1)  # its mean, and so its deviation, is rounded
    assert jnp.std(x[:, 1]) != 0
    ready = calibrated(flow, x)
    assert ready.bijection.log_scale[1] == 0.4
    h = np.asarray(transform(ready, x).value)
    np.testing.assert_allclose(np.mean(h, axis=0)[2], 0, atol=1e-12)  # one coupling shifts this
    np.testing.assert_allclose(np.std(h, axis=0)[[0, 2]], np.pi / 3**0.5, rtol=1e-12)


# Densities and samples


def test_samples_have_the_law():
    """Without hidden layers NICE is affine, so a normal base gives a Gaussian."""
    flow = nice(3, (), 3, base=StandardNormal(3), scale=0.4)
    mean, _, derivative, _ = jacobian(flow, jnp.zeros((1, 3)), "to_data")
    matrix = np.asarray(derivative[0])
    x, log_p = eqx.filter_jit(jcnf.sample_and_log_prob)(flow, jr.key(0), 4000)
    gaussian = stats.multivariate_normal(np.asarray(mean[0]), matrix @ matrix.T)
    np.testing.assert_allclose(log_p, gaussian.logpdf(x), atol=1e-10)
    np.testing.assert_allclose(log_prob(flow, x), log_p, atol=1e-10)
    drawn = np.linalg.solve(matrix, (np.asarray(x) - np.asarray(mean)).T)
    for column in drawn:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    assert np.max(np.abs(np.corrcoef(drawn) - np.eye(3))) < 4 / np.sqrt(4000)
    again = eqx.filter_jit(jcnf.sample)(flow, jr.key(0), 4000)
    assert again.shape == (4000, 3)
    assert np.max(np.abs(np.cov(again, rowvar=False) - gaussian.cov)) < 0.2 * gaussian.cov.max()


def test_the_gradient_is_that_of_finite_differences():
    params, static = eqx.partition(nice(), eqx.is_inexact_array)
    flat, unravel = ravel_pytree(params)
    direction = jnp.asarray(np.random.default_rng(5).normal(size=flat.shape))

    @jax.jit
    def loss(flat):
        return objectives.likelihood(eqx.combine(unravel(flat), static), X, None)[0]

    expected = slope(
        lambda h: float(loss(flat + h * direction)), 1e-5
    )  # away from the kinks of the ReLUs
    assert abs(expected) > 0.1
    assert jax.jit(jax.grad(loss))(flat) @ direction == pytest.approx(expected, rel=1e-6)


# The same tools


def test_everything_that_evaluates_flows_serves_them():
    flow, x = nice(2, (8,), 2), X[:, :2]
    expected = log_prob(flow, x)
    scores = evaluate.log_prob(flow, x, divergence=Hutchinson(), key=jr.key(0))
    np.testing.assert_allclose(scores.log_prob, expected, atol=1e-12)
    assert (scores.nfe, scores.failures) == (1, 0)
    drawn = evaluate.sample(flow, jr.key(1), 6)
    np.testing.assert_allclose(in_numpy(flow, drawn.x[-1]), drawn.x[0], atol=1e-12)
    np.testing.assert_array_equal(drawn.x[0], flow.base.sample(jr.key(1), 6))
    found = evaluate.accuracy_report(flow, x, extent=(-60.0, 60.0, -60.0, 60.0), cells=500)
    assert found.warnings() == []
    assert np.ptp(found.grid.log_prob) > 10
    figures = found.numerics()
    assert max(figures["roundtrip_error"], figures["log_prob_error_max"]) < 1e-12
    assert figures["nfe_forward"] == figures["nfe_backward"] == 1
    assert figures["mass"] == pytest.approx(1, abs=1e-4)


def test_a_sample_that_is_not_finite_fails_alone():
    x = X.at[2, 1].set(np.nan)
    failed = np.arange(6) == 2
    result = transform(nice(), x)
    np.testing.assert_array_equal(result.stats.failed, failed)
    with pytest.raises(ValueError, match=r"x has NaN or inf in 1 of 6 rows \(first: 2\)"):
        evaluate.log_prob(nice(), x)
    with pytest.raises(eqx.EquinoxRuntimeError, match="the flow failed for some rows"):
        log_prob(nice(), x)


@pytest.mark.parametrize("x64", [False, True])
def test_float32(x64):
    flow, x = astype((nice(split="odd_even"), X), jnp.float32)

    def everything(flow, x):
        loss = eqx.filter_value_and_grad(lambda flow: objectives.likelihood(flow, x, None)[0])
        return loss(flow), jcnf.transform(flow, x, direction="to_data")[:2]

    with jax.enable_x64(x64):
        leaves = jax.tree.leaves(eqx.filter_eval_shape(everything, flow, x))
        drawn = jax.eval_shape(lambda: jcnf.sample_and_log_prob(flow, jr.key(0), 3))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in drawn} == {jnp.dtype("float64" if x64 else "float32")}


def test_rounding_in_float32():
    flow, x = astype((nice(), X), jnp.float32)
    assert 0 < evaluate.roundtrip_error(flow, x) < 1e-5
    wide = log_prob(flow, X)  # the same numbers in float64
    assert wide.dtype == jnp.float64
    np.testing.assert_allclose(wide, log_prob(flow, x), atol=1e-4)


def test_a_program_is_compiled_once():
    traces = []

    @eqx.filter_jit
    def compiled(flow, x):
        traces.append(1)
        return jcnf.log_prob(flow, x)

    values = [compiled(nice(seed=seed), X) for seed in range(3)]
    assert len(traces) == 1
    assert len({float(v[0]) for v in values}) == 3


def test_a_run_directory_gives_its_flow_back(tmp_path):
    from experiments._runner.config import Run
    from experiments._runner.fields import Logistic
    from experiments._runner.run_dir import RunDir, load_flow
    from experiments.nice import Couplings, PlaneNICE

    couplings = Couplings(widths=(3,), couplings=2, split="odd_even", base=Logistic())
    settings = PlaneNICE(flow=couplings, run=Run(out=tmp_path))
    flow = jax.tree.map(lambda leaf: leaf + 0.5, settings.make_flow(2))
    RunDir("nice", settings).save_flow(flow, {})
    loaded, again, notes = load_flow(tmp_path, PlaneNICE)
    assert eqx.tree_equal(loaded, flow)
    assert again == settings
    assert (notes["dim"], notes["context_dim"]) == (2, 0)


# Errors


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_to_do():
    make = partial(NICE, key=jr.key(0))
    for settings in ({"dim": 1}, {"dim": 2, "couplings": 0}, {"dim": 2, "widths": (3, 0)}):
        with pytest.raises(
            ValueError, match=r"a whole number, at least|whole numbers, each at least 1"
        ):
            make(**settings)
    with pytest.raises(ValueError, match="unknown split 'odd': use one of halves, odd_even"):
        make(2, split="odd")
    with pytest.raises(ValueError, match="dim of the flow; got 3 and 2"):
        make(2, base=StandardNormal(3))
    flow = nice()
    with pytest.raises(ValueError, match="no path to penalize: remove kinetic"):
        jcnf.transform(flow, X, regularizers=(kinetic,))
    with pytest.raises(ValueError, match="random_end_time needs a flow whose bijection is an ODE"):
        objectives.likelihood(flow, X, jr.key(0), random_end_time=0.1)
    with pytest.raises(ValueError, match="takes a context of size 0; got 2"):
        jcnf.log_prob(flow, X, context=X[:, :2])
    with pytest.raises(ValueError, match="a trajectory needs a flow whose bijection is an ODE"):
        evaluate.trajectory(flow, X, jnp.linspace(0.0, 1.0, 3))


@pytest.mark.usefixtures("unchecked")
def test_a_bijector_of_other_events_is_refused():
    class Given(DistraxBijection):
        what: distrax.Bijector = eqx.field(static=True)

        def bijector(self):
            return self.what

    with pytest.raises(ValueError, match=r"1 dimension, in and out; got \(0, 0\): .*distrax.Block"):
        jcnf.log_prob(Flow(Given(distrax.ScalarAffine(0.0)), StandardNormal(5)), X)
    short = distrax.Lambda(
        lambda x: x[:, 1:], lambda y: y[:, 1:], lambda x: x[:, 0], lambda y: y[:, 0], 1, 1, False
    )
    with pytest.raises(ValueError, match=r"samples of shape \(6, 5\); got float64"):
        jcnf.log_prob(Flow(Given(short), StandardNormal(5)), X)
    scalar = distrax.Lambda(
        lambda x: x, lambda y: y, lambda x: 0.0 * x, lambda y: 0.0 * y, 1, 1, True
    )
    with pytest.raises(ValueError, match=r"log-dets of shape \(6,\); got float64"):
        jcnf.log_prob(Flow(Given(scalar), StandardNormal(5)), X)
