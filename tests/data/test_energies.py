"""Tests of energies (published formulas), and of density matching (exact Gaussians)."""

import importlib
import sys
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    CONTEXT_MATRIX,
    MATRIX,
    SHIFT,
    TIGHT,
    Linear,
    NotANumber,
    T,
    affine,
    astype,
    carried,
    linear,
    slope,
)
from scipy import integrate, linalg, special

from jcnf import CNF, Hutchinson, Solve, regularizers
from jcnf._checks import InputError
from jcnf.data import energies
from jcnf.data.energies import ENERGIES, Energy, energy
from jcnf.distributions import StandardNormal
from jcnf.objectives import reverse_kl

NAMES = list(ENERGIES)
MEAN = np.array([0.4, -0.2, 0.7])
PRECISION = np.array([[1.5, 0.3, 0.0], [0.3, 0.8, -0.2], [0.0, -0.2, 2.0]])


def published(name, z1, z2):
    """Return U as in Rezende & Mohamed (2015), table 1, plus the wall."""
    w1, w2 = np.sin(2 * np.pi * z1 / 4), 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 * special.expit((z1 - 1) / 0.3)
    wall = 0.5 * (np.maximum(np.abs(z1) - 4, 0) / 0.4) ** 2
    with np.errstate(divide="ignore"):
        return {
            "u1": lambda: (
                0.5 * ((np.hypot(z1, z2) - 2) / 0.4) ** 2
                - np.log(
                    np.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z1 + 2) / 0.6) ** 2)
                )
            ),
            "u2": lambda: wall + 0.5 * ((z2 - w1) / 0.4) ** 2,
            "u3": lambda: (
                wall
                - np.log(
                    np.exp(-0.5 * ((z2 - w1) / 0.35) ** 2)
                    + np.exp(-0.5 * ((z2 - w1 + w2) / 0.35) ** 2)
                )
            ),
            "u4": lambda: (
                wall
                - np.log(
                    np.exp(-0.5 * ((z2 - w1) / 0.4) ** 2)
                    + np.exp(-0.5 * ((z2 - w1 + w3) / 0.35) ** 2)
                )
            ),
        }[name]()


@pytest.mark.parametrize("name", NAMES)
def test_energies_are_as_published_and_have_gradients_everywhere(name):
    axis = np.linspace(-5.5, 5.5, 45)  # through 0
    x = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    u = jax.jit(ENERGIES[name].function)
    np.testing.assert_allclose(u(jnp.asarray(x)), published(name, *x.T), rtol=1e-11, atol=1e-11)

    def both(x):
        return jax.value_and_grad(lambda x: jnp.sum(ENERGIES[name].function(x)))(x)

    h = 1e-5
    _, gradient = jax.jit(both)(jnp.asarray(x))
    moved = (published(name, x[:, 0] + s * h, x[:, 1]) for s in (1, -1))
    away = np.hypot(*x.T) > 0.1
    expected = np.subtract(*moved) / (2 * h)
    np.testing.assert_allclose(gradient[away, 0], expected[away], rtol=1e-5, atol=1e-4)
    # Also in float32, far out, where the exponentials of the formula underflow.
    far = jnp.asarray([[0.0, 0.0], [1e3, -1e3], [-3e4, 2e4], [1.0, 900.0]], jnp.float32)
    assert all(jnp.all(jnp.isfinite(a)) for a in jax.jit(both)(far))
    assert u(far).dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_log_z_by_another_quadrature(name):
    axis = np.linspace(-8.5, 8.5, 851)
    p = np.exp(-published(name, axis[:, None], axis))
    expected = np.log(integrate.simpson(integrate.simpson(p, x=axis), x=axis))
    found = energies.integrate(ENERGIES[name], cells=400)
    assert found.log == pytest.approx(expected, abs=1e-6)
    assert found.border < 1e-6
    narrow = Energy(name, ENERGIES[name].function, (-2.0, 2.0, -2.0, 2.0))
    assert energies.integrate(narrow, cells=100).border > 1e-2


def gaussian(mean=MEAN, precision=PRECISION):
    """Return U of N(mean, precision^-1), with log Z = (d log 2 pi - log|precision|) / 2."""

    def u(x):
        d = x - jnp.asarray(mean, x.dtype)[None]
        return 0.5 * jnp.einsum("ni,ij,nj->n", d, jnp.asarray(precision, x.dtype), d)

    return u


def kl_up_to_log_z(matrix, mean=MEAN, shift=0.0):
    """Return the exact E_q[log q + U] for q = N(shift, e^{TA} e^{TA}')."""
    propagator = linalg.expm(T * matrix)
    d = mean - shift
    entropy = 1.5 * np.log(2 * np.pi * np.e) + T * np.trace(matrix)
    return 0.5 * (np.trace(PRECISION @ propagator @ propagator.T) + d @ PRECISION @ d) - entropy


# Points with mean 0 and covariance I: any quadratic has the same mean over them as over N(0, I).
SIGMA = jnp.asarray(np.sqrt(3) * np.concatenate([np.eye(3), -np.eye(3)]))


