"""Gaussian tails: the field itself on the data, and about that of a Gaussian far from them."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from field_table import drawn
from helpers import MATRIX, TIGHT, T, astype, mlp
from scipy import stats

import jcnf
from jcnf import CNF, evaluate
from jcnf.data.toys import toy
from jcnf.distributions import FullNormal, ScaledNormal, StandardNormal
from jcnf.fields import MLP, Field, GaussianTails, ResNet
from jcnf.objectives import flow_matching, paths
from jcnf.training import make_optimizer

MEAN = np.array([0.5, -1.0, 2.0])
COVARIANCE = MATRIX @ MATRIX.T + np.diag([0.2, 1.0, 0.5])
ROWS = np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 500)
PATHS = {"linear": paths.linear, "trigonometric": paths.trigonometric}


class Nothing(Field):
    """f = 0."""

    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        return jnp.zeros_like(x)


def random_net():
    return drawn(ResNet, 3, 16, 2, time_frequencies=2, scale=1.5)


def make(field, path, t1=1.0, **settings) -> CNF:
    field = GaussianTails(field, FullNormal.fit(ROWS), path, t1=t1, **settings)
    return CNF(field, StandardNormal(3), t1=t1)


class OfTheGaussian(Field):
    """The velocity of N(0, s^2 I) becoming the Gaussian of `ROWS` along a x0 + b x1 + c z."""

    path: Callable = eqx.field(static=True)
    t1: float = eqx.field(static=True, default=1.0)
    base_std: float = eqx.field(static=True, default=1.0)
    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        mean, covariance = jnp.asarray(ROWS.mean(axis=0)), jnp.asarray(np.cov(ROWS.T))

        def weights(s):
            return tuple(self.path(s, *unit) for unit in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)))

        def noise(s):
            return self.path(s, 0.0, 0.0, 1.0)

        s, eye = t / self.t1, jnp.eye(3)
        (a, b), (da, db) = jax.jvp(weights, (s,), (jnp.ones_like(s),))
        c, dc = jax.jvp(noise, (s,), (jnp.ones_like(s),))
        spread = (self.base_std**2 * a**2 + c**2) * eye + b**2 * covariance
        rate = (self.base_std**2 * a * da + c * dc) * eye + b * db * covariance
        return (db * mean + rate @ jnp.linalg.solve(spread, x - b * mean)) / self.t1


@pytest.mark.parametrize("base_std", [1.0, 3.0])
@pytest.mark.parametrize("path", PATHS)
def test_the_flow_of_a_gaussian_stays_that_of_the_gaussian(path, base_std):
    """If the field is the Gaussian's velocity on the data, it is so everywhere."""
    exact = OfTheGaussian(PATHS[path], T, base_std)
    field = make(exact, PATHS[path], T, base_std=base_std).bijection.field
    flow = CNF(field, ScaledNormal(3, base_std), T)
    law = stats.multivariate_normal(ROWS.mean(axis=0), np.cov(ROWS.T))
    x = jnp.asarray(np.concatenate([ROWS[:20], [[30.0, -20.0, 10.0]]]))
    found = eqx.filter_jit(jcnf.log_prob)(flow, x, solve=TIGHT)
    np.testing.assert_allclose(found, law.logpdf(x), rtol=1e-7)


@pytest.mark.parametrize("path", [paths.linear, paths.Stochastic(0.7)])
def test_the_velocity_of_the_gaussian_is_the_minimum_of_flow_matching(path):
    """The slope of the loss is 0 for a constant that is added to it."""
    gaussian = make(OfTheGaussian(path, T), path, T).bijection.field

    def loss(number, x, key):
        class Sum(Field):
            dim: int = eqx.field(static=True, default=3)

            def __call__(self, t, x, context=None):
                return gaussian(t, x) + number

        return flow_matching(CNF(Sum(), StandardNormal(3), T), x, key, path=path)[0]

    law = FullNormal.fit(ROWS)
    x = law.sample(jax.random.key(0), 40_000)
    least, slope = jax.jit(jax.value_and_grad(loss))(jnp.zeros(3), x, jax.random.key(1))
    error = 2 * np.sqrt(least / len(x))  # bound of the standard error of a slope, 2 mean(v - u)
    assert np.max(np.abs(slope)) < 4 * error < 0.2


