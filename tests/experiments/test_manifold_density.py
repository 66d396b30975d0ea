"""Known densities of angles and rotations, and the experiments on them, run whole but small."""

import json
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments import rotations, torus
from experiments._runner.config import Loop, Run, Training
from experiments._runner.fields import ResNet
from experiments._tasks.manifold_density import ManifoldMeasure
from jcnf.manifolds import SO3, Torus

SMALL = {
    "coupling": "independent",
    "field": ResNet(width=4, blocks=1),
    "training": Training(steps=4, batch=8),
    "loop": Loop(log_every=2, validate_every=4),
}


@pytest.mark.parametrize(
    ("density", "manifold", "n"), [(torus.DENSITY, Torus(2), 100), (rotations.DENSITY, SO3(), 20)]
)
def test_known_densities_have_mass_1_and_their_samples_follow_them(density, manifold, n):
    points, weights = manifold.quadrature(n)
    masses = weights * np.exp(density.log_prob(jnp.asarray(points)))
    assert masses.sum() == pytest.approx(1, abs=1e-3)
    samples = density.sample(jr.key(0), 20_000)
    # Their features are linear and quadratic in embedded points.
    found, expected = (
        np.concatenate([y, y**2, y[:, :1] * y], axis=1)
        for y in (np.asarray(jax.vmap(manifold.embed)(x)) for x in (samples, jnp.asarray(points)))
    )
    error = found.std(axis=0) / len(found) ** 0.5
    np.testing.assert_array_less(np.abs(found.mean(axis=0) - masses @ expected), 4.5 * error + 2e-3)


def test_the_density_of_angles_is_the_same_on_both_sides_of_the_seam():
    ends = [torus.DENSITY.log_prob(jnp.array([[at, 1], [0.5, at]])) for at in (-math.pi, math.pi)]
    np.testing.assert_allclose(*ends, atol=1e-12)


def run(experiment, settings):
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        experiment.run(settings)
    summary = json.loads((settings.run.out / "summary.json").read_text())
    figures = {path.stem for path in (settings.run.out / "figures").iterdir()}
    return summary, figures


def test_a_run_measures_the_gap_to_the_known_density(tmp_path):
    settings = torus.TorusFlow(
        **SMALL,
        measure=ManifoldMeasure(test_points=100, cells=20, samples=20, test_tolerance=1e-3),
        run=Run(out=tmp_path / "run"),
    )
    summary, figures = run(torus, settings)
    metrics, numerics = summary["metrics"], summary["numerics"]
    # The hardly trained flow is near its base, the uniform distribution.
    assert metrics["uniform_nll"] == pytest.approx(2 * math.log(2 * math.pi))
    assert metrics["test_nll"] == pytest.approx(metrics["uniform_nll"], abs=0.3)
    assert metrics["nll_gap"] > 0.5
    assert numerics["mass"] == pytest.approx(1, abs=1e-2)
    assert numerics["off_manifold"] < 1e-6
    assert numerics["nfe_sample"] > 0
    assert figures == {"densities", "training"}


@pytest.mark.slow
def test_a_table_of_angles_is_learned_in_its_unit(tmp_path):
    """Narrow angles near 0 raise the doubt that they are in radians."""
    x = np.random.default_rng(0).uniform(-3, 3, (100, 3))
    np.savetxt(tmp_path / "angles.csv", x, delimiter=",", header="a,b,c", comments="")
    settings = torus.TorusFlow(
        data=tmp_path / "angles.csv",
        **SMALL,
        measure=ManifoldMeasure(samples=20, test_tolerance=1e-3),
        run=Run(out=tmp_path / "run"),
    )
    with pytest.warns(UserWarning, match="--unit radians"):
        summary, figures = run(torus, settings)
    metrics = summary["metrics"]
    assert metrics["test_nll_original"] - metrics["test_nll"] == pytest.approx(
        3 * math.log(180 / math.pi)
    )
    assert metrics["uniform_nll"] == pytest.approx(3 * math.log(2 * math.pi))
    samples = np.loadtxt(tmp_path / "run" / "samples.csv", delimiter=",", skiprows=1)
    assert samples.shape == (20, 3)
    assert 90 < np.abs(samples).max() <= 180
    assert figures == {"pairs", "training"}