def test_reverse_kl_of_a_gaussian_and_its_gradient():
    @jax.jit
    def both(flow):
        def loss(flow):
            return reverse_kl(flow, SIGMA, energy=gaussian(), solve=TIGHT)

        return eqx.filter_value_and_grad(loss, has_aux=True)(flow)

    (value, metrics), gradient = both(linear())
    assert value == pytest.approx(kl_up_to_log_z(MATRIX), abs=1e-8)
    assert metrics["reverse_kl"] == value
    assert metrics["nfe"] > 0
    assert not metrics["failed"]
    for i, j in ((0, 0), (1, 0), (0, 2)):
        direction = np.zeros((3, 3))
        direction[i, j] = 1
        expected = slope(lambda h, d=direction: kl_up_to_log_z(MATRIX + h * d))
        assert gradient.bijection.field.matrix[i, j] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_reverse_kl_with_context_penalties_and_an_estimated_divergence():
    """The energy gets the context, penalties are weighted, and the key determines the noise."""
    c = jnp.asarray([0.3, -0.8])
    contexts = jnp.broadcast_to(c, (6, 2))
    target = gaussian(np.zeros(3))

    def shifted(x, context):
        return target(x - context @ jnp.asarray(CONTEXT_MATRIX).T)

    @jax.jit
    def both(flow, key):
        settings = {"context": contexts, "solve": TIGHT, "energy": shifted}
        plain = reverse_kl(flow, SIGMA, **settings)
        other = reverse_kl(
            flow,
            SIGMA,
            key,
            **settings,
            divergence=Hutchinson(),
            regularizers={regularizers.kinetic: 0.3, regularizers.directional: 0.0},
        )
        return plain, other

    (value, _), (loss, metrics) = both(affine(), jr.key(0))
    # q = N(shift, .), where shift is the image of the origin.
    shift = carried(np.zeros((1, 3)), context=np.asarray(c)[None])[0]
    expected = kl_up_to_log_z(MATRIX, CONTEXT_MATRIX @ np.asarray(c), shift)
    assert value == pytest.approx(expected, abs=1e-8)
    assert SHIFT.any()
    assert metrics["kinetic"] > 0
    assert abs(loss - metrics["reverse_kl"] - 0.3 * metrics["kinetic"]) < 1e-12
    assert abs(metrics["reverse_kl"] - expected) > 1e-6


def test_a_failed_solve_and_bad_arguments(unchecked):
    def named(field, t, x, context, local):
        return jnp.zeros(())

    named.__name__ = "reverse_kl"
    wild = CNF(NotANumber(), StandardNormal(2))
    x = jnp.array([[0.1, 0.1], [0.9, 0.2]])
    u = gaussian(np.zeros(2), np.eye(2))
    solve = Solve(max_steps=20)
    assert jax.jit(lambda x: reverse_kl(wild, x, energy=u, solve=solve)[1]["failed"])(x)
    column = partial(reverse_kl, linear(), energy=lambda x: gaussian()(x)[:, None])
    with pytest.raises(ValueError, match=r"values of shape \(6,\); got \(6, 1\).*jax.vmap"):
        jax.eval_shape(column, SIGMA)
    with pytest.raises(ValueError, match=r"shape \(batch, 3\); got \(3,\)"):
        reverse_kl(linear(), SIGMA[0], energy=gaussian())
    with pytest.raises(ValueError, match="rename reverse_kl"):
        reverse_kl(linear(), SIGMA, energy=gaussian(), regularizers={named: 1.0})


def gaussian_kl(p, q):
    """Return KL(p || q) of centered Gaussians with covariances `p` and `q`."""
    ratio = np.linalg.solve(q, p)
    return 0.5 * (np.trace(ratio) - len(p) - np.log(np.linalg.det(ratio)))


