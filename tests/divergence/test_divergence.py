"""Divergences: exact ones equal the trace of the Jacobian, estimates do so on average."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from field_table import FIELDS, drawn
from helpers import MATRIX, Linear, slope, strategies
from jaxtyping import Array, Float

import jcnf
from jcnf import Exact, ForwardMode, Hutchinson
from jcnf.divergence import (
    Divergence,
    FieldEvaluation,
    FixedNoise,
    HutchPlusPlus,
    XTrace,
)
from jcnf.divergence.estimators import NOISES, SKETCH_SHIFT
from jcnf.fields import MLP, Field

NUM_DRAWS = 4000
TIME, X, CONTEXT = jnp.asarray(0.4), jnp.array([0.3, -1.0, 0.7]), jnp.array([0.9, -0.2])
EXACT = {
    "exact": Exact(),
    "exact, probes": Exact(probes=2),
    "forward": ForwardMode(),
    "forward, in pieces": ForwardMode(chunk=2),
}
ESTIMATORS = {
    **{f"{noise} {k}": Hutchinson(k, noise) for noise in NOISES for k in (1, 2)},
    **{f"hutch++ {k}": HutchPlusPlus(k) for k in (1, 2)},
    **{f"xtrace {k}": XTrace(k) for k in (1, 2)},
}
STRATEGIES = EXACT | ESTIMATORS


class Diagonal(Field):
    """v_i = sin(i x_i): a diagonal Jacobian."""

    dim: int = eqx.field(static=True, default=3)

    def __call__(self, t, x, context=None):
        return jnp.sin(x * jnp.arange(1, 4, dtype=x.dtype))


def draws(strategy, field, x, noise, context=None):
    """Evaluate a strategy at one point, for each row of `noise`."""
    if noise is None:
        return strategy(field, TIME, x, context, None)
    return jax.vmap(lambda noise: strategy(field, TIME, x, context, noise))(noise)


@cache
def noises():
    """Draw the noise of each strategy `NUM_DRAWS` times."""

    @jax.jit
    def draw(key):
        return {name: s.draw_noise(key, NUM_DRAWS, 3, X.dtype) for name, s in STRATEGIES.items()}

    return draw(jr.key(0))


@cache
def everything(name):
    """Return a field, each strategy's draws, the velocity, and the Jacobian by reverse mode."""
    field = FIELDS[name]()
    context = CONTEXT if field.context_dim else None

    @jax.jit
    def evaluate(x, noise):
        found = {k: draws(s, field, x, noise[k], context) for k, s in STRATEGIES.items()}
        return found, field(TIME, x, context), jax.jacrev(field, argnums=1)(TIME, x, context)

    return field, *jax.tree.map(np.asarray, evaluate(X, noises()))


def assert_mean(values, expected, scale, exact):
    """Assert equality if `exact`, otherwise within 4 standard errors, small relative to `scale`."""
    error = 4 * np.std(values) / np.sqrt(NUM_DRAWS) + 1e-10
    assert error < (2e-10 if exact else 0.1 * scale)
    np.testing.assert_allclose(np.mean(values), expected, rtol=0, atol=error)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", FIELDS)
def test_every_divergence_of_every_field(name, strategy):
    _, found, velocity, jacobian = everything(name)
    local, exact, norm = found[strategy], strategy in EXACT, np.linalg.norm(jacobian)
    expected = np.broadcast_to(velocity, local.velocity.shape)
    np.testing.assert_allclose(local.velocity, expected, rtol=0, atol=1e-13)
    assert_mean(local.divergence, np.trace(jacobian), norm, exact)
    if strategy == "exact":
        assert local.frobenius is None
    else:
        by_probes = strategy == "exact, probes"
        assert_mean(local.frobenius, norm**2, norm**2, exact and not by_probes)


def test_exact_asks_the_field_first():
    class Known(Diagonal):
        def velocity_and_divergence(self, t, x, context=None):
            return self(t, x), jnp.asarray(42.0)

    assert Exact()(Known(), TIME, X, None, None).divergence == 42
    assert ForwardMode()(Known(), TIME, X, None, None).divergence != 42


@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinsons_variance_is_known_and_falls_as_one_over_probes(noise, probes):
    _, found, _, jacobian = everything("mlp three hidden layers")
    # Var(e' J e) = 2 |S|^2 for Gaussian e, without the diagonal for Rademacher; S = (J + J')/2.
    symmetric = (jacobian + jacobian.T) / 2
    if noise == "rademacher":
        symmetric -= np.diag(np.diag(symmetric))
    variance = found[f"{noise} {probes}"].divergence.var()
    assert variance == pytest.approx(2 * np.sum(symmetric**2) / probes, rel=0.15)


def test_rademacher_is_exact_for_a_diagonal_jacobian():
    found = jax.jit(lambda x, e: [draws(s, Diagonal(), x, e) for s in (Hutchinson(), Exact())])
    estimates, exact = found(X, noises()["rademacher 1"][:50])
    np.testing.assert_allclose(estimates.divergence, exact.divergence, atol=1e-14)


