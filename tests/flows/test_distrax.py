"""Flows as distrax objects: densities, maps and log-dets, alone and inside distrax objects."""

import re
from functools import partial

import diffrax
import distrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import CONTEXT_MATRIX, MATRIX, SHIFT, TIGHT, T, affine, carried, log_density, mlp
from jaxtyping import Array, Bool, Float
from scipy import linalg

from jcnf import CNF, Exact, ForwardMode, Hutchinson, Solve
from jcnf.distributions import StandardNormal
from jcnf.flows import Bijection, Flow, Transformed
from jcnf.flows.distrax import FlowBijector, FlowDistribution
from jcnf.ode import Stats

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 2, 3)))
CONTEXT = jnp.asarray(RNG.normal(size=(2, 2, 2)))
PROPAGATOR = linalg.expm(T * MATRIX)


class ClosedForm(Bijection):
    """The closed form of `linear` and `affine`: no ODE, and quick to compile."""

    propagator: Float[Array, "3 3"]
    fails: Bool[Array, ""]
    size: int = eqx.field(static=True)  # of the context

    @property
    def context_dim(self):
        return self.size

    def forward_and_log_det(self, x, context, *settings):
        return self._end(x @ self.propagator.T + self._shift(context), 1)

    def inverse_and_log_det(self, x, context, *settings):
        return self._end((x - self._shift(context)) @ jnp.linalg.inv(self.propagator).T, -1)

    def _shift(self, context):
        # (e^{TA} - I) A^-1 carries the constant velocity.
        drift = jnp.asarray(np.linalg.solve(MATRIX, PROPAGATOR - np.eye(3)).T)
        return 0 if context is None else (context @ CONTEXT_MATRIX.T + SHIFT[None]) @ drift

    def _end(self, end, sign):
        zero, fails = jnp.zeros((), int), jnp.broadcast_to(self.fails, end.shape[:1])
        logdet = sign * jnp.linalg.slogdet(self.propagator)[1]
        logdet = jnp.broadcast_to(logdet, end.shape[:1])
        return Transformed(end, logdet, {}, Stats(zero, zero, zero, fails, jnp.zeros(1)))


def closed_form(context_dim=0, fails=False):
    bijection = ClosedForm(jnp.asarray(PROPAGATOR), jnp.asarray(fails), context_dim)
    return Flow(bijection, StandardNormal(3))


def density(x, context=None):
    """Return `log_density` for events and contexts of any batch shape."""
    arrays = [np.asarray(a) for a in (x, context) if a is not None]
    shape = np.broadcast_shapes(*(a.shape[:-1] for a in arrays))
    rows = [np.broadcast_to(a, (*shape, a.shape[-1])).reshape(-1, a.shape[-1]) for a in arrays]
    return np.reshape(log_density(*rows), shape)


# One program compiles faster than many separate operations.
log_prob = jax.jit(lambda dist, x: dist.log_prob(x))
draw = jax.jit(
    lambda dist, seed, shape=(): dist.sample_and_log_prob(seed=seed, sample_shape=shape),
    static_argnums=2,
)

DIST = FlowDistribution(closed_form())
CONDITIONAL = FlowDistribution(closed_form(2), CONTEXT)


# The distribution


@jax.jit
def everything(dist, x, key):
    """Return the log-densities of events, samples, and samples with their log-densities."""
    both = dist.sample_and_log_prob(seed=key, sample_shape=(5,))
    return dist.log_prob(x), dist.sample(seed=key, sample_shape=(5,)), both


@pytest.mark.parametrize("make", [affine, partial(closed_form, 2)], ids=["cnf", "other flow"])
def test_densities_and_samples_are_the_flows(make):
    dist, key = FlowDistribution(make(), CONTEXT, solve=TIGHT), jr.key(0)
    assert (dist.event_shape, dist.batch_shape, dist.dtype) == ((3,), (2, 2), jnp.float64)
    log_p, x, (y, log_p_y) = everything(dist, X, key)
    np.testing.assert_allclose(log_p, density(X, CONTEXT), atol=1e-8)
    z = StandardNormal(3).sample(key, 20)
    expected = carried(z, context=np.tile(CONTEXT.reshape(4, 2), (5, 1)))
    np.testing.assert_allclose(x, expected.reshape(5, 2, 2, 3), atol=1e-8)
    assert y.shape == (5, 2, 2, 3)
    np.testing.assert_allclose(log_p_y, density(y, CONTEXT), atol=1e-8)