def test_far_away_the_velocity_is_that_of_the_gaussian_and_a_bounded_one():
    """The network is given a point on an ellipsoid."""
    directions = jnp.asarray(np.random.default_rng(1).normal(size=(50, 3)))
    path = paths.linear
    fields = [make(random_net(), path).bijection.field, OfTheGaussian(path)]
    times, added = (0.1, 0.5, 0.95), {}

    @jax.jit
    def velocities(t, x):
        return [jax.vmap(functools.partial(field, t))(x) for field in fields]

    for radius in (1e4, 1e6):
        for t in times:
            found, gaussian = velocities(jnp.asarray(t), radius * directions)
            assert np.max(np.abs(gaussian)) > 0.1 * radius
            added[radius, t] = np.asarray(found - gaussian)
    for t in times:
        assert np.max(np.abs(added[1e6, t])) < 50
        assert np.max(np.abs(added[1e6, t])) > 0.1
        np.testing.assert_allclose(added[1e6, t], added[1e4, t], atol=0.1)


def test_on_the_data_the_field_is_nearly_its_own():
    """With a long reach, little is added."""
    net, x = random_net(), jnp.asarray(ROWS[:50])
    bare = jax.vmap(functools.partial(net, jnp.asarray(0.4)))(x)
    found = [
        jax.vmap(functools.partial(field, jnp.asarray(0.4)))(x)
        for reach in (100.0, 3.0)
        for field in (make(net, paths.linear, reach=reach).bijection.field,)
    ]
    errors = [float(np.sqrt(np.mean((v - bare) ** 2) / np.mean(bare**2))) for v in found]
    assert errors[0] < 1e-3 < errors[1]


def test_the_divergence_around_a_field_that_knows_its_jacobian_is_the_trace():
    field, t = make(random_net(), paths.linear).bijection.field, jnp.asarray(0.4)
    x = jnp.asarray(np.concatenate([ROWS[:5], 10 * ROWS[:5]]))
    found = jax.jit(jax.vmap(functools.partial(field.velocity_and_divergence, t)))(x)[1]
    traces = np.trace(jax.jit(jax.vmap(jax.jacfwd(functools.partial(field, t))))(x), 0, 1, 2)
    assert np.min(np.abs(traces)) > 1e-3
    np.testing.assert_allclose(found, traces, rtol=1e-9)


def test_the_divergence_is_finite_as_far_as_points_are():
    field = astype(make(random_net(), paths.linear).bijection.field, jnp.float32)
    v, divergence = field.velocity_and_divergence(
        jnp.float32(0.5), jnp.float32([1e25, 1e30, -1e35])
    )
    assert np.isfinite([*v, divergence]).all()


