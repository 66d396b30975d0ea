"""The ten tasks of the benchmark of simulation-based inference, sbibm (Lueckmann et al. 2021).

Each simulator follows the specification in the paper's appendix T and the constants of sbibm 1.1.
A prior is independent in its parameters or a multivariate normal distribution.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key
from numpyro import distributions as dist

Parameters = Float[np.ndarray, "n dim"]
Data = Float[np.ndarray, "n data"]
ODE_BATCH = 1000


class Task(NamedTuple):
    """A prior, a simulator of rows of data for rows of parameters, and the names of its files."""

    prior: dist.Distribution
    simulate: Callable[[np.random.Generator, Parameters], Data]
    file: str  # of sbibm's observations and reference samples
    observations: str = "observation"  # the array in that file

    def simulator(self, key: Key[Array, ""], theta: Parameters) -> Data:
        """Simulate data for each row of parameters, as `jcnf.sbi.Simulator`. Consumes `key`."""
        return self.simulate(np.random.default_rng(np.asarray(jr.key_data(key))), theta)


def two_moons(rng, theta):
    """Return a point of a crescent, moved by |theta_1 + theta_2| and theta_2 - theta_1."""
    angle = rng.uniform(-np.pi / 2, np.pi / 2, len(theta))
    radius = rng.normal(0.1, 0.01, len(theta))
    crescent = np.stack([radius * np.cos(angle) + 0.25, radius * np.sin(angle)], axis=1)
    total, difference = theta.sum(axis=1), theta[:, 1] - theta[:, 0]
    return crescent + np.stack([-np.abs(total), difference], axis=1) / np.sqrt(2)


def gaussian_linear(rng, theta):
    """Return theta with independent noise of variance 0.1."""
    return theta + np.sqrt(0.1) * rng.normal(size=theta.shape)


def gaussian_mixture(rng, theta):
    """Return theta with noise of standard deviation 1 or 0.1, each with probability 1/2."""
    std = np.where(rng.random((len(theta), 1)) < 0.5, 1.0, 0.1)
    return theta + std * rng.normal(size=theta.shape)


def slcp(rng, theta):
    """Return four points of a normal distribution of which theta has mean and covariance.

    The name stands for a simple likelihood and a complex posterior.
    """
    first, second = theta[:, 2] ** 2, theta[:, 3] ** 2
    correlation = np.tanh(theta[:, 4])
    covariance = np.empty((len(theta), 2, 2))
    covariance[:, 0, 0], covariance[:, 1, 1] = first**2 + 1e-6, second**2 + 1e-6
    covariance[:, 0, 1] = covariance[:, 1, 0] = correlation * first * second
    root = np.linalg.cholesky(covariance)
    noise = rng.normal(size=(len(theta), 4, 2))
    return (theta[:, None, :2] + np.einsum("nij,nkj->nki", root, noise)).reshape(len(theta), 8)


def slcp_distractors(rng, theta):
    """Return the data of `slcp` among 92 numbers that say nothing, in an order that is fixed.

    The 92 are of a mixture of 20 Student distributions with 2 degrees of freedom.
    """
    loc, root, order = _distractors()
    which = rng.integers(len(loc), size=len(theta))
    normal = rng.normal(size=(len(theta), loc.shape[1]))
    noise = np.empty_like(normal)
    for i in range(len(loc)):
        noise[which == i] = normal[which == i] @ root[i].T
    noise /= np.sqrt(rng.chisquare(2, (len(theta), 1)) / 2)
    return np.concatenate([slcp(rng, theta), loc[which] + noise], axis=1)[:, order]


@cache
def _distractors():
    """Return the means, Cholesky factors and order, by the generator and the seed of sbibm."""
    rng, dim, count = np.random.RandomState(42), 92, 20
    loc = np.array([15 * rng.normal(size=dim) for _ in range(count)])
    root = [
        np.tril(rng.normal(size=(dim, dim))) + np.diag(np.exp(rng.normal(size=dim)))
        for _ in range(count)
    ]
    return loc, 3 * np.array(root), rng.permutation(dim + 8)


def bernoulli_glm_raw(rng, theta):
    """Return 100 spikes or none, of a neuron that filters a fixed stimulus."""
    rate = 1 / (1 + np.exp(-theta @ _design().T))
    return (rng.random(rate.shape) < rate).astype(float)


def bernoulli_glm(rng, theta):
    """Return the sufficient statistics: the number of spikes, and the stimulus before them."""
    return bernoulli_glm_raw(rng, theta) @ _design()


@cache
def _design():
    """Return the design matrix (100, 10): ones, and the stimulus with lags of 0 to 8."""
    stimulus = np.random.RandomState(42).randn(100).astype(np.float32).astype(float)
    lagged = [np.concatenate([np.zeros(lag), stimulus[: 100 - lag]]) for lag in range(9)]
    return np.stack([np.ones(100), *lagged], axis=1)


def _glm_prior():
    """Return N(0, B^-1), where the filter's precision favors small second differences."""
    count = 9
    difference = np.eye(count) - np.eye(count, k=-1)
    root = difference @ difference + np.diag(np.sqrt(np.arange(count) / count))
    precision = np.zeros((count + 1, count + 1))
    precision[0, 0] = 0.5
    precision[1:, 1:] = root.T @ root
    return dist.MultivariateNormal(jnp.zeros(count + 1), precision_matrix=jnp.asarray(precision))