def test_seeds_and_sample_shapes_are_distraxs():
    x, log_p = draw(DIST, jr.key(3), (2, 4))
    assert (x.shape, log_p.shape) == ((2, 4, 3), (2, 4))
    old_style, typed, number = (DIST.sample(seed=s) for s in (jr.PRNGKey(3), jr.key(3), 3))
    assert number.shape == (3,)
    np.testing.assert_array_equal(old_style, typed)
    np.testing.assert_array_equal(old_style, number)


def test_what_is_drawn_has_the_density():
    x = np.asarray(DIST.sample(seed=jr.key(1), sample_shape=4000))
    covariance = PROPAGATOR @ PROPAGATOR.T
    np.testing.assert_allclose(np.cov(x, rowvar=False), covariance, atol=0.1 * covariance.max())
    np.testing.assert_allclose(x.mean(0), 0, atol=4 * np.sqrt(covariance.max() / 4000))


# The bijector


@jax.jit
def there_and_back(bijector, x):
    """Return ends with autodiff Jacobians (dim, dim), and the bijector's log-dets both ways."""
    forward = lambda x: (bijector.forward(x),) * 2  # noqa: E731
    derivative, y = jax.vmap(jax.jacfwd(forward, has_aux=True))(x)
    return (y, derivative), bijector.forward_and_log_det(x), bijector.inverse_and_log_det(y)


@pytest.mark.slow
def test_log_dets_are_those_of_the_jacobian_there_and_back():
    solve = Solve(rtol=1e-9, atol=1e-9, adjoint=diffrax.ForwardMode())
    bijector = FlowBijector(CNF(mlp(3, (4,)), StandardNormal(3), t1=T), solve=solve)
    x = X.reshape(4, 3)
    (y, derivative), (same_y, logdet), (back, back_logdet) = there_and_back(bijector, x)
    assert np.ptp(logdet) > 0.1
    np.testing.assert_allclose(logdet, jnp.linalg.slogdet(derivative)[1], atol=1e-6)
    np.testing.assert_allclose(back_logdet, -logdet, atol=1e-7)
    np.testing.assert_allclose(same_y, y, atol=1e-7)
    np.testing.assert_allclose(back, x, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (4,), (3, 1, 2)])
def test_the_map_takes_any_batch_shape_and_broadcasts_with_the_context(shape):
    bijector = FlowBijector(closed_form(2), CONTEXT[0])
    x = jnp.asarray(RNG.normal(size=(*shape, 1, 3)))
    y, logdet = bijector.forward_and_log_det(x)
    assert (y.shape, logdet.shape) == ((*shape, 2, 3), (*shape, 2))
    rows = np.broadcast_to(x, y.shape).reshape(-1, 3)
    context = np.broadcast_to(CONTEXT[0], (*shape, 2, 2)).reshape(-1, 2)
    np.testing.assert_allclose(y.reshape(-1, 3), carried(rows, context=context), atol=1e-12)
    np.testing.assert_allclose(logdet, T * np.trace(MATRIX), atol=1e-12)
    np.testing.assert_allclose(bijector.inverse(y), jnp.broadcast_to(x, y.shape), atol=1e-12)
    np.testing.assert_allclose(bijector.inverse_log_det_jacobian(y), -logdet, atol=1e-12)


def test_same_as_is_the_same_arrays_and_settings():
    flow = closed_form()
    bijector = FlowBijector(flow)
    assert bijector.same_as(FlowBijector(flow, solve=Solve()))
    others = [
        FlowBijector(closed_form()),
        FlowBijector(flow, solve=Solve(rtol=1e-3)),
        FlowBijector(flow, divergence=ForwardMode()),
        distrax.Inverse(bijector),
    ]
    assert not any(bijector.same_as(other) for other in others)
    assert (bijector.event_ndims_in, bijector.event_ndims_out) == (1, 1)
    assert (bijector.name, DIST.name) == ("FlowBijector", "FlowDistribution")


# Inside other distrax objects


def base():
    return distrax.Independent(distrax.Normal(jnp.zeros(3), jnp.ones(3)), 1)


def test_transformed_by_a_bijector_it_is_the_known_density():
    scaled = distrax.Transformed(DIST, distrax.Block(distrax.ScalarAffine(0.5, 2.0), 1))
    assert (scaled.event_shape, scaled.batch_shape) == ((3,), ())
    expected = density((X - 0.5) / 2) - 3 * np.log(2)
    np.testing.assert_allclose(log_prob(scaled, X), expected, atol=1e-10)
    x, log_p = draw(scaled, jr.key(0), (4,))
    np.testing.assert_allclose(log_p, density((x - 0.5) / 2) - 3 * np.log(2), atol=1e-10)


