"""Evaluation: densities that integrate to 1, chunks, failures and baselines."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import MATRIX, NotANumber, T, Tally, Traced, affine, carried, linear, log_density, mlp
from scipy import stats

from jcnf import CNF, Solve, evaluate
from jcnf.distributions import Logistic, StandardNormal
from jcnf.fields import Field
from jcnf.ode import NUM_BINS

pytestmark = pytest.mark.optimized

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 3)))
CONTEXT = jnp.asarray(RNG.normal(size=(12, 2)))
EULER = Solve(solver="euler", step=T / 4)


@pytest.mark.parametrize(
    ("base", "extent"),
    [
        (StandardNormal, (-6.0, 10.0, -8.0, 5.0)),
        pytest.param(Logistic, (-20.0, 24.0, -21.0, 17.0), marks=pytest.mark.slow),
    ],
)
def test_density_integrates_to_one_on_a_grid(base, extent):
    flow = CNF(mlp(2, (8, 8), scale=3.0), base(2))
    grid = evaluate.grid(flow, extent, n=160)
    assert grid.failures == 0
    assert grid.log_prob.shape == (160, 160)
    # The test is only meaningful if the flow is far from the identity.
    near = np.exp(grid.log_prob) > 1e-3
    identity = np.reshape(flow.base.log_prob(grid.points), (160, 160))
    assert np.std((grid.log_prob - identity)[near]) > 1
    assert grid.mass == pytest.approx(1, abs=1e-3)


def test_grid_rows_are_y_and_columns_x():
    field = mlp(2, (), time="ignore")
    layer = eqx.tree_at(
        lambda m: (m.weight, m.bias), field.layers[0], (jnp.zeros((2, 2)), jnp.array([1.0, 2.0]))
    )
    flow = CNF(eqx.tree_at(lambda f: f.layers, field, (layer,)), StandardNormal(2))
    solve = Solve(solver="euler", step=1.0)
    grid = evaluate.grid(flow, (-4.0, 6.0, -6.0, 4.0), n=20, solve=solve)
    row, column = np.unravel_index(np.argmax(grid.log_prob), (20, 20))
    x, y = (evaluate.cell_centers(interval, 20) for interval in (grid.extent[:2], grid.extent[2:]))
    assert (abs(x[column] - 1), abs(y[row] - 2)) == (0.25, 0.25)
    np.testing.assert_array_equal(grid.points.reshape(20, 20, 2)[row, column], [x[column], y[row]])
    expected = stats.multivariate_normal([1, 2]).logpdf(grid.points)
    np.testing.assert_allclose(grid.log_prob.ravel(), expected, rtol=1e-12)


def test_scores_are_log_densities_in_chunks_of_one_program():
    tally = Tally()
    flow = CNF(Traced(affine().bijection.field, tally), StandardNormal(3), t1=T)
    scores = evaluate.log_prob(flow, X, context=CONTEXT, chunk=5)  # the last one is smaller
    traced = tally.count
    expected = log_density(X, CONTEXT)
    np.testing.assert_allclose(scores.log_prob, expected, atol=1e-4)
    assert scores.log_prob.shape == (12,)
    assert scores.failures == 0
    assert scores.nll == pytest.approx(-np.mean(scores.log_prob))
    assert scores.stderr == pytest.approx(stats.sem(scores.log_prob))
    other = jax.tree.map(lambda a: 0.5 * a, flow)
    rows = np.r_[0:12, 0:6]
    again = evaluate.log_prob(other, X[rows], context=CONTEXT[rows], chunk=5)
    np.testing.assert_array_equal(again.log_prob[:6], again.log_prob[12:])
    assert not np.allclose(again.log_prob[:12], expected)
    assert tally.count == traced > 0


class Burst(Field):
    """v = -g(t) x, where g integrates to 1.2 over the unit interval, nearly all near t = 0.4."""

    dim: int = 2

    def __call__(self, t, x, context=None):
        return -1.2 * jnp.exp(-0.5 * ((t - 0.4) / 0.06) ** 2) / (0.06 * (2 * np.pi) ** 0.5) * x


@pytest.mark.parametrize(
    "name", ["score", *(pytest.param(n, marks=pytest.mark.slow) for n in ("to_data", "to_base"))]
)
def test_many_chunks_take_the_steps_that_are_right_for_all(name):
    flow, rows = CNF(Burst(), StandardNormal(2)), jnp.asarray(RNG.normal(size=(9, 2)))
    x = jnp.concatenate([rows] * 4)

    def run(n, solve=evaluate.ACCURATE):
        if name == "score":
            found = evaluate.log_prob(flow, x[:n], chunk=9, solve=solve)
            return found.log_prob, found.nfe
        found = evaluate.transform(flow, x[:n], name, chunk=9, solve=solve)
        return found.x[-1], found.nfe

    (few, nfe_of_few), (many, nfe_of_many) = run(27), run(36)
    assert nfe_of_many < 0.8 * nfe_of_few
    np.testing.assert_array_equal(many, np.concatenate([many[:9]] * 4))
    z = np.asarray(rows) * np.exp(-1.2 if name == "to_data" else 1.2)
    exact = z if name != "score" else stats.norm.logpdf(z).sum(1) + 2 * 1.2
    for found in (few[:9], many[:9]):
        np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)
    # A given step plan is followed; a fixed-step solve, which follows none, has the same NFE.
    given = dataclasses.replace(evaluate.ACCURATE, step_plan=np.full(NUM_BINS, 0.5))
    assert run(36, given)[1] == 6 * 32 + 1
    fixed = Solve(solver="midpoint", step=1 / 8)
    assert run(36, fixed)[1] == run(27, fixed)[1] == 16


def test_one_of_a_few_rows_fails_alone():
    x = jnp.asarray(np.full((5, 2), 0.5)).at[2].set(3.0)
    scores = evaluate.log_prob(CNF(NotANumber(), StandardNormal(2)), x)
    assert np.flatnonzero(scores.failed).tolist() == [2]
    assert scores.stderr == 0


def test_a_row_that_fails_is_nan_and_fails_alone():
    flow = CNF(NotANumber(), StandardNormal(2))
    x = np.full((40, 2), 0.5)
    x[[5, 39]] = 3.0  # in the first of two chunks, and in the last, which is padded
    solve = Solve("bosh3", norm="worst")
    scores = evaluate.log_prob(flow, jnp.asarray(x), chunk=22, solve=solve)
    assert scores.failures == 2
    np.testing.assert_array_equal(np.flatnonzero(scores.failed), [5, 39])
    np.testing.assert_array_equal(np.isnan(scores.log_prob), scores.failed)
    expected = flow.base.log_prob(jnp.full((1, 2), 0.5 / np.e))[0] - 2
    np.testing.assert_allclose(scores.log_prob[~scores.failed], expected, atol=1e-4)
    assert np.isnan(scores.nll)
    path = evaluate.trajectory(flow, jnp.asarray(x), jnp.array([1.0, 0.0]), chunk=22, solve=solve)
    np.testing.assert_array_equal(path.failed, scores.failed)
    np.testing.assert_array_equal(np.isnan(path.x).any((0, 2)), scores.failed)


def test_transport_draw_and_roundtrip():
    times = np.array([0, 0.5, T])
    path = evaluate.trajectory(affine(), X, jnp.asarray(times), context=CONTEXT, chunk=5)
    exact = np.stack([carried(X, t, CONTEXT) for t in times])
    assert path.x.shape == (3, 12, 3)
    assert path.failures == 0
    np.testing.assert_allclose(path.x, exact, atol=2e-4)
    draws = evaluate.sample(linear(), jr.key(0), 12, solve=EULER)
    z = linear().base.sample(jr.key(0), 12)
    up, down = (np.linalg.matrix_power(np.eye(3) + h * MATRIX, 4) for h in (T / 4, -T / 4))
    np.testing.assert_allclose(draws.x, [z, z @ up.T], atol=1e-12)
    assert draws.nfe == 4
    # A round trip by Euler's method is not the identity, but its error is known.
    error = np.max(np.abs(X @ (up @ down).T - X))
    assert error > 0.01
    assert evaluate.roundtrip_error(linear(), X, solve=EULER) == pytest.approx(error, rel=1e-9)


def test_gaussian_nll_is_scipys():
    mixing = RNG.normal(size=(3, 3))
    train, test = RNG.normal(size=(500, 3)) @ mixing + 2, RNG.normal(size=(100, 3)) @ mixing + 1
    fitted = stats.multivariate_normal(train.mean(0), np.cov(train, rowvar=False, bias=True))
    expected = -np.mean(fitted.logpdf(test))
    assert evaluate.gaussian_nll(train, test) == pytest.approx(expected, rel=1e-12)
    single = evaluate.gaussian_nll(train[:, :1], test[:, :1])
    fitted = stats.norm(train[:, 0].mean(), train[:, 0].std())
    assert single == pytest.approx(-np.mean(fitted.logpdf(test[:, 0])), rel=1e-12)


def test_standard_error_is_scipys():
    values = RNG.normal(size=50)
    assert evaluate.standard_error(values) == pytest.approx(stats.sem(values), rel=1e-12)


def test_a_context_of_another_length_is_refused(unchecked):
    flow = CNF(mlp(2, (4,), context_dim=1), StandardNormal(2))
    for rows in (3, 7):
        with pytest.raises(ValueError, match=r"expected context of shape \(5, context\)"):
            evaluate.log_prob(flow, jnp.zeros((5, 2)), context=jnp.zeros((rows, 1)))


def test_gaussian_of_a_singular_covariance_has_no_density():
    x = np.random.default_rng(0).normal(size=(50, 2))
    assert np.isnan(evaluate.gaussian_nll(x[:, [0, 1, 0]], x[:, [0, 1, 0]]))


def gaussians(seed, n, shift=0.0):
    return np.random.default_rng(seed).normal([shift, 0.0], 1.0, (n, 2))


def test_mmd_is_that_of_its_definition():
    x, y = gaussians(0, 30), gaussians(1, 40, 0.5)
    distances = ((y[:, None] - y[None]) ** 2).sum(-1)
    median = np.median(distances)

    def mean_kernel(a, b):
        d = ((a[:, None] - b[None]) ** 2).sum(-1) / median
        return np.mean([np.exp(-d / (2 * s**2)) for s in (0.25, 0.5, 1, 2, 4)])

    square = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    assert evaluate.mmd(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(square**0.5, rel=1e-9)


def test_mmd_grows_with_the_shift_above_its_floor():
    y = jnp.asarray(gaussians(0, 1000))
    floor, near, far = (
        evaluate.mmd(jnp.asarray(gaussians(1, 1000, shift)), y) for shift in (0.0, 0.3, 1.0)
    )
    assert floor < (2 / 1000) ** 0.5 < near < far


@pytest.mark.parametrize("y", [jnp.ones((6, 2)), jnp.full((6, 2), jnp.nan)])
def test_mmd_is_never_nan(y):
    with pytest.raises(ValueError, match=r"y must vary|NaN or inf"):
        evaluate.mmd(jnp.zeros((5, 2)), y)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (1, 2)])
def test_mmd_refuses_what_is_no_pair_of_samples(shape, unchecked):
    with pytest.raises(ValueError, match="expected two samples"):
        evaluate.mmd(jnp.zeros(shape), jnp.zeros((5, 2)))


def test_a_grid_is_cropped_to_the_cells_in_its_middle():
    flow = CNF(mlp(2, (4,)), StandardNormal(2))
    whole = evaluate.grid(flow, (-2.0, 2.0, -4.0, 4.0), 8, solve=EULER)
    inner = evaluate.grid(flow, (-1.0, 1.0, -2.0, 2.0), 4, solve=EULER)
    found = whole.cropped(4)
    assert found.extent == inner.extent
    np.testing.assert_array_equal(found.points, inner.points)
    np.testing.assert_allclose(found.log_prob, inner.log_prob, atol=1e-4)
    assert found.mass == pytest.approx(inner.mass, rel=1e-4)
    assert 0 < found.mass < whole.mass
    with pytest.raises(ValueError, match="8 minus an even number; got cells=5"):
        whole.cropped(5)


def test_every_chunk_is_reported_to_whoever_asks():
    flow, x, told = CNF(mlp(2, (4,)), StandardNormal(2)), jnp.zeros((7, 2)), []
    with evaluate.reporting(lambda done, number: told.append((done, number))):
        evaluate.log_prob(flow, x, chunk=3, solve=EULER)
    evaluate.log_prob(flow, x, chunk=3, solve=EULER)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