def test_what_the_network_is_given_is_within_reach():
    class Told(Field):
        """f = x, what it is given."""

        dim: int = eqx.field(static=True, default=3)

        def __call__(self, t, x, context=None):
            return x

    flow, bare = (make(f, paths.linear, reach=2.0).bijection.field for f in (Told(), Nothing()))
    law, t = flow.reference, jnp.asarray(0.3)
    mean = 0.3 * np.asarray(law.mean)
    std = np.sqrt(0.7**2 + (0.3 * np.asarray(law.std)) ** 2)
    x = np.array([MEAN]) + np.array([[0.01, 0.02, -0.01], [1.0, -2.0, 0.5], [1e5, 3e4, -1e5]])
    y = np.asarray(x - mean[None]) @ np.asarray(law.basis) / std[None]
    y = y / (1 + (np.sum(y**2, axis=1) / (3 * 2.0**2)) ** 2)[:, None] ** 0.25
    assert np.linalg.norm(y[2]) == pytest.approx(2 * np.sqrt(3), rel=1e-6)
    expected = mean[None] + (y * std[None]) @ np.asarray(law.basis).T
    found = [flow(t, row) - bare(t, row) for row in jnp.asarray(x)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_log_density_falls_along_rays():
    flow = make(random_net(), paths.trigonometric)
    directions = np.random.default_rng(2).normal(size=(8, 3))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    radii = np.array([1.0, 5, 10, 20, 50, 100]) * np.sqrt(np.linalg.eigvalsh(COVARIANCE)[-1])
    x = MEAN + radii[:, None, None] * directions
    scores = evaluate.log_prob(flow, jnp.asarray(x.reshape(-1, 3)))
    assert not np.any(scores.failed)
    found = np.asarray(scores.log_prob).reshape(len(radii), 8)
    assert np.all(np.diff(found[2:], axis=0) < -1)
    # A bounded velocity moves rows by a bounded distance, in standard deviations.
    gaussian = stats.multivariate_normal(MEAN, COVARIANCE).logpdf(x)
    moved = np.sqrt(-2 * found) - np.sqrt(-2 * gaussian)
    assert np.max(np.abs(moved)) < 25
    assert np.max(np.abs(moved)) > 1


def test_the_reference_is_not_trained():
    flow = make(mlp(3, (4,)), paths.linear)

    def loss(flow):
        return flow_matching(flow, jnp.asarray(ROWS[:16]), jax.random.key(0))[0]

    gradient = eqx.filter_grad(loss)(flow).bijection.field
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient.field))
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient.reference))


def test_float32_in_float32_out():
    flow = astype(make(mlp(3, (4,)), paths.trigonometric), jnp.float32)
    t, x = jnp.asarray(0.3, jnp.float32), jnp.asarray(ROWS[0], jnp.float32)
    v, divergence = flow.bijection.field.velocity_and_divergence(t, x)
    assert v.dtype == divergence.dtype == jnp.float32


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": StandardNormal(3)}, "reference must be a jcnf.distributions.FullNormal"),
        ({"reference": FullNormal([0.0], [[1.0]])}, "must have the same dim; got 3 and 1"),
        ({"path": "linear"}, "path must be a function"),
        ({"path": paths.SigmaMin}, "path must be a function"),
        ({"reach": 0.0}, "reach must be positive"),
        ({"t1": -1.0}, "t1 must be positive"),
        ({"base_std": 0.0}, "base_std must be positive"),
        ({"field": MLP}, "field must be"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    good = {"field": Nothing(), "reference": FullNormal.fit(ROWS), "path": paths.linear}
    with pytest.raises(ValueError, match=message):
        GaussianTails(**good | settings)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_trained_flow_is_tame_far_from_the_data(seed):
    """Solves stay short up to 100 radii, and the log-density falls along rays."""
    eight = toy("8gaussians")
    data = np.asarray(eight.sample(jax.random.key(99), 5000))
    net = ResNet(2, 64, 2, time_frequencies=4, key=jax.random.key(seed))
    field = GaussianTails(net, FullNormal.fit(data), paths.linear)
    with jax.numpy_dtype_promotion("standard"):  # for optax's Adam
        flow = jcnf.fit(
            CNF(field, StandardNormal(2)),
            eight.sample,
            key=jax.random.key(seed + 100),
            steps=2000,
            batch=512,
            optimizer=make_optimizer(1e-2, 2000, clip=10.0),
            validation=None,
            progress=False,
        ).flow
    test = eight.sample(jax.random.key(7), 2000)
    on_data = evaluate.log_prob(flow, test)
    assert -0.01 < np.mean(eight.log_prob(test)) - np.mean(on_data.log_prob) < 0.1
    angles = np.linspace(0, 2 * np.pi, 33)[:-1]
    rays = np.linalg.norm(data, axis=1).max() * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    before = np.full(len(rays), np.inf)
    for radius in (1, 2, 5, 10, 100):
        far = evaluate.log_prob(flow, jnp.asarray(radius * rays))
        assert far.failures == 0
        assert far.nfe <= 2 * on_data.nfe
        assert np.all(far.log_prob < before)
        before = far.log_prob


# The reference


@pytest.mark.parametrize("rank", [3, 2])
def test_a_full_normal_is_scipys(rank):
    """A covariance without full rank gets the least variance."""
    factor = np.random.default_rng(3).normal(size=(3, rank))
    law = FullNormal(MEAN, factor @ factor.T)
    variances = np.linalg.eigvalsh(factor @ factor.T)
    expected = np.maximum(variances, 1e-9 * variances[-1])
    np.testing.assert_allclose(law.std, np.sqrt(expected), rtol=1e-6)
    x = MEAN + np.random.default_rng(4).normal(size=(20, rank)) @ factor.T
    basis = np.asarray(law.basis)
    whole = stats.norm.logpdf((x - MEAN) @ basis, scale=np.sqrt(expected)).sum(axis=1)
    found = law.log_prob(jnp.asarray(x))
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    if rank == 3:
        exact = stats.multivariate_normal(MEAN, factor @ factor.T).logpdf(x)
        np.testing.assert_allclose(found, exact, rtol=1e-9)
    with jax.enable_x64(False):
        single = FullNormal(MEAN, factor @ factor.T).log_prob(jnp.asarray(x, jnp.float32))
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, whole, rtol=0.02 if rank == 2 else 1e-3)


