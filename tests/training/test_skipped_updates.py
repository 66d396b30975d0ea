"""Updates that training skips: how they are counted, reported, and end a run."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import mlp

from jcnf import CNF, Solve, objectives, training
from jcnf.distributions import ScaledNormal

KEY = jr.key(7)
DATA = jnp.asarray(np.random.default_rng(0).normal([1.0, -0.5], [0.5, 1.5], (64, 2)))
SKIPPED = ("skipped", "skipped_solve", "skipped_loss", "skipped_gradient")


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Allow mixed dtypes, an error in other tests: optax's Adam mixes them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def coarse(flow, x, key):
    return objectives.likelihood(flow, x, key, solve=Solve(solver="euler", step=1.0))


def draw_batch(key, data):
    return data[jr.randint(key, (32,), 0, len(data))]


def after(run, state, until):
    """Return the state at step `until` and the means of the metrics; data are not checked."""
    state, totals = run.program(state, DATA, KEY, until)
    return state, training.means(totals)


@cache
def sampled(share, **settings):
    """Return a training loop in which this share of the batches is NaN, and its first state."""
    flow, optimizer = CNF(mlp(2, ()), ScaledNormal(2)), optax.sgd(0.01)

    def draw_batch(key, data):
        return jnp.where(jr.bernoulli(key, share), jnp.nan, data)

    run = training.make_train_loop(flow, coarse, draw_batch, optimizer, **settings)
    return run, training.init(flow, optimizer)


def test_skipped_updates_are_warned_of_with_their_reason():
    run, state = sampled(0.2)
    with pytest.warns(UserWarning, match="were skipped") as told:
        state, totals = run(state, DATA, KEY, 50)
    skipped = int(state.skipped)
    assert 0 < skipped < 50
    [message] = [str(each.message) for each in told if "skipped" in str(each.message)]
    assert message.startswith(f"{skipped} of 50 updates after step 0 were skipped: {skipped} ")
    assert "because the ODE solve failed" in message
    # A later call reports only the steps that it took itself.
    with pytest.warns(UserWarning, match="of 50 updates after step 50 were skipped") as told:
        after, totals = run(state, DATA, KEY, 100, totals)
    own = int(after.skipped) - skipped
    assert any(f"skipped: {own} because the ODE solve failed" in str(each.message) for each in told)
    assert int(totals.skipped["skipped"]) == int(after.skipped)


def test_training_that_learns_nothing_is_an_error_and_one_bad_step_is_not():
    run, state = sampled(1.0)
    with pytest.raises(RuntimeError, match="nothing was learned: 200 of 200 updates"):
        run(state, DATA, KEY, 200)
    assert int(state.step) == 0
    with pytest.warns(UserWarning, match="1 of 1 updates after step 0 were skipped"):
        state, _ = run(state, DATA, KEY, 1)
    assert int(state.step) == int(state.skipped) == 1
    # After applied updates, a few skipped ones in a row are not an error, but many are.
    state = dataclasses.replace(state, skipped=jnp.zeros((), jnp.int32))
    with pytest.warns(UserWarning, match="3 of 3 updates"):
        run(state, DATA, KEY, 4)
    with pytest.raises(RuntimeError, match="nothing was learned: 12 of 12"):
        run(state, DATA, KEY, 13)


def test_a_training_that_is_stuck_does_not_end_in_silence():
    run, state = sampled(1.0, max_skips=4)
    with pytest.raises(RuntimeError, match=r"4 of 4 updates .* ended before step 100, after 4"):
        run(state, DATA, KEY, 100)


@pytest.mark.slow
def test_runs_are_built_and_taken_inside_vmap_and_jit():
    flow = CNF(mlp(2, ()), ScaledNormal(2))

    def trained(rate):
        optimizer = optax.sgd(rate)
        run = training.make_train_loop(flow, coarse, draw_batch, optimizer)
        return run(training.init(flow, optimizer), DATA, KEY, 3)[0].params

    rates = jnp.array([0.01, 0.02])
    found, alone = jax.vmap(trained)(rates), trained(0.02)
    for both, one in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_allclose(both[1], one, rtol=1e-9)
    run, state = sampled(0.0)
    assert int(jax.jit(lambda: run(state, DATA, KEY, 3)[0].step)()) == 3


def test_numpy_data_are_looked_at_every_time_and_in_the_dtype_of_training():
    run, state = sampled(0.0)
    data = np.array(DATA)
    run(state, data, KEY, 1)
    data[5] = np.nan
    with pytest.raises(ValueError, match=r"data has NaN or inf in 1 of 64 rows \(first: 5\)"):
        run(state, data, KEY, 1)
    data[5] = 1e39
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"NaN or inf in 1 of 64"):
        run(state, data, KEY, 1)


@pytest.mark.optimized
@pytest.mark.slow
def test_runs_go_through_vmap():
    run, state = sampled(0.0)
    states = jax.tree.map(lambda a: jnp.stack([a, a]), state)
    keys = jr.split(KEY, 2)
    found, _ = jax.vmap(run, in_axes=(0, None, 0, None))(states, DATA, keys, 3)
    alone, _ = run(state, DATA, keys[1], 3)
    for both, one in zip(*map(jax.tree.leaves, (found.params, alone.params)), strict=True):
        np.testing.assert_allclose(both[1], one, rtol=1e-9)


@pytest.mark.parametrize(
    ("reason", "counted"),
    [
        ("failed", "skipped_solve"),
        ("loss", "skipped_loss"),
        ("gradient", "skipped_gradient"),
    ],
)
def test_a_finite_loss_of_a_failed_solve_is_not_trained_upon(reason, counted):
    flow = CNF(mlp(2, ()), ScaledNormal(2))

    def objective(flow, x, key):
        weight = flow.bijection.field.layers[0].time_weight
        loss = jnp.sum(weight)
        if reason == "loss":
            loss = loss / 0
        if reason == "gradient":
            loss = loss + jnp.sum(jnp.sqrt(weight * 0))
        return loss, {"failed": jnp.asarray(reason == "failed")}

    optimizer = optax.sgd(0.1)
    run = training.make_train_loop(flow, objective, lambda key, data: data, optimizer)
    with jax.numpy_dtype_promotion("strict"):
        state, metrics = after(run, training.init(flow, optimizer), 5)
    assert int(state.skipped) == int(state.stuck) == metrics["skipped"] == metrics[counted] == 5
    assert sum(metrics[name] for name in SKIPPED) == 10
    assert eqx.tree_equal(state.params, training.partition(flow)[0])


def test_a_run_stops_after_so_many_skipped_in_a_row():
    model, optimizer = jnp.zeros(()), optax.sgd(0.1)

    def bad_from_7(model, key, _):
        return model + jnp.where(model < -0.65, jnp.nan, 1.0), {}

    run = training.make_train_loop(model, bad_from_7, lambda key, _: key, optimizer, max_skips=4)
    state, totals = run.program(training.init(model, optimizer), DATA, KEY, 100)
    assert (int(state.step), int(state.stuck), int(totals.applied)) == (11, 4, 7)


def test_metrics_are_means_over_the_updates_applied():
    flow, optimizer = CNF(mlp(2, ()), ScaledNormal(2)), optax.sgd(0.1)

    def objective(flow, x, key):
        zero = 0 * jnp.sum(flow.bijection.field.layers[0].time_weight)
        return x + zero, {"twice": 2 * x, "failed": jnp.asarray(False)}

    def draw_batch(key, data):
        return jnp.where(jr.bernoulli(key), jnp.nan, 3.0)

    run = training.make_train_loop(flow, objective, draw_batch, optimizer)
    state, metrics = after(run, training.init(flow, optimizer), 20)
    assert 0 < int(state.skipped) == metrics["skipped"] < 20
    assert (metrics["loss"], metrics["twice"], metrics["grad_norm"]) == (3, 6, 0)