@pytest.mark.parametrize("noise", NOISES)
def test_noise_is_white_and_differs_between_samples_and_probes(noise):
    draw = jax.jit(lambda key: Hutchinson(2, noise).draw_noise(key, 500, 3, jnp.float32))
    probes = draw(jr.key(0))
    assert probes.shape == (500, 2, 3)
    assert probes.dtype == jnp.float32
    flat = np.asarray(probes, np.float64).reshape(500, 6)
    covariance = flat.T @ flat / 500
    if noise == "orthogonal":
        gram = np.einsum("bpd,bqd->bpq", probes, probes)
        np.testing.assert_allclose(gram, np.broadcast_to(3 * np.eye(2), gram.shape), atol=1e-5)
        covariance[:3, 3:] = covariance[3:, :3] = 0  # one probe depends on the other
    np.testing.assert_allclose(covariance, np.eye(6), atol=0.25)
    if noise == "rademacher":
        assert set(np.unique(flat)) == {-1, 1}


@cache
def of_linear(strategy):
    """Return a function of a matrix: 200 draws of the estimate, and their gradients in it."""

    @jax.jit
    def values_and_gradients(matrix):
        def estimate(matrix, noise):
            return strategy(Linear(matrix), TIME, X, None, noise).divergence

        noise = strategy.draw_noise(jr.key(0), 200, 3, X.dtype)
        return jax.vmap(jax.value_and_grad(estimate), in_axes=(None, 0))(matrix, noise)

    return values_and_gradients


@pytest.mark.parametrize(
    "strategy", [Hutchinson(3, "orthogonal"), HutchPlusPlus(3), XTrace(3)], ids=repr
)
def test_as_many_directions_as_dimensions_give_the_trace_and_its_gradient(strategy):
    values, gradients = of_linear(strategy)(MATRIX)
    np.testing.assert_allclose(values, np.trace(MATRIX), rtol=0, atol=1e-8)
    np.testing.assert_allclose(gradients, np.broadcast_to(np.eye(3), (200, 3, 3)), atol=1e-6)


def hutch_plus_plus(matrix, noise):
    """Estimate the trace by the definition of Hutch++."""
    k = len(noise) // 2
    sketch, probes = noise[:k].T, noise[k:].T
    q, _ = np.linalg.qr((matrix + SKETCH_SHIFT * np.eye(len(matrix))) @ sketch)
    rest = probes - q @ q.T @ probes
    return np.trace(q.T @ matrix @ q) + np.trace(rest.T @ matrix @ rest) / k


def x_trace(matrix, noise):
    """Estimate the trace by the definition of XTrace, with a basis for each vector left out."""
    dim, k = len(matrix), len(noise)
    estimates = []
    for i, e in enumerate(noise):
        others = np.delete(noise, i, axis=0).T
        q, _ = np.linalg.qr((matrix + SKETCH_SHIFT * np.eye(dim)) @ others)
        rest = e - q @ q.T @ e
        outside = (dim - k + 1) * rest @ matrix @ rest / (rest @ rest)
        estimates.append(np.trace(q.T @ matrix @ q) + outside)
    return np.mean(estimates)


SPECTRA = {"decaying": 0.3 ** np.arange(20.0), "flat": np.ones(20)}


def with_spectrum(singular):
    """Return a nonsymmetric matrix with these singular values."""
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    right, _ = np.linalg.qr(left + 0.1 * rng.normal(size=(20, 20)))
    return left * singular @ right.T


@cache
def in_dimension_20(strategy):
    """Return the strategy's noise, and its estimates for the matrix of each of `SPECTRA`."""

    @jax.jit
    def evaluate(key, matrices):
        noise, x = strategy.draw_noise(key, 1000, 20, X.dtype), jnp.ones(20)
        return noise, {
            name: draws(strategy, Linear(matrix, 20), x, noise).divergence
            for name, matrix in matrices.items()
        }

    return evaluate(jr.key(0), {name: with_spectrum(s) for name, s in SPECTRA.items()})


