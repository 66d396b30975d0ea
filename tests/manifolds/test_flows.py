"""Flows on manifolds whose densities are known, and solves that stay on the manifold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TIGHT, T, astype, mlp
from manifold_table import AffineField, random_field
from scipy import linalg, stats

import jcnf
from jcnf import CNF, Hutchinson, Solve, evaluate
from jcnf.distributions import StandardNormal
from jcnf.fields import MinusIdentity, TimeRescaling
from jcnf.manifolds import (
    SO3,
    EmbeddedCoupling,
    Euclidean,
    Geodesic,
    Independent,
    Product,
    Sphere,
    TangentField,
    TangentProbes,
    Torus,
    Uniform,
    VonMisesFisher,
    WrappedNormal,
)
from jcnf.manifolds.rotations import GENERATORS
from jcnf.objectives import couplings, flow_matching, times

pytestmark = pytest.mark.optimized

MEAN, CONCENTRATION = np.array([0.48, -0.6, 0.64]), 3.0
RATE = np.array([0.7, -1.1, 0.5])
VMF = VonMisesFisher(MEAN, CONCENTRATION)
SPIN = np.tensordot(RATE, GENERATORS, 1)  # hat(RATE)


def tangent_flow(manifold, matrix, shift, base):
    size = manifold.embedding_dim
    matrix, shift = np.broadcast_to(matrix, (size, size)), np.broadcast_to(shift, size)
    field = AffineField(jnp.asarray(matrix, float), jnp.asarray(shift, float), size)
    return CNF(TangentField(field, manifold), base, t1=T)


def vmf(x):
    k = CONCENTRATION
    return k * (x @ MEAN) + np.log(k / (4 * np.pi * np.sinh(k)))


def toward(x, strength):
    """Carry points of S^2 back along the field P a, with a = strength e_3, from t=T.

    The height z follows dz/dt = a (1 - z^2). The log-det is that of z, because area is uniform in
    height and longitude (Archimedes).
    """
    z = x[:, 2]
    z0 = np.tanh(np.arctanh(z) - strength * T)
    ratio = np.sqrt((1 - z0**2) / (1 - z**2))
    return np.concatenate([ratio[:, None] * x[:, :2], z0[:, None]], axis=1), 2 * np.log(ratio)


def wrapped(x, loc, scale):
    images = 2 * np.pi * np.arange(-20, 21)
    densities = stats.norm(loc, scale).pdf(x[None] + images[:, None, None]).sum(axis=0)
    return np.log(densities).sum(axis=1)


def from_half_angles(angle, strength):
    """Return the angle from which dangle/dt = a sin(angle) comes, and d from / d angle."""
    start = 2 * np.arctan(np.exp(-strength * T) * np.tan(angle / 2))
    return start, np.sin(start) / np.sin(angle)


def circle_density(x):
    _, slope = from_half_angles(x[:, 0], 0.9)
    return np.log(slope / (2 * np.pi))


def class_density(x):
    """Density of a class function on SO(3): the angle has the volume element 1 - cos(angle)."""
    angle = np.arccos(np.clip((x[:, [0, 4, 8]].sum(axis=1) - 1) / 2, -1, 1))
    start, slope = from_half_angles(angle, 0.9)
    return np.log(slope * (1 - np.cos(start)) / (1 - np.cos(angle)) / (8 * np.pi**2))


def moebius_density(x):
    start, logdet = toward(x, 1.3)
    return vmf(start) + logdet


def product_density(x):
    y0 = x[:, 3] * np.exp(-0.7 * T) - 0.2 / 0.7 * (1 - np.exp(-0.7 * T))
    return moebius_density(x[:, :3]) + stats.norm.logpdf(y0) - 0.7 * T


def known(manifold, matrix, shift, base, density):
    return tangent_flow(manifold, matrix, shift, base), density


DRIFT, LOC, SCALE = np.array([1.9, -3.1]), np.array([2.5, -1.0]), np.array([0.4, 2.5])
TURN = np.block([[np.zeros((2, 2)), -np.diag(DRIFT)], [np.diag(DRIFT), np.zeros((2, 2))]])
SPHERE_AND_LINE = Product((Sphere(2), Euclidean(1)))
KNOWN = {
    "uniform": lambda: known(
        Sphere(2), 0, 0, Uniform(Sphere(2)), lambda x: np.full(len(x), -np.log(4 * np.pi))
    ),
    "rotation of the sphere": lambda: known(
        Sphere(2), SPIN, 0, VMF, lambda x: vmf(x @ linalg.expm(T * SPIN))
    ),
    "moebius map of the sphere": lambda: known(Sphere(2), 0, [0, 0, 1.3], VMF, moebius_density),
    "moebius map of the circle": lambda: known(
        Torus(1), 0, [-0.9, 0], Uniform(Torus(1)), circle_density
    ),
    "translation of the torus": lambda: known(
        Torus(2), TURN, 0, WrappedNormal(LOC, SCALE), lambda x: wrapped(x, LOC + T * DRIFT, SCALE)
    ),
    "rotation of rotations": lambda: known(
        SO3(),
        np.kron(np.eye(3), SPIN.T),
        0,
        Uniform(SO3()),
        lambda x: np.full(len(x), -np.log(8 * np.pi**2)),
    ),
    "class function of rotations": lambda: known(
        SO3(), 0, -0.9 * np.eye(3).reshape(9), Uniform(SO3()), class_density
    ),
    "sphere and line": lambda: known(
        SPHERE_AND_LINE,
        np.diag([0, 0, 0, 0.7]),
        [0, 0, 1.3, 0.2],
        Independent((VMF, StandardNormal(1))),
        product_density,
    ),
}


QUICK = {"rotation of the sphere", "uniform"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in KNOWN]
)
def test_the_density_is_the_known_one(name):
    flow, density = KNOWN[name]()
    x, log_prob = jcnf.sample_and_log_prob(flow, jr.key(0), 50, solve=TIGHT)
    np.testing.assert_allclose(log_prob, density(np.asarray(x)), rtol=0, atol=1e-8)
    again = jcnf.log_prob(flow, x, solve=TIGHT)
    np.testing.assert_allclose(again, log_prob, rtol=0, atol=1e-8)


def off_manifold(manifold, x):
    """Return how far the worst of the points (..., dim) is from the manifold."""
    x = np.asarray(x, np.float64).reshape(-1, manifold.dim)
    if isinstance(manifold, SO3):
        r = x.reshape(-1, 3, 3)
        return np.max(np.abs(r @ r.swapaxes(1, 2) - np.eye(3)))
    return np.max(np.abs(np.linalg.norm(x, axis=1) - 1))


@pytest.mark.parametrize(
    "solve",
    [
        pytest.param(Solve(), id="rk", marks=pytest.mark.slow),
        pytest.param(Solve(solver="euler", step=0.2), id="euler"),
    ],
)
@pytest.mark.parametrize(
    "manifold",
    [
        pytest.param(Sphere(2), id="sphere"),
        pytest.param(SO3(), id="rotations", marks=pytest.mark.slow),
    ],
)
def test_every_solve_ends_on_the_manifold_in_float32(manifold, solve):
    flow = astype(CNF(random_field(manifold), Uniform(manifold)), jnp.float32)
    z = flow.base.sample(jr.key(1), 100, jnp.float32)
    there = jcnf.transform(flow, z, direction="to_data", solve=solve)
    back = jcnf.transform(flow, there.value, solve=solve)
    times = jnp.linspace(0, 1, 4, dtype=jnp.float32)
    ends = [there.value, back.value, jcnf.trajectory(flow, z, times, solve=solve)]
    own_times = times[:, None] * jnp.linspace(0.5, 1, 100, dtype=jnp.float32)[None]
    ends += [jcnf.trajectory(flow, z, own_times, solve=solve)]
    for end in ends:
        assert end.dtype == jnp.float32
        assert off_manifold(manifold, end) < 1e-6
    assert not there.stats.failed.any()


def test_a_row_that_is_not_on_the_manifold_fails_alone():
    flow, density = KNOWN["moebius map of the sphere"]()
    x = Sphere(2).uniform(jr.key(2), 4)
    wrong = x.at[1].multiply(1.1)
    found = jcnf.transform(flow, wrong, solve=TIGHT)
    np.testing.assert_array_equal(found.stats.failed, [False, True, False, False])
    assert np.isnan(found.value[1]).all()
    log_prob = flow.base.log_prob(found.value) + found.logdet
    np.testing.assert_allclose(log_prob[2:], density(np.asarray(x))[2:], rtol=0, atol=1e-8)
    with pytest.raises(Exception, match="1 of 4 rows"):
        jcnf.log_prob(flow, wrong)
    assert np.isnan(evaluate.log_prob(flow, wrong).log_prob[1])


def test_wrappers_keep_the_manifold():
    field = TimeRescaling(random_field(Sphere(2)), 1.5)
    assert (
        field.manifold
        == Sphere(2)
        == jcnf.flows.Chain([jcnf.flows.ODE(field)], VMF).bijection.manifold
    )
    assert off_manifold(Sphere(2), jcnf.sample(CNF(field, VMF), jr.key(3), 50)) < 1e-12


@pytest.mark.parametrize(
    "manifold",
    [
        pytest.param(Sphere(2), id="sphere"),
        pytest.param(Torus(2), id="torus", marks=pytest.mark.slow),
        pytest.param(SO3(), id="rotations", marks=pytest.mark.slow),
    ],
)
def test_the_mass_is_one(manifold):
    flow = CNF(random_field(manifold, seed=1), Uniform(manifold))
    found = evaluate.quadrature(flow, 8 if isinstance(manifold, SO3) else 24)
    assert found.mass == pytest.approx(1, abs=1e-3)
    assert np.std(found.log_prob) > 0.1
    assert found.failures == found.unmeasured == 0


@pytest.mark.slow
def test_accuracy_report_measures_the_mass_and_the_round_trip():
    flow = CNF(random_field(Torus(2), seed=1), Uniform(Torus(2)))
    x = evaluate.sample(flow, jr.key(4), 50).x[-1]
    x[0] = np.pi  # carried back to -pi, the same angle
    report = evaluate.accuracy_report(flow, jnp.asarray(x), cells=16, reference_points=0)
    assert report.numerics()["mass"] == pytest.approx(1, abs=1e-3)
    assert report.roundtrip_error < 1e-3
    assert report.grid is None


@pytest.mark.slow
def test_flow_matching_along_geodesics_matches_their_velocity():
    # If all data are one point x1, the velocity at x is log_x(x1) / (1 - s), without error.
    manifold, end = Sphere(2), np.array([[0.0, 0.6, 0.8]])

    class Homing(AffineField):
        def __call__(self, t, x, context=None):
            return manifold.log(x, self.shift) / (1 - t)

    field = TangentField(Homing(jnp.zeros(()), jnp.asarray(end[0]), 3), manifold)
    flow, x = CNF(field, Uniform(manifold)), jnp.asarray(np.repeat(end, 64, axis=0))
    settings = {"path": Geodesic(manifold), "time": times.uniform}
    loss, _ = flow_matching(flow, x, jr.key(5), **settings)
    assert 0 <= loss < 1e-20
    coupling = EmbeddedCoupling(manifold, couplings.ExactOT())
    net = astype(CNF(random_field(manifold), Uniform(manifold)), jnp.float32)
    loss, gradient = eqx.filter_value_and_grad(
        lambda net: flow_matching(
            net, x.astype(jnp.float32), jr.key(6), coupling=coupling, **settings
        )[0]
    )(net)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda field: CNF(field, StandardNormal(3)), "must be on the same manifold; got Sphere"),
        (lambda field: CNF(mlp(3, (4,)), Uniform(Sphere(2))), "must be on the same manifold"),
        (lambda field: MinusIdentity(field), "must be in R\\^dim; got one on Sphere"),
        (
            lambda field: flow_matching(
                CNF(field, Uniform(Sphere(2))), Sphere(2).uniform(jr.key(0), 4), jr.key(1)
            ),
            "path must be one on the manifold of the flow",
        ),
        (
            lambda field: jcnf.log_prob(
                CNF(mlp(3, (4,)), StandardNormal(3)),
                jnp.ones((2, 3)),
                key=jr.key(0),
                divergence=TangentProbes(Hutchinson(), Sphere(2)),
            ),
            "field must be on Sphere",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_field(Sphere(2)))
