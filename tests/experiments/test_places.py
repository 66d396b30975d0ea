"""Places on the earth, their splits, and the models that flows on the sphere are compared with."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from experiments._tasks import sphere_models
from experiments._tasks.places import Places, read_places, to_degrees, to_points
from experiments._tasks.sphere_models import Mixture, fit_kernels, fit_mixture
from jcnf._checks import InputError
from jcnf.manifolds import Sphere, VonMisesFisher

POINTS, WEIGHTS = Sphere(2).quadrature(60)


def degrees(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.uniform(-90, 90, n), rng.uniform(-180, 180, n)], axis=1)


def clusters(n, seed=0):
    rng = np.random.default_rng(seed)
    x = np.eye(3)[rng.integers(0, 3, n)] + 0.1 * rng.normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_degrees_become_points_and_back():
    x = degrees(100)
    points = to_points(x)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    np.testing.assert_allclose(to_degrees(points), x, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        to_points(np.array([[90, 33], [0, 0], [0, 90]])), np.eye(3)[[2, 0, 1]], atol=1e-15
    )


@pytest.mark.parametrize("header", ["Latitude,LONGITUDE,x", "x,lat, lon", "lng,magnitude,lat"])
def test_columns_are_found_by_their_names_in_any_order(header, tmp_path):
    x, other = degrees(20), np.zeros(20)
    known = {"la": x[:, 0], "lo": x[:, 1], "ln": x[:, 1]}
    table = [known.get(name.strip().lower()[:2], other) for name in header.split(",")]
    path = tmp_path / "places.csv"
    lines = f"# from here\n{header}"
    np.savetxt(path, np.stack(table, 1), "%.8f", delimiter=",", header=lines, comments="")
    np.testing.assert_allclose(read_places(path).points, to_points(x), atol=1e-8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n3,4\n", "latitude.*a, b"),
        ("lat,latitude,lon\n1,2,3\n3,4,5\n", "one column.*lat"),
        ("lat,lon\n1,2\n91,4\n", "lat must.*91.*row 1|lat must.*91.*first: 1"),
        ("lat,lon\n1,2\n1,-181\n", "lon must.*-181"),
        ("lat,lon\n1,2\n1,\n", "lon.*row 2"),
        ("lat,lon\n1,2\n1,3\n", "2 rows are too few"),
    ],
)
def test_unusable_tables_are_refused(text, words, tmp_path):
    path = tmp_path / "places.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_places(path).split("random", 0)


def test_splits_are_disjoint_and_a_distinct_one_separates_places():
    x = np.repeat(degrees(50), np.arange(50) % 4 + 1, axis=0)
    x[:5, 1] = 180.0  # the same place as the next ones
    x[:5, 0] = x[5:10, 0] = 12.5
    x[5:10, 1] = -180.0
    places = Places.of(x)
    for protocol in ("random", "distinct"):
        split = places.split(protocol, 1)
        assert sorted(np.concatenate(split)) == list(range(len(x)))
        assert split.test.tolist() == places.split(protocol, 1).test.tolist()
        assert split.test.tolist() != places.split(protocol, 2).test.tolist()
        assert (len(places.split("random", 1).test) / len(x)) == pytest.approx(0.1, abs=0.01)
        known = {tuple(point) for point in places.points[split.train].round(9)}
        brute = np.mean([tuple(point) in known for point in places.points[split.test].round(9)])
        assert places.leaked(split) == brute
        assert (brute == 0) == (protocol == "distinct")


def test_concentrations_have_the_wanted_mean_lengths():
    r = np.array([0.001, 0.1, 0.5, 0.9, 0.999, 0.99999])
    k = np.asarray(sphere_models.concentration(jnp.asarray(r)))
    # The mean of cos(angle), by quadrature over the substitution cos = 1 - s / k.
    for length, one in zip(r, k, strict=True):
        s = np.linspace(0, min(2 * one, 40), 200_001)
        weight = np.exp(-s)
        assert (weight * (1 - s / one)).sum() / weight.sum() == pytest.approx(length, abs=1e-3)


def test_the_mixture_of_one_is_the_density_of_von_mises_and_fisher():
    for k in (0.3, 5.0, 500.0):
        one = Mixture(np.array([[0.6, 0, 0.8]]), np.array([k]), np.zeros(1))
        expected = VonMisesFisher([0.6, 0, 0.8], k).log_prob(POINTS)
        np.testing.assert_allclose(one.score(POINTS), expected, rtol=1e-9)


@pytest.mark.parametrize("fit", [partial(fit_mixture, seed=0), fit_kernels])
def test_fitted_models_integrate_to_one_and_are_near_the_truth(fit):
    fitted = fit(clusters(600), clusters(200, 1))
    assert WEIGHTS @ np.exp(fitted.score(POINTS)) == pytest.approx(1, abs=1e-3)
    test = clusters(500, 2)
    nll = -fitted.score(test).mean()
    # A third of the rows is about each axis, with about the concentration 1 / 0.1^2.
    truth = Mixture(np.eye(3), np.full(3, 100.0), np.full(3, -np.log(3.0)))
    assert -truth.score(test).mean() - 0.05 < nll < -truth.score(test).mean() + 0.15
