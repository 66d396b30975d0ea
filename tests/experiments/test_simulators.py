"""The simulators of sbibm against closed forms, moments and another ODE solver."""

import jax
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from experiments._tasks import simulators
from experiments._tasks.simulators import TASKS

RNG = np.random.default_rng
COLUMNS = {
    "two_moons": (2, 2),
    "gaussian_mixture": (2, 2),
    "gaussian_linear": (10, 10),
    "gaussian_linear_uniform": (10, 10),
    "bernoulli_glm": (10, 10),
    "bernoulli_glm_raw": (10, 100),
    "slcp": (5, 8),
    "slcp_distractors": (5, 100),
    "sir": (2, 10),
    "lotka_volterra": (4, 20),
}


@pytest.fixture(scope="module", autouse=True)
def _as_users_have_jax():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def assert_means(found, expected):
    """Check means over rows within 4.5 standard errors."""
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - expected), 4.5 * error + 1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_for_the_same_key(name):
    task, (dim, columns) = TASKS[name], COLUMNS[name]
    theta = np.asarray(task.prior.sample(jr.key(0), (3,)), np.float64)
    assert theta.shape == (3, dim)
    x = task.simulator(jr.key(1), theta)
    assert x.shape == (3, columns)
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(x, task.simulator(jr.key(1), theta))
    assert (x != task.simulator(jr.key(2), theta)).any()


def test_two_moons_have_a_crescent_at_the_shifted_place():
    theta = np.array([0.3, -0.7])
    x = simulators.two_moons(RNG(0), np.tile(theta, (20_000, 1)))
    crescent = x - [-0.4 / np.sqrt(2) + 0.25, -1 / np.sqrt(2)]
    radius, angle = np.hypot(*crescent.T), np.arctan2(*crescent.T[::-1])
    features = np.stack([radius, (radius - 0.1) ** 2, angle, angle**2, np.cos(angle)], axis=1)
    assert_means(features, [0.1, 1e-4, 0, np.pi**2 / 12, 2 / np.pi])


def test_two_moons_posterior_density_has_mass_1():
    """By polar coordinates, p(x | theta) is N(radius; 0.1, 0.01) / (pi radius).

    The two crescents of the posterior are mirrored, so that p(x) is 2/4 where both are in the box.
    """
    cells = 500
    axis = -1 + (np.arange(cells) + 0.5) * 2 / cells
    theta = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    u = -0.25 + np.abs(theta.sum(axis=1)) / np.sqrt(2)
    v = -(theta[:, 1] - theta[:, 0]) / np.sqrt(2)
    radius = np.hypot(u, v)
    normal = np.exp(-0.5 * ((radius - 0.1) / 0.01) ** 2) / (0.01 * np.sqrt(2 * np.pi))
    likelihood = np.where(u > 0, normal / (np.pi * radius), 0)
    evidence = likelihood.mean()  # of x = 0, by the midpoint rule
    assert evidence == pytest.approx(1 / 2, rel=5e-3)

    # The simulator has the same density of x near 0.
    rng = RNG(1)
    x = simulators.two_moons(rng, rng.uniform(-1, 1, (200_000, 2)))
    near = (np.hypot(*x.T) < 0.15)[:, None]
    assert_means(near.astype(float), np.pi * 0.15**2 / 2)


def test_gaussian_simulators_have_the_right_variances():
    theta = np.tile(np.linspace(-1, 1, 10), (20_000, 1))
    noise = simulators.gaussian_linear(RNG(0), theta) - theta
    assert_means(np.concatenate([noise, noise**2], axis=1), [0.0] * 10 + [0.1] * 10)
    noise = simulators.gaussian_mixture(RNG(0), theta[:, :2]) - theta[:, :2]
    # Both coordinates have the same component: E a^2 b^2 is the mean of sigma^4.
    features = np.stack([*(noise**2).T, (noise**2).prod(axis=1)], axis=1)
    assert_means(features, [0.505, 0.505, (1 + 1e-4) / 2])


def test_slcp_has_the_mean_and_covariance_of_its_parameters():
    theta = np.tile([0.7, -2.9, -1.0, 0.9, 0.6], (20_000, 1))
    points = simulators.slcp(RNG(0), theta).reshape(-1, 4, 2)
    a, b = (points - [0.7, -2.9]).reshape(-1, 2).T
    features = np.stack([a, b, a**2, b**2, a * b], axis=1)
    assert_means(features, [0, 0, 1, 0.81**2, np.tanh(0.6) * 0.81])
    first, second = (points[:, i] - [0.7, -2.9] for i in (0, 3))
    assert_means(first * second, [0, 0])  # the points are independent


