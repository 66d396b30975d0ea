"""Manifolds: exp, log, distance, projections, frames, volumes, and fields around them."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from manifold_table import MANIFOLDS, random_field

from jcnf.manifolds import SO3, TOLERANCE, Geodesic, Product, Sphere, Torus
from jcnf.objectives import paths

pytestmark = pytest.mark.optimized

COUNT = 200


@partial(jax.jit, static_argnums=(0, 1))  # compiled as one program
def points(manifold, seed=0):
    if isinstance(manifold, Product):  # of which the last part is a line
        *compact, _ = manifold.parts
        line = jr.normal(jr.key(seed), (COUNT, 1))
        return jnp.concatenate([Product(compact).uniform(jr.key(seed), COUNT), line], axis=1)
    return manifold.uniform(jr.key(seed), COUNT)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_exp_log_distance_and_geodesics_agree(name):
    manifold, times = MANIFOLDS[name], jnp.array([0.0, 0.3, 1.0])

    @jax.jit
    @jax.vmap
    def measured(x, y):
        velocity, distance = manifold.log(x, y), manifold.distance(x, y)
        end = manifold.exp(x, velocity)
        frame = manifold.frame(x)
        path = jax.vmap(lambda s: paths.velocity(Geodesic(manifold), s, x, y, x))
        at, speeds = path(times)
        off = jax.vmap(lambda x, y: manifold.embed(x) - manifold.embed(y))
        return {
            "tangent": velocity - manifold.tangent(x, velocity),
            "projection": manifold.tangent(x, y) - (frame @ y) @ frame,
            "frame": frame @ frame.T - jnp.eye(manifold.intrinsic_dim),
            "end": manifold.embed(end) - manifold.embed(y),
            "symmetric": distance - manifold.distance(y, x),
            "ends": off(at[::2], jnp.stack([x, y])),
            "half way": manifold.distance(x, manifold.exp(x, velocity / 2)) - distance / 2,
            "speed": jnp.linalg.norm(speeds, axis=1) - jnp.linalg.norm(velocity, keepdims=True),
            "distance": distance - scale * jnp.linalg.norm(velocity),
        }

    scale = 2**-0.5 if name == "rotations" else 1  # SO(3) measures angles
    for quantity, error in measured(points(manifold), points(manifold, 1)).items():
        assert np.max(np.abs(error)) < 1e-12, quantity


def test_the_distance_of_rotations_is_the_angle_between_them():
    angle = 3.0
    turn = [np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1]
    distance = jax.jit(SO3().distance)(jnp.eye(3).reshape(9), jnp.asarray(turn))
    assert distance == pytest.approx(angle)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_velocities_around_a_manifold_move_the_nearest_point_and_have_its_divergence(name):
    manifold, time = MANIFOLDS[name], jnp.asarray(0.3)
    field = random_field(manifold)

    @jax.jit
    @jax.vmap
    def measured(x, noise):
        on, trace = field.velocity_and_divergence(time, x)
        off = x + 0.1 * noise
        nearest = manifold.project(off)
        v, divergence = field.velocity_and_divergence(time, off)
        _, moved = jax.jvp(manifold.project, (off,), (v,))
        return {
            "on": on - field(time, x),
            "tangent": on - manifold.tangent(x, on),
            "off": v - field(time, off),
            "nearest point": moved - field(time, nearest),
            "normal": manifold.tangent(nearest, off - nearest),
            "trace": jnp.trace(jax.jacfwd(field, 1)(time, x)) - trace,
            "carried trace": divergence - field.velocity_and_divergence(time, nearest)[1],
        }, trace

    errors, trace = measured(points(manifold), jr.normal(jr.key(2), (COUNT, manifold.dim)))
    if name in ("torus", "product"):
        errors.pop("normal")  # the nearest angle is one of many
    assert np.mean(np.abs(trace)) > 1e-2
    for quantity, error in errors.items():
        assert np.max(np.abs(error)) < 1e-10, quantity


@pytest.mark.parametrize("name", MANIFOLDS)
def test_projection_puts_float32_points_on_the_manifold_and_refuses_others(name):
    manifold = MANIFOLDS[name]
    x = points(manifold).astype(jnp.float32)
    noise = jr.uniform(jr.key(3), x.shape, x.dtype, -1, 1)

    @jax.jit
    def project(x):
        return jax.vmap(lambda x: manifold.project(x, TOLERANCE))(x)

    near = project(x + 0.5 * TOLERANCE * noise)
    assert near.dtype == jnp.float32

    @jax.jit
    @jax.vmap
    def off(x):
        return manifold.embed(x) - manifold.embed(manifold.project(x))

    assert np.max(np.abs(off(near.astype(float)))) < 5e-7
    assert np.isnan(project(1.1 * x)).all() == (name != "torus")  # any number is an angle
    assert np.isnan(project(x * jnp.nan)).all()


def test_reflections_are_not_rotations():
    assert np.isnan(SO3().project(-jnp.eye(3).reshape(9))).all()


@pytest.mark.parametrize("name", MANIFOLDS)
def test_values_and_gradients_are_finite_at_equal_points_and_antipodes(name):
    manifold = MANIFOLDS[name]
    x = points(manifold).astype(jnp.float32)

    @jax.jit
    @jax.vmap
    def finite(x, y):
        y = manifold.project(y)

        def values(x, y):
            v = manifold.log(x, y)
            path = paths.velocity(Geodesic(manifold), jnp.float32(0.4), x, y, x)
            return jnp.concatenate([v, manifold.exp(x, v), *path, manifold.distance(x, y)[None]])

        rows = values(x, y), *jax.jacrev(values, argnums=(0, 1))(x, y)
        return jnp.stack([jnp.all(jnp.isfinite(row)) for row in rows]), jnp.sum(
            (manifold.embed(manifold.exp(x, manifold.log(x, y))) - manifold.embed(y)) ** 2
        )

    noise = jr.normal(jr.key(4), x.shape, x.dtype)
    # The antipodes of the first part, if they exist; half turns about axes for rotations.
    first = manifold.parts[0] if isinstance(manifold, Product) else manifold
    if isinstance(first, Sphere):
        far = x.at[:, : first.dim].multiply(-1)
    elif isinstance(first, SO3):
        half_turn = jnp.diag(jnp.array([1, -1, -1], x.dtype))
        far = jnp.einsum("nij,jk->nik", x.reshape(-1, 3, 3), half_turn).reshape(-1, 9)
    else:
        far = x + np.float32(np.pi)
    for y in (x, far):
        for size in (0, 1e-7, 1e-6, 1e-4, 1e-2):
            is_finite, error = finite(x, y + np.float32(size) * noise)
            assert np.all(is_finite), size
            assert np.max(error) < 1e-10, size


VOLUMES = {
    "circle": Sphere(1),
    "sphere": Sphere(2),
    "sphere in 5d": Sphere(4),
    "torus": Torus(2),
    "rotations": SO3(),
    "product": Product((Sphere(2), Torus(1))),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_uniform_points_and_quadratures_have_the_moments_of_the_volume(name):
    manifold = VOLUMES[name]
    size = manifold.embedding_dim

    def moments(x):
        e = np.asarray(jax.vmap(manifold.embed)(x))
        return np.concatenate([e, (e[:, :, None] * e[:, None]).reshape(len(e), -1)], axis=1)

    # By symmetry, the coordinates have mean 0, are not correlated and, within a part, have equal
    # squares with a known sum.
    squares = {"torus": [1 / 2] * 4, "product": [1 / 3] * 3 + [1 / 2] * 2}
    second = squares.get(name, [{"rotations": 3}.get(name, 1) / size] * size)
    expected = np.concatenate([np.zeros(size), np.diag(second).reshape(-1)])
    sampled = moments(manifold.uniform(jr.key(5), 4000))
    spread = sampled.std(axis=0) / np.sqrt(len(sampled))
    assert np.all(np.abs(sampled.mean(axis=0) - expected) < 4 * spread + 1e-12)
    rule = manifold.quadrature(6)
    assert (rule is None) == (name == "sphere in 5d")
    if rule is not None:
        nodes, weights = rule
        assert np.log(weights.sum()) == pytest.approx(manifold.log_volume, abs=1e-12)
        found = weights @ moments(jnp.asarray(nodes)) / weights.sum()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
