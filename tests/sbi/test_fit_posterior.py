"""Posteriors from simulations: a problem with a known posterior, files, embeddings and errors.

The fits are few and short: each compiles its own training program.
"""

from contextlib import contextmanager

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from jcnf import sbi
from jcnf._checks import InputError
from jcnf.sklearn import mixture

pytestmark = pytest.mark.usefixtures("as_users_have_jax")

PRIOR = sbi.box([0.0, -2.0], [1.0, 2.0])
STD = np.array([0.1, 0.3])
X = np.array([0.05, 0.4])  # whose posterior ends at a bound
CALL = {"key": jr.key(1), "steps": 200, "progress": False}


def generator(key):
    return np.random.default_rng(np.asarray(jr.key_data(key)))


def simulator(key, theta):
    return theta + STD * generator(key).normal(size=theta.shape)


def simulations(n=800, simulator=simulator, prior=PRIOR):
    return sbi.simulate(prior, simulator, n, key=jr.key(0), progress=False)


@contextmanager
def small():
    """Fit two narrow networks and two normal distributions, which takes a third of the time."""
    of = mixture.Plan.of
    changes = {"width": 32, "folds": 2, "weight_decays": (0.3,), "encoder_layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture.Plan, "of", lambda *given: of(*given)._replace(**changes))
        patch.setattr(mixture, "NORMALS", (2,))
        yield


@pytest.fixture(scope="module")
def posterior():
    with small():
        return sbi.fit_posterior(PRIOR, simulations(), **CALL)


@pytest.fixture(scope="module")
def draws(posterior):
    return posterior.sample(jr.key(2), 5000, X)


def test_samples_are_inside_the_support_and_near_the_posterior(draws):
    assert draws.shape == (5000, 2)
    assert PRIOR.contains(draws).all()
    low, high = (0 - X[0]) / STD[0], (1 - X[0]) / STD[0]
    first = stats.truncnorm(low, high, loc=X[0], scale=STD[0])
    assert abs(draws[:, 0].mean() - first.mean()) < 0.03
    assert abs(draws[:, 1].mean() - X[1]) < 0.1


def test_density_has_mass_one_inside_the_support(posterior):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    grid = np.stack(np.meshgrid((nodes + 1) / 2, 2 * nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.exp(posterior.log_prob(grid, X)) @ np.outer(weights, weights).ravel()
    assert mass == pytest.approx(1, abs=1e-3)  # the box has 4 times the area of half the nodes' one
    outside = np.array([[-0.1, 0.0], [0.5, 2.1], [0.5, 2.0]])
    np.testing.assert_array_equal(posterior.log_prob(outside, X), -np.inf)


def test_log_density_is_log_prob_and_has_its_gradient(posterior, draws):
    function = posterior.log_density(X)
    log_density = jax.jit(function)
    theta = draws[:50].astype(np.float32)
    np.testing.assert_allclose(
        log_density(theta), posterior.log_prob(theta, X), rtol=1e-4, atol=1e-4
    )
    gradient = jax.jit(jax.grad(lambda theta: function(theta).sum()))(theta[:5])
    with jax.enable_x64(True):
        for column, step in enumerate(1e-3 * STD):
            change = step * np.eye(2)[column]
            ends = (posterior.log_prob(theta[:5] + sign * change, X) for sign in (1, -1))
            slope = (next(ends) - next(ends)) / (2 * step)
            np.testing.assert_allclose(gradient[:, column], slope, rtol=0.03, atol=0.3)


@pytest.mark.slow
def test_map_beats_every_sample(posterior, draws):
    best = posterior.map(jr.key(3), X)
    assert PRIOR.contains(best[None]).all()
    (found,) = posterior.log_prob(best[None], X)
    assert found > posterior.log_prob(draws[:500], X).max() - 1e-3


def test_importance_weights_give_the_evidence_and_the_posterior(posterior):
    # Not at a bound, where the learned density is much too small at a few points: the weights then
    # have heavy tails, and no standard error holds.
    x = np.array([0.5, 0.4])
    found = posterior.importance(
        jr.key(4), 4000, x, lambda theta: stats.norm(theta, STD).logpdf(x).sum(axis=1)
    )
    inside = stats.norm(x, STD).cdf([1, 2]) - stats.norm(x, STD).cdf([0, -2])
    exact = np.log(np.prod(inside) / 4)
    assert abs(found.log_evidence - exact) < 4 * found.log_evidence_stderr
    assert found.log_evidence_stderr < 0.05
    assert 400 < found.effective_size <= 4000
    again = found.resample(jr.key(5), 4000)
    error = 4 * STD * np.sqrt(1 / found.effective_size + 1 / 4000)
    assert np.all(np.abs(again.mean(axis=0) - x) < error)


def test_many_data_are_taken_in_turn(posterior):
    x = np.array([[0.2, -1.0], [0.8, 1.0], X])
    theta = posterior.sample(jr.key(6), 300, x)
    assert theta.shape == (3, 300, 2)
    assert np.abs(theta.mean(axis=1) - x).max() < 0.2
    rows = theta[:, 0]
    each = [posterior.log_prob(row[None], one)[0] for row, one in zip(rows, x, strict=True)]
    np.testing.assert_allclose(posterior.log_prob(rows, x), each, atol=1e-4)


def test_predictive_draws_run_the_simulator(posterior):
    found = posterior.predictive(jr.key(7), 500, X, simulator)
    assert found.x.shape == found.theta.shape == (500, 2)
    assert np.abs((found.x - found.theta).std(axis=0) / STD - 1).max() < 0.15


def test_loaded_posterior_is_the_same(posterior, draws, tmp_path):
    posterior.save(tmp_path / "posterior.jcnf")
    loaded = sbi.Posterior.load(tmp_path / "posterior.jcnf", PRIOR)
    np.testing.assert_array_equal(loaded.sample(jr.key(2), 5000, X), draws)
    assert loaded.density.history_ == posterior.density.history_
    with pytest.raises(InputError, match="other parameters or supports"):
        sbi.Posterior.load(tmp_path / "posterior.jcnf", sbi.box([0, 0], [1, 1]))
    with pytest.raises(InputError, match="no embedding"):
        sbi.Posterior.load(
            tmp_path / "posterior.jcnf", PRIOR, embedding=lambda key: sbi.SetEmbedding(1)
        )


def test_history_has_losses_and_held_out_scores(posterior):
    history = posterior.density.history_
    assert history[-1]["step"] == 200
    assert all(np.isfinite(record["loss"]) for record in history)
    assert history[-1]["held_out_nll"] < history[0]["held_out_nll"]


@pytest.mark.slow
def test_set_embedding_does_not_depend_on_the_order(tmp_path):
    def many(key, theta):
        return theta[:, None, None] + generator(key).normal(size=(len(theta), 8, 1))

    def embedding(key):
        return sbi.SetEmbedding(1, features=4, width=16, key=key)

    prior = sbi.box([-3.0], [3.0])
    found = simulations(400, lambda key, theta: many(key, theta[:, 0]), prior)
    with small():
        posterior = sbi.fit_posterior(prior, found, embedding=embedding, **CALL)
    x, theta = found.x[0], np.linspace(-2, 2, 9)[:, None]
    log_prob = posterior.log_prob(theta, x)
    np.testing.assert_allclose(posterior.log_prob(theta, x[::-1]), log_prob, atol=1e-4)
    assert np.abs(log_prob - posterior.log_prob(theta, x + 1)).max() > 0.1
    log_density = eqx.filter_jit(posterior.log_density(x))
    np.testing.assert_allclose(log_density(theta.astype(np.float32)), log_prob, atol=1e-3)
    posterior.save(tmp_path / "set.jcnf")
    loaded = sbi.Posterior.load(tmp_path / "set.jcnf", prior, embedding=embedding)
    np.testing.assert_array_equal(loaded.log_prob(theta, x), log_prob)
    with pytest.raises(InputError, match="expected x of shape"):
        posterior.sample(jr.key(0), 3, x[:, 0])


@pytest.mark.slow
def test_rounds_simulate_within_the_region_of_the_last_posterior():
    with small():
        posterior, kept = sbi.fit_in_rounds(PRIOR, simulator, X, 400, rounds=2, **CALL)
    assert 400 < len(kept.theta) < 800  # those of the first round that are in the region, and 400
    spread = kept.theta[-400:].std(axis=0)
    assert np.all(spread < 0.8 * np.array([1, 4]) / np.sqrt(12))
    draws = posterior.sample(jr.key(0), 2000, X)
    assert abs(draws[:, 1].mean() - X[1]) < 0.1
    # The region holds almost all of the true posterior.
    exact = X + STD * np.random.default_rng(0).normal(size=(20_000, 2))
    exact = exact[PRIOR.contains(exact)]
    low, high = kept.theta[-400:].min(axis=0), kept.theta[-400:].max(axis=0)
    assert np.mean(((exact < low) | (exact > high)).any(axis=1)) < 0.05


# Simulations


def test_simulations_are_determined_by_the_key_and_run_in_batches():
    sizes = []

    def counting(key, theta):
        sizes.append(len(theta))
        return simulator(key, theta)[:, 0]

    found = sbi.simulate(PRIOR, counting, 250, key=jr.key(0), batch=100, progress=False)
    again = sbi.simulate(PRIOR, counting, 250, key=jr.key(0), batch=100, progress=False)
    assert sizes == [100, 100, 50] * 2
    assert found.x.shape == (250, 1)  # a number for each row becomes a column
    np.testing.assert_array_equal(found.x, again.x)
    assert len(np.unique(found.x)) == 250  # each batch has a key of its own
    first, others = found.split(50)
    assert (len(first.x), len(others.theta)) == (50, 200)


def test_failing_simulator_keeps_the_batches_before():
    def failing(key, theta):
        if theta[:, 0].max() > 0.99:
            raise RuntimeError("negative rate")
        return theta

    with pytest.raises(sbi.SimulatorError, match="negative rate") as caught:
        sbi.simulate(PRIOR, failing, 300, key=jr.key(0), batch=10, progress=False)
    done, theta = caught.value.simulations, caught.value.theta
    assert len(done.theta) % 10 == 0
    assert done.theta[:, 0].max() <= 0.99 < theta[:, 0].max()


def test_simulator_with_wrong_shapes_is_refused():
    with pytest.raises(InputError, match=r"shape \(3, 2\) for 100 parameters"):
        simulations(100, lambda key, theta: theta[:3])
    with pytest.raises(InputError, match=r"expected \(50, 2\)"):
        sbi.simulate(
            PRIOR,
            lambda key, theta: theta if len(theta) == 100 else theta[:, :1],
            150,
            key=jr.key(0),
            batch=100,
            progress=False,
        )


def test_simulations_that_are_nan_are_left_out_with_a_warning():
    theta = PRIOR.sample(jr.key(0), 500)
    x = simulator(jr.key(1), theta)
    x[theta[:, 0] > 0.9] = np.nan
    missing = np.sum(theta[:, 0] > 0.9)
    with small(), pytest.warns(UserWarning, match=f"{missing} of 500 simulations have NaN"):
        posterior = sbi.fit_posterior(PRIOR, (theta, x), key=jr.key(1), steps=20, progress=False)
    assert np.isfinite(posterior.density.held_out_nll_)
    with pytest.raises(InputError, match="all simulations have NaN"):
        sbi.fit_posterior(PRIOR, (theta, np.full_like(x, np.nan)), key=jr.key(1))


def test_parameters_that_are_not_of_the_prior_are_refused(posterior):
    theta, x = simulations(100)
    with pytest.raises(InputError, match="of 100 parameters are outside the support"):
        sbi.fit_posterior(PRIOR, (theta + 0.5, x), key=jr.key(0))
    with pytest.raises(InputError, match="expected parameters"):
        sbi.fit_posterior(PRIOR, (theta[:, :1], x), key=jr.key(0))
    with pytest.raises(InputError, match="expected x of shape"):
        posterior.sample(jr.key(0), 10, np.zeros(3))
    with pytest.raises(InputError, match="expected parameters"):
        posterior.log_prob(np.zeros(2), X)
    with pytest.raises(ValueError, match="key"):
        posterior.sample(0, 10, X)