def test_distractors_surround_the_data_of_slcp_in_sbibms_order():
    loc, root, order = simulators._distractors()
    assert order[:8].tolist() == [87, 47, 39, 9, 25, 21, 26, 94]
    assert loc[0, 0] == pytest.approx(15 * 0.4967141530112327)  # the first normal of seed 42
    assert (loc[19, 91], root[0, 0, 0]) == pytest.approx((-3.12175286, 3.42332472))
    assert sorted(order) == list(range(100))
    theta = np.tile([0.7, -2.9, 1.0, 0.9, 0.6], (2000, 1))
    x = simulators.slcp_distractors(RNG(0), theta)
    places = [22, 33, 23, 67, 42, 21, 16, 90]
    assert_means(x[:, places], [0.7, -2.9] * 4)
    # The others are about one of 20 means, each as often.
    others = np.delete(x, places, axis=1)
    expected = np.delete(np.concatenate([np.zeros(8), np.median(loc, axis=0)])[order], places)
    assert np.abs(np.median(others, axis=0) - expected).mean() < 5
    assert np.abs(others).max() > 1000  # Student's distribution has no variance


def test_the_summary_of_spikes_is_their_sufficient_statistic():
    theta = np.tile(np.linspace(-1, 1, 10), (2000, 1))
    raw = simulators.bernoulli_glm_raw(RNG(0), theta)
    summary = simulators.bernoulli_glm(RNG(0), theta)
    design = simulators._design()
    assert set(np.unique(raw)) == {0.0, 1.0}
    assert_means(raw, 1 / (1 + np.exp(-design @ theta[0])))
    np.testing.assert_array_equal(summary[:, 0], raw.sum(axis=1))

    # The log-likelihood of spikes differs from theta @ summary by what no spike changes.
    def log_likelihood(theta):
        logits = design @ theta
        return raw @ logits - np.logaddexp(0, logits).sum()

    other = RNG(1).normal(size=10)
    change = log_likelihood(other) - log_likelihood(theta[0]) - summary @ (other - theta[0])
    assert np.ptp(change) < 1e-10
    # Each column is the stimulus, one step later than the last.
    np.testing.assert_array_equal(design[1:, 2:], design[:-1, 1:-1])


def test_the_prior_of_the_filter_is_that_of_the_paper():
    """Lueckmann et al. 2021, T.5: N(0, 2) for the offset, N(0, (F^T F)^-1) for the filter."""
    factor = np.zeros((9, 9))
    for i in range(9):
        factor[i, i] = 1 + np.sqrt(i / 9)
        if i >= 1:
            factor[i, i - 1] = -2
        if i >= 2:
            factor[i, i - 2] = 1
    prior, theta = TASKS["bernoulli_glm"].prior, RNG(0).normal(size=(4, 10))
    expected = -(theta[:, 0] ** 2) / 4 - ((theta[:, 1:] @ factor.T) ** 2).sum(axis=1) / 2
    found = np.asarray(prior.log_prob(theta)) - np.asarray(prior.log_prob(np.zeros(10)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


RATES = {
    "sir": lambda t, y, p: [-p[0] * y[0] * y[1], p[0] * y[0] * y[1] - p[1] * y[1]],
    "lotka_volterra": lambda t, y, p: [
        p[0] * y[0] - p[1] * y[0] * y[1],
        -p[2] * y[1] + p[3] * y[0] * y[1],
    ],
}
CASES = {
    "sir": ([0.999999, 1e-6], 17.0, [[0.4, 0.125], [1.2, 0.1], [0.2, 0.3]]),
    "lotka_volterra": (
        [30.0, 1.0],
        2.1,
        [[0.88, 0.05, 0.88, 0.05], [2.0, 0.02, 0.5, 0.1], [0.3, 0.15, 1.5, 0.03]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_solutions_are_those_of_scipy(name):
    start, gap, theta = CASES[name]
    found = simulators._solve(name, np.array(theta))
    for rates, states in zip(theta, found, strict=True):
        times = gap * np.arange(10)
        expected = solve_ivp(
            RATES[name],
            (0, times[-1]),
            start,
            "LSODA",
            times,
            args=(rates,),
            rtol=1e-10,
            atol=1e-14,
        ).y.T
        # Prey that fall to 1e-7 and grow again are known to 0.4 %, beside noise of 10 %, and the
        # infected to 0.02 %, beside the noise of a count out of 1,000.
        rtol, atol = {"sir": (5e-4, 1e-7), "lotka_volterra": (5e-3, 1e-9)}[name]
        np.testing.assert_allclose(states, expected, rtol=rtol, atol=atol)


def test_noise_of_the_ode_tasks_is_binomial_and_log_normal():
    theta = np.tile([0.4, 0.125], (2000, 1))
    share = simulators._solve("sir", theta[:1])[0, :, 1]
    infected = simulators.sir(RNG(0), theta)
    assert_means(infected[:, 2:6], 1000 * share[2:6])
    variances = (infected[:, 2:6] - 1000 * share[2:6]) ** 2
    assert_means(variances, 1000 * share[2:6] * (1 - share[2:6]))

    theta = np.tile([0.88, 0.05, 0.88, 0.05], (2000, 1))
    counts = simulators._solve("lotka_volterra", theta[:1])[0]
    logs = np.log(simulators.lotka_volterra(RNG(0), theta))
    assert_means(logs, np.log(counts.T.ravel()))  # prey first
    assert_means((logs - np.log(counts.T.ravel())) ** 2, 0.01)