@pytest.mark.parametrize("matched", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_figures_of_a_match(matched, monkeypatch):
    """A flow equal to the target has ESS 1 and zero KL; another has the values of two Gaussians."""
    from experiments import energy as experiment

    n, cells = 2025, 45  # as many cells as samples, to share a compiled program
    monkeypatch.setattr(experiment, "CELLS", cells)
    matrix = np.array([[0.2, -0.5], [0.4, 0.1]])
    q = linalg.expm(T * matrix) @ linalg.expm(T * matrix).T
    p = q if matched else 0.7 * q + 0.05 * np.eye(2)
    flow = CNF(Linear(jnp.asarray(matrix), 2), StandardNormal(2), t1=T)
    target = Energy("gaussian", gaussian(np.zeros(2), np.linalg.inv(p)), (-9.0, 9.0, -9.0, 9.0))
    integral = energies.integrate(target, cells=100)
    log_z = 0.5 * np.linalg.slogdet(2 * np.pi * p)[1]
    assert integral.log == pytest.approx(log_z, abs=1e-9)
    solve = Solve(rtol=1e-7, atol=1e-7)
    found = experiment.measure(flow, target, integral, jr.key(0), n, solve)
    metrics = found.metrics
    assert len(found.samples) == n
    assert not found.failures
    assert found.report.grid.mass == pytest.approx(1, abs=1e-6)
    reverse, forward = gaussian_kl(q, p), gaussian_kl(p, q)
    assert abs(metrics["reverse_kl"] - reverse) <= 4 * metrics["reverse_kl_stderr"] + 1e-5
    assert metrics["forward_kl"] == pytest.approx(forward, abs=1e-5)
    # 1 / E_q[(p / q)^2]
    second = 2 * np.linalg.inv(p) - np.linalg.inv(q)
    moment = np.sqrt(np.linalg.det(q) / np.linalg.det(second)) / np.linalg.det(p)
    assert metrics["ess"] == pytest.approx(1 / moment, abs=1e-5 if matched else 0.03)
    error = abs(metrics["log_z_importance"] - log_z)
    assert error <= 4 * metrics["log_z_importance_stderr"] + 1e-5
    assert (metrics["reverse_kl"] < 1e-4) == (metrics["ess"] > 0.9999) == matched


OWN = """
import jax
import jax.numpy as jnp
import numpy as np

number = 3.0

def bowl(x):
    return 0.5 * jnp.sum(x**2, axis=1)

def point(z):
    return 0.5 * jnp.sum(z**2)

def column(x):
    return 0.5 * jnp.sum(x**2, axis=1, keepdims=True)

def walled(x):
    return jnp.where(jnp.abs(x[:, 0]) > 1, jnp.inf, 0.5 * jnp.sum(x**2, axis=1))

def kinked(x):
    return jnp.where(x[:, 0] > 0, jnp.sqrt(jnp.abs(x[:, 0])), jnp.sqrt(x[:, 0] - x[:, 0]))

def not_jax(x):
    return np.sum(np.asarray(x) ** 2, axis=1)

def whole(x):
    return jnp.sum(x, axis=1).astype(int)

def broken(x):
    raise RuntimeError("out of\\nluck")
"""
WINDOW = (-3.0, 3.0, -4.0, 4.0)
BAD = {
    "nothing": ("u5", None, ["'u5'", "u1, u2", "module:function"]),
    "no function": ("mine:", WINDOW, ["'mine:'"]),
    "no extent": ("own_energies:bowl", None, ["extent=(z1_min"]),
    "extent of u1": ("u1", WINDOW, ["u1", "leave out extent"]),
    "extent falls": ("own_energies:bowl", (3.0, -3.0, -3.0, 3.0), ["increase along z1"]),
    "extent without end": ("own_energies:bowl", (-np.inf, 3.0, -3.0, 3.0), ["finite"]),
    "no module": ("no_such_module:bowl", WINDOW, ["no_such_module", "working directory"]),
    "its import": ("imports_nothing:bowl", WINDOW, ["imports no_such_module"]),
    "syntax": ("not_python:bowl", WINDOW, ["not_python failed", "SyntaxError"]),
    "no such function": ("own_energies:cup", WINDOW, ["has no 'cup'"]),
    "not callable": ("own_energies:number", WINDOW, ["needs a function", "'number'"]),
    "of a point": ("own_energies:point", WINDOW, ["4096 points", "shape ()", "jax.vmap"]),
    "a column": ("own_energies:column", WINDOW, ["(4096, 1)"]),
    "whole numbers": ("own_energies:whole", WINDOW, ["floating", "int"]),
    "infinite": ("own_energies:walled", WINDOW, ["not finite at 2", "wall"]),
    "no gradient": ("own_energies:kinked", WINDOW, ["gradient of own_energies:kinked"]),
    "numpy": ("own_energies:not_jax", WINDOW, ["jax.numpy"]),
    "raises": ("own_energies:broken", WINDOW, ["RuntimeError: out of"]),
}


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_energies.py").write_text(OWN)
    (tmp_path / "imports_nothing.py").write_text("import no_such_module\n")
    (tmp_path / "not_python.py").write_text("def\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in ("own_energies", "imports_nothing", "not_python"):
        sys.modules.pop(name, None)


def test_a_persons_energy_is_found_and_integrated(own_module):
    found = energy("own_energies:bowl", (-7.0, 7.0, -8.0, 8.0))
    assert found.function(jnp.ones((3, 2))).tolist() == [1, 1, 1]
    assert energies.integrate(found, cells=60).log == pytest.approx(np.log(2 * np.pi), abs=1e-9)
    assert energy("u3") is ENERGIES["u3"]


@pytest.mark.parametrize("name", BAD)
def test_bad_energies_say_what_to_do(name, own_module):
    target, extent, expected = BAD[name]
    with pytest.raises(InputError) as raised:
        energy(target, extent)
    for part in expected:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_float32_energies_and_losses():
    flow = astype(linear(), jnp.float32)
    solve = Solve(rtol=1e-5, atol=1e-5)
    loss, _ = jax.jit(lambda flow, z: reverse_kl(flow, z, energy=gaussian(), solve=solve))(
        flow, SIGMA.astype(jnp.float32)
    )
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(kl_up_to_log_z(MATRIX), abs=1e-3)


def test_a_kl_below_what_noise_makes_is_no_number():
    from experiments import energy as experiment

    assert experiment.nan_if_negative(-0.01, 0.02) == -0.01
    assert np.isnan(experiment.nan_if_negative(-0.03, 0.02))
