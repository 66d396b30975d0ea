"""Tests that the sampler, the density and the entropy of the two moons by class agree."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from jcnf.data import labeled_moons as moons
from jcnf.data.toys import toy


def cells(n):
    edges = np.linspace(-4.5, 4.5, n + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    points = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2)
    return jnp.asarray(points), (9 / n) ** 2


def test_entropy_is_that_of_the_density():
    points, area = cells(300)
    log_p = np.asarray(moons.log_prob(points, jnp.zeros(len(points), int)))
    p = np.exp(log_p)
    assert p.sum() * area == pytest.approx(1, abs=1e-8)
    assert -(p * np.where(p > 0, log_p, 0)).sum() * area == pytest.approx(moons.ENTROPY, abs=1e-6)


def test_classes_are_the_halves_of_the_toy():
    points, _ = cells(20)
    of_class = [moons.log_prob(points, jnp.full(len(points), label)) for label in range(2)]
    both = jax.nn.logsumexp(jnp.stack(of_class), axis=0) - jnp.log(2.0)
    np.testing.assert_allclose(both, toy("moons").log_prob(points), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("label", range(2))
def test_samples_are_of_their_class(label):
    x = moons.sample(jr.key(0), jnp.full(20_000, label))
    other = jnp.full(len(x), 1 - label)
    log_p = np.asarray(moons.log_prob(x, 1 - other))
    assert -log_p.mean() == pytest.approx(moons.ENTROPY, abs=4 * log_p.std() / len(x) ** 0.5)
    assert -np.asarray(moons.log_prob(x, other)).mean() > moons.ENTROPY + 5


def test_contexts_are_one_hot():
    np.testing.assert_array_equal(moons.one_hot(jnp.array([1, 0])), [[0, 1], [1, 0]])
