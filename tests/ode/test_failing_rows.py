"""Rows that cannot be solved fail alone in every function of a flow."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import OUTSIDE, astype, outside

import jcnf
from jcnf import Solve, evaluate, objectives, training
from jcnf.regularizers import kinetic

BAD = np.array([0, 7, 31, 199])


def flow_of(kind, dtype=jnp.float64):
    return astype(outside(kind), dtype)


def rows(dtype=jnp.float64):
    """Return 200 points, of which the rows `BAD` are outside the circle."""
    x = np.random.default_rng(0).uniform(-2, 2, (200, 2))
    x[BAD] = [[5, 0], [0, -6], [6, 6], [-20, 1]]
    return jnp.asarray(x, dtype)


GOOD = np.setdiff1d(np.arange(200), BAD)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        ("batch", "float32"),
        pytest.param("worst", "float64", marks=pytest.mark.slow),
        pytest.param("batch", "float64", marks=pytest.mark.slow),
        pytest.param("worst", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", OUTSIDE)
def test_transform_flags_exactly_the_bad_rows_and_leaves_the_others_alone(kind, norm, dtype):
    flow, x, solve = flow_of(kind, dtype), rows(dtype), Solve(norm=norm)
    for direction in ("to_base", "to_data"):
        settings = {"direction": direction, "solve": solve, "regularizers": (kinetic,)}
        # Replace the bad rows by good ones, which keeps the batch's shape.
        without = jcnf.transform(flow, x.at[BAD].set(x[GOOD[: len(BAD)]]), **settings)
        found = jcnf.transform(flow, x, **settings)
        np.testing.assert_array_equal(np.flatnonzero(found.stats.failed), BAD)
        for value, expected in zip(
            jax.tree.leaves(found[:3]), jax.tree.leaves(without[:3]), strict=True
        ):
            assert np.all(np.isnan(value[BAD]))
            np.testing.assert_allclose(value[GOOD], expected[GOOD], atol=2e-4)
        assert int(found.stats.steps) <= int(without.stats.steps) + 8


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["blows up", "NaN"])
def test_log_prob_names_the_bad_rows_and_evaluate_counts_them(kind):
    flow, x, solve = flow_of(kind), rows(), Solve("bosh3", norm="worst")
    with pytest.raises(eqx.EquinoxRuntimeError, match=re.escape("4 of 200 rows (first: 0, 7, 31")):
        jcnf.log_prob(flow, x, solve=solve)
    scores, alone = (evaluate.log_prob(flow, x, chunk=60, solve=solve) for x in (x, x[GOOD]))
    np.testing.assert_array_equal(np.flatnonzero(scores.failed), BAD)
    np.testing.assert_array_equal(np.isnan(scores.log_prob), scores.failed)
    assert not alone.failed.any()
    np.testing.assert_allclose(scores.log_prob[GOOD], alone.log_prob, atol=2e-4)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "adjoint",
    ["checkpoint", *(pytest.param(a, marks=pytest.mark.slow) for a in ("reversible", "backsolve"))],
)
def test_the_gradient_of_the_loss_is_that_of_the_others(adjoint):
    _, static = training.partition(flow_of("NaN"))
    solve = Solve("bosh3", rtol=1e-7, atol=1e-7, adjoint=adjoint, max_steps=4096)

    @jax.jit
    @jax.value_and_grad
    def loss(params, x):
        flow = eqx.combine(params, static)
        value, metrics = objectives.likelihood(flow, x, None, solve=solve)
        return value + 0 * jnp.sum(metrics["failed_rows"]).astype(value.dtype)

    # 50 and 49 copies of 4 good rows have the same mean, so that one program serves both batches.
    good = jnp.tile(rows()[GOOD[:4]], (50, 1))
    bad = good.at[jnp.array([0, 7, 30, 197])].set(rows()[BAD])
    for kind in ("blows up", "NaN"):
        params, _ = training.partition(flow_of(kind))
        found, expected = loss(params, bad), loss(params, good)
        for value, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("kind", ["blows up", pytest.param("NaN", marks=pytest.mark.slow)])
def test_training_goes_on_without_the_bad_samples_and_counts_them(kind):
    flow = flow_of(kind, jnp.float32)
    x = np.array(jr.normal(jr.key(0), (1000, 2)) * 0.3 + 0.5, np.float32)
    x[::100] = [6.0, -6.0]
    optimizer = optax.sgd(0.05)
    run = training.make_train_loop(
        flow, objectives.likelihood, training.draw_rows(200), optimizer, solve=Solve("bosh3")
    )
    state, losses = training.init(flow, optimizer), []
    for until in (10, 20, 30, 40, 50):
        with pytest.warns(UserWarning, match="samples were left out of the loss"):
            state, totals = run(state, jnp.asarray(x), jr.key(1), until)
        means = training.means(totals)
        losses.append(float(means["loss"]))
        assert 0.5 < float(means["failed_rows"]) < 5
    assert int(state.skipped) == 0
    assert np.all(np.diff(losses) < 0)
    assert losses[-1] < losses[0] - 0.5


def test_an_update_is_skipped_where_more_than_a_tenth_of_the_rows_fail():
    flow = flow_of("NaN", jnp.float32)
    optimizer = optax.sgd(0.1)
    objective = partial(objectives.likelihood, solve=Solve("bosh3"))
    run = training.make_train_loop(flow, objective, training.draw_rows(None), optimizer)
    state = training.init(flow, optimizer)
    x = jnp.zeros((20, 2), jnp.float32)
    with pytest.warns(UserWarning, match="for more than a tenth of the rows"):
        after, _ = run(state, x.at[:3].set(9.0), jr.key(0), 1)
    assert int(after.skipped) == 1
    for bad in (1, 2):
        after, totals = run.program(state, x.at[:bad].set(9.0), jr.key(0), 1, None)
        assert int(after.skipped) == 0
        assert float(totals.sums["failed_rows"]) == bad