def test_samples_of_a_full_normal_follow_it():
    x = np.asarray(FullNormal(MEAN, COVARIANCE).sample(jax.random.key(0), 4000))
    error = np.sqrt(np.diag(COVARIANCE) / 4000)
    assert np.all(np.abs(x.mean(axis=0) - MEAN) < 4 * error)
    whitened = np.linalg.solve(np.linalg.cholesky(COVARIANCE), (x - MEAN).T)
    np.testing.assert_allclose(np.cov(whitened), np.eye(3), atol=4 * np.sqrt(2 / 4000))


def test_fit_takes_the_moments_of_rows():
    law = FullNormal.fit(ROWS)
    np.testing.assert_allclose(law.mean, ROWS.mean(axis=0), rtol=1e-12)
    covariance = (law.basis * law.std[None] ** 2) @ law.basis.T
    np.testing.assert_allclose(covariance, np.cov(ROWS.T), rtol=1e-10)
    assert FullNormal.fit(ROWS[:, :1]).dim == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FullNormal(MEAN, np.eye(2)), r"got \(3,\) and \(2, 2\)"),
        (lambda: FullNormal([MEAN], np.eye(1)), "expected a mean of shape"),
        (lambda: FullNormal(MEAN * np.nan, COVARIANCE), "mean has NaN or inf"),
        (lambda: FullNormal(MEAN, COVARIANCE * np.nan), "covariance has NaN or inf"),
        (lambda: FullNormal(MEAN, np.zeros((3, 3))), "covariance must have a positive variance"),
        (lambda: FullNormal(MEAN, -COVARIANCE), "covariance must"),
        (lambda: FullNormal(MEAN[:2], [[1.0, 2.0], [2.0, 1.0]]), "covariance must"),
        (lambda: FullNormal(MEAN[:2], [[1.0, 0.5], [0.0, 1.0]]), "covariance must be symmetric"),
        (lambda: FullNormal.fit(ROWS[0]), r"expected x of shape \(n, dim\)"),
        (lambda: FullNormal.fit(ROWS[:1]), "at least 2"),
        (lambda: FullNormal.fit(np.ones((4, 2))), "covariance must have a positive variance"),
    ],
)
def test_a_bad_full_normal_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