def test_a_distrax_base_carried_is_the_flows_distribution():
    built = distrax.Transformed(base(), FlowBijector(closed_form()))
    with jax.numpy_rank_promotion("allow"):  # distrax's base needs it, here and below
        np.testing.assert_allclose(log_prob(built, X), density(X), atol=1e-10)
        x, log_p = draw(built, jr.key(0), (2, 2))
        np.testing.assert_allclose(built.sample(seed=jr.key(0), sample_shape=(2, 2)), x, atol=1e-12)
    assert x.shape == (2, 2, 3)
    np.testing.assert_allclose(log_p, density(x), atol=1e-10)


def test_chained_and_inverted_it_composes():
    block = distrax.Block(distrax.ScalarAffine(0.5, 2.0), 1)
    chain = distrax.Chain([block, FlowBijector(closed_form())])
    y, logdet = chain.forward_and_log_det(X)
    np.testing.assert_allclose(y.reshape(-1, 3), 2 * carried(X.reshape(-1, 3)) + 0.5, atol=1e-10)
    np.testing.assert_allclose(logdet, T * np.trace(MATRIX) + 3 * np.log(2), atol=1e-10)
    # Undoing the flow's map leaves the base.
    undone = distrax.Transformed(DIST, distrax.Inverse(FlowBijector(closed_form())))
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(log_prob(undone, X), log_prob(base(), X), atol=1e-10)


def test_independent_makes_events_of_the_contexts_batch():
    expected = density(X, CONTEXT)
    one = distrax.Independent(CONDITIONAL, 1)
    assert (one.event_shape, one.batch_shape) == ((2, 3), (2,))
    np.testing.assert_allclose(log_prob(one, X), expected.sum(1), atol=1e-10)
    both = distrax.Independent(CONDITIONAL, 2)
    x, log_p = draw(both, jr.key(0), (5,))
    assert (x.shape, log_p.shape) == ((5, 2, 2, 3), (5,))
    np.testing.assert_allclose(log_p, density(x, CONTEXT).sum((1, 2)), atol=1e-9)
    none = distrax.Independent(DIST, 0)
    np.testing.assert_allclose(log_prob(none, X), density(X), atol=1e-10)


# jit, vmap and gradients


def test_as_an_argument_it_is_traced_once():
    traces = []

    @jax.jit
    def counted(dist, x):
        traces.append(1)
        return dist.log_prob(x)

    for scale in (1.0, 2.0):
        flow = eqx.tree_at(
            lambda f: f.bijection.propagator, closed_form(2), jnp.asarray(scale * PROPAGATOR)
        )
        log_p = counted(FlowDistribution(flow, CONTEXT, solve=Solve(rtol=1e-3)), X)
        known = jax.jit(FlowDistribution(flow, CONTEXT).log_prob)(
            X
        )  # the distribution is closed over
        np.testing.assert_allclose(log_p, known, atol=1e-12)
    assert traces == [1]
    counted(FlowDistribution(flow, CONTEXT, solve=Solve(rtol=1e-4)), X)
    assert traces == [1, 1]


def test_vmap_over_events_keys_and_distributions():
    events = X.reshape(4, 3)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(DIST.log_prob))(events), density(events), atol=1e-10
    )
    samples = jax.jit(jax.vmap(lambda key: DIST.sample(seed=key)))(jr.split(jr.key(0), 5))
    assert samples.shape == (5, 3)
    assert np.min(np.ptp(samples, axis=0)) > 0
    many = jax.vmap(lambda context: FlowDistribution(closed_form(2), context))(CONTEXT[0])
    each = jax.jit(jax.vmap(log_prob))(many, X[0])
    np.testing.assert_allclose(each, density(X[0], CONTEXT[0]), atol=1e-10)


