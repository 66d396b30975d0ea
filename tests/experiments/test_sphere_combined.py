"""The mixture of densities on the sphere, with weights by validation."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments._tasks.sphere_combined import Combined, candidates, combine, merge
from experiments._tasks.sphere_models import Mixture, adaptive_kernels, kernels
from jcnf import CNF, Solve
from jcnf.fields import ResNet
from jcnf.manifolds import Sphere, TangentField, Uniform

SOLVE = Solve()
POINTS, WEIGHTS = Sphere(2).quadrature(40)
NARROW = Mixture(np.eye(3)[:2], np.full(2, 20.0), np.log([0.25, 0.75]))
WIDE = Mixture(np.eye(3)[2:], np.ones(1), np.zeros(1))


@pytest.fixture(scope="module")
def flow():
    """An untrained flow, whose density is uniform."""
    net = ResNet(3, 4, 1, key=jr.key(0))
    return CNF(TangentField(net, Sphere(2)), Uniform(Sphere(2)))


def test_merged_mixtures_have_the_density_of_their_mixture():
    merged = merge([(NARROW, 0.2), (WIDE, 0.6)])
    expected = np.logaddexp(
        NARROW.score(POINTS) + np.log(1 / 4), WIDE.score(POINTS) + np.log(3 / 4)
    )
    np.testing.assert_allclose(merged.score(POINTS), expected, rtol=1e-6)


def test_a_combined_density_is_the_weighted_sum_and_has_mass_one(flow):
    combined = Combined(NARROW, flow, 0.3)
    p = np.exp(combined.score(POINTS, SOLVE))
    np.testing.assert_allclose(p, 0.7 * np.exp(NARROW.score(POINTS)) + 0.3 / (4 * np.pi), rtol=1e-5)
    assert WEIGHTS @ p == pytest.approx(1, abs=1e-3)


def test_samples_of_a_combined_density_have_its_mean(flow):
    combined = Combined(NARROW, flow, 0.3)
    x = combined.sample(jr.key(1), 20_000, SOLVE)
    assert x.shape == (20_000, 3)
    expected = (WEIGHTS * np.exp(combined.score(POINTS, SOLVE))) @ POINTS
    error = x.std(axis=0) / len(x) ** 0.5
    np.testing.assert_array_less(np.abs(x.mean(axis=0) - expected), 4 * error)


def test_the_weights_are_those_that_made_the_validation_rows(flow):
    x = np.asarray(Combined(NARROW, flow, 0.3).sample(jr.key(2), 4000, SOLVE))
    combined, weights = combine({"narrow": NARROW, "wide": WIDE}, flow, x, SOLVE)
    assert set(weights) == {"narrow", "flow"}
    assert combined.share == weights["flow"] == pytest.approx(0.3, abs=0.04)


def test_adaptive_kernels_are_as_wide_as_their_neighbors_are_far():
    x = np.array([[1, 0, 0], [np.cos(0.1), np.sin(0.1), 0], [0, 0, 1.0], [0, 0, 1.0]])
    found = adaptive_kernels(x, 1, 0.5)
    chord = 2 * np.sin(0.05)
    order = np.argsort(found.means[:, 2])  # the pole, which occurs twice, is last
    np.testing.assert_allclose(found.concentrations[order][:2], (0.5 * chord) ** -2, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.log_weights[order]), [1 / 4, 1 / 4, 1 / 2], rtol=1e-6)
    assert found.concentrations[order][2] == pytest.approx(2, rel=1e-5)


def test_candidates_are_densities_of_the_rows():
    x = np.asarray(NARROW.sample(jr.key(3), 200))
    found = candidates(x)
    broad = [m for m in found.values() if np.max(m.concentrations) < 200]
    assert broad
    for mixture in broad:
        assert WEIGHTS @ np.exp(mixture.score(np.asarray(POINTS))) == pytest.approx(1, abs=5e-3)
    assert kernels(x, 100.0).score(x[:1]) == pytest.approx(
        float(found["kernels of concentration 100"].log_prob(jnp.asarray(x[:1]))[0]), rel=1e-5
    )