@pytest.mark.parametrize(
    ("strategy", "definition"),
    [(HutchPlusPlus(4), hutch_plus_plus), (XTrace(6), x_trace)],
    ids=["hutch_plus_plus", "x_trace"],
)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_sketched_estimates_are_their_definition(strategy, definition, spectrum):
    noise, estimates = in_dimension_20(strategy)
    matrix = with_spectrum(SPECTRA[spectrum])
    expected = [definition(matrix, e) for e in np.asarray(noise[:100])]
    np.testing.assert_allclose(estimates[spectrum][:100], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", [HutchPlusPlus(4), XTrace(6)], ids=repr)
def test_a_decaying_spectrum_is_worth_a_sketch_at_the_same_number_of_products(strategy):
    plain = Hutchinson(12)
    assert strategy.products == plain.products
    variance, plain_variance = (in_dimension_20(s)[1]["decaying"].var() for s in (strategy, plain))
    assert variance < plain_variance / 30


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("strategy", [HutchPlusPlus(2), XTrace(2)], ids=repr)
def test_jacobians_of_hardly_any_rank(strategy, rank):
    matrix = rank * np.outer([1.0, 2.0, -1.0], [0.5, 1.0, 3.0])
    direction = np.array([[0.2, -1.0, 0.4], [0.7, 0.3, -0.6], [-0.1, 0.8, 0.5]])
    values, gradients = of_linear(strategy)(matrix)
    # Most bases are within `SKETCH_SHIFT` of the range of a matrix of rank one.
    assert np.quantile(np.abs(values - np.trace(matrix)), 0.9) < 0.2
    expected = slope(lambda h: of_linear(strategy)(matrix + h * direction)[0], 1e-6)
    slopes = np.einsum("bij,ij->b", gradients, direction)
    np.testing.assert_allclose(slopes, expected, rtol=1e-4)


def test_pieces_take_less_memory_and_have_the_same_gradient():
    field = drawn(MLP, 200, (10, 20), time="ignore", activation="tanh")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 200)))

    def program(chunk):
        @jax.jit
        def value_and_grad(field, x):
            def total(field):
                local = jax.vmap(lambda x: ForwardMode(chunk)(field, TIME, x, None, None))(x)
                return jnp.sum(local.divergence + 0.1 * local.frobenius)

            return jax.value_and_grad(total)(field)

        return value_and_grad.lower(field, x).compile()

    pieces, whole = program(8), program(200)
    memory = [p.memory_analysis().temp_size_in_bytes for p in (pieces, whole)]
    assert memory[0] < memory[1] / 4
    for leaf, expected in zip(
        jax.tree.leaves(pieces(field, x)), jax.tree.leaves(whole(field, x)), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-10, atol=1e-10)


def test_exact_ones_draw_nothing_but_the_probes_asked_for():
    for strategy in (Exact(), ForwardMode()):
        assert strategy.draw_noise(None, 5, 3, jnp.float32) is None
    assert Exact(probes=2).draw_noise(jr.key(0), 5, 3, jnp.float32).shape == (5, 2, 3)


def test_drawn_keeps_its_noise_whatever_the_key():
    noise = noises()["xtrace 2"]
    kept = FixedNoise(XTrace(2), noise)
    np.testing.assert_array_equal(kept.draw_noise(None, NUM_DRAWS, 3, X.dtype), noise)
    assert kept.draw_noise(jr.key(1), NUM_DRAWS, 3, jnp.float32).dtype == jnp.float32
    assert FixedNoise(Exact(), None).draw_noise(jr.key(1), NUM_DRAWS, 3, X.dtype) is None


@pytest.mark.parametrize("name", STRATEGIES)
def test_float32_in_float32_out(name):
    strategy = STRATEGIES[name]

    def evaluate(t, x, key):
        noise = strategy.draw_noise(key, 1, 3, x.dtype)
        return jax.vmap(lambda e: strategy(Diagonal(), t, x, None, e), axis_size=1)(noise)

    found = jax.eval_shape(evaluate, jnp.float32(0.4), X.astype(jnp.float32), jr.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_every_strategy_is_tested():
    assert {type(s) for s in STRATEGIES.values()} == strategies()


def test_a_strategy_of_ones_own_is_one_class():
    class Constant(Divergence):
        value: Float[Array, ""]

        def __call__(self, field, t, x, context, noise):
            return FieldEvaluation(field(t, x, context), self.value)

    flow = jcnf.CNF(Linear(jnp.asarray(MATRIX)), jcnf.distributions.StandardNormal(3))
    solve, divergence = jcnf.Solve(solver="euler", step=0.25), Constant(jnp.asarray(3.0))
    result = jax.jit(partial(jcnf.transform, solve=solve, divergence=divergence))(flow, X[None])
    np.testing.assert_allclose(result.logdet, [-3.0], rtol=1e-14)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [Hutchinson, HutchPlusPlus, XTrace])
def test_estimators_say_what_they_need(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__} draws.*jax.random.key.*jcnf.Exact"):
        kind().draw_noise(None, 5, 3, jnp.float32)
    with pytest.raises(ValueError, match="probes must be a whole number, at least 1; got probes=0"):
        kind(0)


@pytest.mark.parametrize("strategy", [Hutchinson(4, "orthogonal"), HutchPlusPlus(4), XTrace(4)])
def test_no_more_orthogonal_directions_than_dimensions(strategy):
    with pytest.raises(ValueError, match="at most 3 probes in dimension 3; got probes=4"):
        strategy.draw_noise(jr.key(0), 5, 3, jnp.float32)


@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_is_known():
    with pytest.raises(ValueError, match="unknown noise 'cauchy': use one of rademacher, gaussian"):
        Hutchinson(noise="cauchy")
    with pytest.raises(
        ValueError, match="probes must be a whole number, at least 0; got probes=-1"
    ):
        Exact(probes=-1)
    with pytest.raises(ValueError, match="got chunk=0"):
        ForwardMode(chunk=0)
    with pytest.raises(ValueError, match="draws noise"):
        Exact(probes=1).draw_noise(None, 5, 3, jnp.float32)