def test_gradients_in_events_and_parameters():
    covariance = PROPAGATOR @ PROPAGATOR.T
    events = np.asarray(X).reshape(4, 3)
    score = jax.jit(jax.vmap(jax.grad(DIST.log_prob)))(jnp.asarray(events))
    np.testing.assert_allclose(score, -events @ np.linalg.inv(covariance), atol=1e-10)

    gradient = eqx.filter_grad(lambda flow: jnp.sum(log_prob(FlowDistribution(flow), X)))
    # d/dP of -|P^-1 x|^2 / 2 - log|det P| is P^-T (z z' - I) with z = P^-1 x.
    z = events @ np.linalg.inv(PROPAGATOR).T
    expected = np.linalg.inv(PROPAGATOR).T @ (z.T @ z - 4 * np.eye(3))
    np.testing.assert_allclose(gradient(closed_form()).bijection.propagator, expected, atol=1e-9)
    of_arguments = jax.grad(lambda dist: jnp.sum(log_prob(dist, X)), allow_int=True)(DIST)
    np.testing.assert_allclose(of_arguments.flow.bijection.propagator, expected, atol=1e-9)


def test_gradients_go_through_a_solve():
    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(inputs):
        flow, x = inputs
        return jnp.sum(FlowDistribution(flow, CONTEXT[0, 0]).log_prob(x))

    x, where = X[0], lambda inputs: inputs[0].bijection.field.layers[0].bias
    value, (of_flow, of_x) = loss((affine(), x))
    covariance = PROPAGATOR @ PROPAGATOR.T
    centered = np.asarray(x) - carried(np.zeros((1, 3)), context=CONTEXT[0, :1])
    np.testing.assert_allclose(value, density(x, CONTEXT[0, 0]).sum(), atol=1e-4)
    np.testing.assert_allclose(of_x, -centered @ np.linalg.inv(covariance), atol=1e-4)
    # A constant velocity moves only the mean, by (e^{TA} - I) A^-1 times itself.
    drift = (PROPAGATOR - np.eye(3)) @ np.linalg.inv(MATRIX)
    expected = -np.asarray(of_x).sum(0) @ drift
    np.testing.assert_allclose(where((of_flow, of_x)), expected, atol=1e-4)


# Errors


@pytest.mark.parametrize(
    "run",
    [
        lambda flow: FlowDistribution(flow).log_prob(X),
        lambda flow: FlowDistribution(flow).sample(seed=0),
        lambda flow: FlowDistribution(flow).sample_and_log_prob(seed=0),
        lambda flow: FlowBijector(flow).forward(X),
        lambda flow: FlowBijector(flow).inverse(X),
        lambda flow: FlowBijector(flow).forward_and_log_det(X),
        lambda flow: FlowBijector(flow).inverse_and_log_det(X),
    ],
)
def test_a_failed_solve_raises_advice(run):
    with pytest.raises(eqx.EquinoxRuntimeError, match=r"raise max_steps in jcnf\.Solve"):
        run(closed_form(fails=True))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("make", [FlowBijector, FlowDistribution])
@pytest.mark.parametrize(
    ("context_dim", "settings", "message"),
    [
        (2, {}, "context of size 2; got none: give context of shape (*batch, context)"),
        (2, {"context": jnp.zeros((4, 3))}, "context of size 2; got one of shape (4, 3)"),
        (2, {"context": jnp.zeros(())}, "context of size 2; got one of shape ()"),
        (0, {"context": CONTEXT}, "context of size 0; got one of shape (2, 2, 2)"),
        (0, {"divergence": Hutchinson()}, "Hutchinson() draws noise: use Exact()"),
        (0, {"divergence": Exact(probes=1)}, "Exact(probes=1) draws noise"),
    ],
)
def test_what_makes_no_density_is_refused(make, context_dim, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(closed_form(context_dim), **settings)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "run",
    [DIST.log_prob, FlowBijector(closed_form()).forward, FlowBijector(closed_form()).inverse],
)
def test_events_of_wrong_shape_say_what_to_do(run):
    with pytest.raises(ValueError, match=re.escape("of shape (..., 3); got (4, 2)")):
        run(jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match=re.escape("of shape (..., 3); got ()")):
        run(jnp.zeros(()))
    with pytest.raises(ValueError, match="floating dtype; got int64"):
        run(jnp.zeros((4, 3), int))


@pytest.mark.usefixtures("unchecked")
def test_events_and_contexts_that_do_not_broadcast_say_what_to_do():
    message = "shape (5, 3) do not broadcast with a context of shape (2, 2, 2): samples come first"
    with pytest.raises(ValueError, match=re.escape(message)):
        CONDITIONAL.log_prob(jnp.zeros((5, 3)))
    one = FlowDistribution(CNF(mlp(1, ()), StandardNormal(1)))
    with pytest.raises(ValueError, match=re.escape("got (7,): add the event's axis with x[..., N")):
        one.log_prob(jnp.zeros(7))