def sir(rng, theta):
    """Return how many of 1,000 people are infected, at ten times in 160 days."""
    share = _solve("sir", theta)[:, :, 1]
    return rng.binomial(1000, np.clip(share, 0, 1)).astype(float)


def lotka_volterra(rng, theta):
    """Return ten counts of prey and then of predators, with log-normal noise of 0.1."""
    counts = np.clip(_solve("lotka_volterra", theta), 1e-10, 10_000)
    rows = np.moveaxis(counts, 2, 1).reshape(len(theta), 20)
    return np.exp(np.log(rows) + 0.1 * rng.normal(size=rows.shape))


def _solve(name, theta):
    """Return solutions (n, 10, species), computed in float64."""
    with jax.enable_x64(True):
        padded = np.pad(theta, [(0, -len(theta) % ODE_BATCH), (0, 0)], mode="edge")
        parts = [_solutions(name, part) for part in np.split(padded, len(padded) // ODE_BATCH)]
    return np.concatenate(parts)[: len(theta)]


# The times are those of sbibm: every 17th day, and every 21st tenth of a unit.
TIMES = {"sir": np.arange(10) * 17.0, "lotka_volterra": np.arange(10) * 2.1}
STARTS = {"sir": [1 - 1e-6, 1e-6], "lotka_volterra": [30.0, 1.0]}


def _sir_rate(t, y, rates):
    susceptible, infected = y
    new = rates[0] * susceptible * infected
    return jnp.stack([-new, new - rates[1] * infected])


def _lotka_volterra_rate(t, y, rates):
    prey, predators = y
    return jnp.stack(
        [
            (rates[0] - rates[1] * predators) * prey,
            (rates[3] * prey - rates[2]) * predators,
        ]
    )


RATES = {"sir": _sir_rate, "lotka_volterra": _lotka_volterra_rate}


@partial(jax.jit, static_argnums=0)
def _solutions(name, theta):
    times = TIMES[name]

    def one(rates):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(RATES[name]),
            diffrax.Tsit5(),
            times[0],
            times[-1],
            None,
            jnp.asarray(STARTS[name]),
            rates,
            saveat=diffrax.SaveAt(ts=jnp.asarray(times)),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9),
            max_steps=None,
        ).ys

    return jax.vmap(one)(theta)


def _box(dim, bound):
    return dist.Uniform(-bound * jnp.ones(dim), bound).to_event(1)


TASKS = {
    "two_moons": Task(_box(2, 1.0), two_moons, "two_moons"),
    "gaussian_mixture": Task(_box(2, 10.0), gaussian_mixture, "gaussian_mixture"),
    "gaussian_linear": Task(
        dist.Normal(jnp.zeros(10), np.sqrt(0.1)).to_event(1), gaussian_linear, "gaussian_linear"
    ),
    "gaussian_linear_uniform": Task(_box(10, 1.0), gaussian_linear, "gaussian_linear_uniform"),
    "bernoulli_glm": Task(_glm_prior(), bernoulli_glm, "bernoulli_glm"),
    "bernoulli_glm_raw": Task(_glm_prior(), bernoulli_glm_raw, "bernoulli_glm", "observation_raw"),
    "slcp": Task(_box(5, 3.0), slcp, "slcp"),
    "slcp_distractors": Task(_box(5, 3.0), slcp_distractors, "slcp", "observation_distractors"),
    "sir": Task(
        dist.LogNormal(jnp.log(jnp.array([0.4, 0.125])), jnp.array([0.5, 0.2])).to_event(1),
        sir,
        "sir",
    ),
    "lotka_volterra": Task(
        dist.LogNormal(jnp.array([-0.125, -3.0, -0.125, -3.0]), 0.5).to_event(1),
        lotka_volterra,
        "lotka_volterra",
    ),
}
