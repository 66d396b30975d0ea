"""The training loop: one program, repeatable bit for bit, that skips failed updates."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import Tally, mlp

from jcnf import CNF, Solve, objectives, training
from jcnf.distributions import ScaledNormal
from jcnf.ode import NUM_BINS
from jcnf.regularizers import kinetic
from jcnf.training import checkpoint

pytestmark = pytest.mark.optimized

TRACES = Tally()
KEY = jr.key(7)
DATA = jnp.asarray(np.random.default_rng(0).normal([1.0, -0.5], [0.5, 1.5], (64, 2)))
SKIPPED = ("skipped", "skipped_solve", "skipped_loss", "skipped_gradient")
AVERAGE = 0.3  # in effect from the fourth step on: (1 + 3) / (10 + 3) > 0.3


def objective(flow, x, key):
    TRACES.count += 1
    return objectives.likelihood(flow, x, key, solve=Solve(solver="heun", step=0.5))


def draw_batch(key, data):
    return data[jr.randint(key, (32,), 0, len(data))]


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Allow mixed dtypes, an error in other tests: optax's Adam mixes them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def after(run, state, until, data=DATA):
    """Return the state at step `until` and the means of the metrics; data are not checked."""
    state, totals = run.program(state, data, KEY, until)
    return state, training.means(totals)


class Training:
    """A flow, its optimizer and the compiled program that most tests share."""

    def __init__(self):
        base = ScaledNormal(2, jnp.array([2.0, 0.5]), jnp.array([0.1, 0.2]))
        self.flow = CNF(mlp(2, (8,), time="concat", scale=0.5), base)
        self.optimizer = training.make_optimizer(0.05, 100, weight_decay=0.1, clip=1.0)
        self.run = training.make_train_loop(
            self.flow, objective, draw_batch, self.optimizer, average=AVERAGE
        )

    def start(self):
        return training.init(self.flow, self.optimizer)


@pytest.fixture(scope="module")
def setup():
    return Training()


@pytest.fixture(scope="module")
def ten(setup):
    """Return the state after 10 uninterrupted steps, and their metrics."""
    return after(setup.run, setup.start(), 10)


def test_rows_of_several_tables_belong_together():
    tables = jnp.arange(5), jnp.arange(5) ** 2
    rows, squares = training.draw_rows(64)(KEY, tables)
    assert set(np.asarray(rows).tolist()) == set(range(5))
    np.testing.assert_array_equal(squares, rows**2)
    for wrong in ((jnp.zeros((5, 2)), jnp.zeros((4, 2))), jnp.zeros((0, 2))):
        with pytest.raises(ValueError, match="equal numbers of rows"):
            training.draw_rows(3)(KEY, wrong)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def assert_identical(tree, other):
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    assert len(leaves) == len(others) > 0
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_killed_and_resumed_ends_bit_for_bit_where_uninterrupted(setup, ten, tmp_path):
    state, _ = setup.run(setup.start(), DATA, KEY, 4)
    checkpoint.save(tmp_path / "state", state, {})
    del state
    state, _ = checkpoint.load(tmp_path / "state", setup.start())
    state, _ = setup.run(state, DATA, KEY, 10)
    assert_identical(state, ten[0])
    assert int(state.step) == 10


def test_intervals_change_nothing_and_metrics_are_means_over_the_steps(setup, ten):
    state, losses = setup.start(), []
    for until in range(1, 11):
        state, metrics = after(setup.run, state, until)
        losses.append(metrics["loss"])
    assert_identical(state, ten[0])
    assert ten[1]["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert set(ten[1]) == {"loss", "nll", "nfe", "failed_rows", "grad_norm", *SKIPPED}
    assert ten[1]["nfe"] == 4
    assert ten[1]["skipped"] == 0


def test_totals_go_on_bit_for_bit_whatever_the_dispatches(setup):
    _, whole = setup.run(setup.start(), DATA, KEY, 7)
    state, totals = setup.run(setup.start(), DATA, KEY, 1)
    for until in (4, 6, 7):
        state, totals = setup.run(state, DATA, KEY, until, totals)
    assert_identical(totals, whole)
    assert int(totals.applied) == 7


@pytest.mark.slow
def test_a_smaller_rate_is_a_smaller_learning_rate():
    flow = CNF(mlp(2, ()), ScaledNormal(2))
    whole, half = (training.make_optimizer(rate, 100, weight_decay=0.1) for rate in (0.02, 0.01))
    runs = [training.make_train_loop(flow, objective, draw_batch, each) for each in (whole, half)]
    start = eqx.tree_at(lambda state: state.rate, training.init(flow, whole), jnp.asarray(0.5))
    scaled, _ = runs[0](start, DATA, KEY, 5)
    small, _ = runs[1](training.init(flow, half), DATA, KEY, 5)
    for a, b in zip(*map(jax.tree.leaves, (scaled.params, small.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_data_order_depends_on_the_key_and_the_step_alone(setup, ten):
    other, _ = setup.run(setup.start(), DATA, jr.key(8), 10)
    assert not np.array_equal(
        other.params.bijection.field.layers[0].linear.bias,
        ten[0].params.bijection.field.layers[0].linear.bias,
    )


def test_one_program_for_all_intervals(setup, ten):
    before, programs = TRACES.count, setup.run.program._cache_size()
    state = setup.start()
    for until in (1, 3, 10):
        state, _ = setup.run(state, DATA, KEY, until)
    assert TRACES.count == before > 0
    assert setup.run.program._cache_size() == programs


def test_states_and_parameters_that_are_kept_stay_as_they_were(setup):
    start = setup.start()
    kept, _ = setup.run(start, DATA, KEY, 2)
    before = jax.tree.map(np.array, kept)
    state, _ = setup.run(kept, DATA, KEY, 4)
    assert_identical(kept, before)
    assert not np.array_equal(*(jax.tree.leaves(s.average)[0] for s in (kept, state)))
    best = training.with_params(setup.flow, kept.average)
    assert jax.tree.structure(best) == jax.tree.structure(setup.flow)
    assert np.all(np.isfinite(best.bijection.field(jnp.asarray(0.1), DATA[0])))
    assert_identical(training.with_params(setup.flow, start.params), setup.flow)


def test_average_is_that_of_a_hand_computation(setup):
    state = setup.start()
    mean = copied(state.average)
    for step in range(6):
        state, _ = setup.run(state, DATA, KEY, step + 1)
        decay = min(AVERAGE, (1 + step) / (10 + step))
        mean = jax.tree.map(lambda m, p, d=decay: d * m + (1 - d) * p, mean, state.params)
    for a, b in zip(jax.tree.leaves(state.average), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_training_lowers_the_loss_and_leaves_the_base_alone(setup, ten):
    state, _ = setup.run(copied(ten[0]), DATA, KEY, 60)
    state, late = after(setup.run, state, 80)
    # The data are Gaussian; the lowest possible loss is their entropy.
    entropy = np.log(0.5 * 1.5) + np.log(2 * np.pi * np.e)
    assert ten[1]["loss"] - entropy > 1
    assert late["loss"] - entropy < 0.35
    assert jax.tree.leaves(state.params.base) == []
    trained = training.with_params(setup.flow, state.params)
    assert_identical(trained.base, setup.flow.base)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_steps_on_bad_data_are_skipped_and_counted(setup, ten, bad):
    state = copied(ten[0])
    state, metrics = after(setup.run, state, 13, DATA.at[:].set(bad))
    assert int(state.skipped) == metrics["skipped"] == 3
    assert int(state.step) == 13
    for name in ("params", "average", "opt_state"):
        assert_identical(getattr(state, name), getattr(ten[0], name))
    # Training continues with good data.
    state, metrics = after(setup.run, state, 14)
    assert int(state.skipped) == 3
    assert metrics["skipped"] == 0
    assert not np.array_equal(
        state.params.bijection.field.layers[0].linear.bias,
        ten[0].params.bijection.field.layers[0].linear.bias,
    )


def test_data_that_are_not_finite_are_refused_before_the_first_step(setup):
    bad = DATA.at[jnp.array([5, 9, 20, 63]), 1].set(jnp.nan)
    expected = r"data has NaN or inf in 4 of 64 rows \(first: 5, 9, 20, ...\)"
    with pytest.raises(ValueError, match=expected):
        setup.run(setup.start(), bad, KEY, 3)
    with pytest.raises(ValueError, match=r"data\['x'\]\[1\] has NaN or inf in 1 of 64 rows"):
        setup.run(setup.start(), {"x": (DATA, DATA.at[3].set(np.inf))}, KEY, 3)


def rates(optimizer, steps):
    """Return the learning rates: Adam's steps under a constant gradient, whatever its size."""

    def step(state, _):
        updates, state = optimizer.update(jnp.array([0.1, -0.3]), state, jnp.zeros(2))
        return state, -updates[0]

    return np.asarray(jax.lax.scan(step, optimizer.init(jnp.zeros(2)), length=steps)[1])


def test_learning_rate_warms_up_and_ends_at_zero():
    # rtol allows for Adam's epsilon, 1e-8, beside gradients of about 0.1.
    taken = rates(training.make_optimizer(0.2, 20, warmup=4), 21)
    np.testing.assert_allclose(taken[:5], [0, 0.05, 0.1, 0.15, 0.2], rtol=1e-5)
    np.testing.assert_allclose(taken[12], 0.1, rtol=1e-5)  # halfway down the cosine
    assert np.all(np.diff(taken[4:]) < 0)
    assert abs(taken[20]) < 1e-12
    plain = rates(training.make_optimizer(0.2, 20), 11)
    np.testing.assert_allclose(plain[[0, 10]], [0.2, 0.1], rtol=1e-5)
    constant = rates(training.make_optimizer(0.2, 20, warmup=4, schedule="constant"), 21)
    np.testing.assert_allclose(constant[[2, 4, 20]], [0.1, 0.2, 0.2], rtol=1e-5)
    with pytest.raises(ValueError, match="'linear'"):
        training.make_optimizer(0.2, 20, schedule="linear")


@pytest.mark.parametrize("clip", [1.0, np.inf])
def test_gradients_are_clipped_by_their_global_norm(clip):
    optimizer = training.make_optimizer(0.1, 10, clip=clip)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    scale = 0.1 * min(1, clip / 5)
    np.testing.assert_allclose(first_moment["a"], scale * gradient["a"], rtol=1e-12)
    np.testing.assert_allclose(first_moment["b"], scale * gradient["b"], rtol=1e-12)


def test_weight_decay_is_decoupled():
    optimizer = training.make_optimizer(0.1, 10, weight_decay=0.5)
    params = jnp.array([2.0, -4.0])
    updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
    np.testing.assert_allclose(updates, -0.1 * 0.5 * params, rtol=1e-12)


def test_likelihood_adds_weighted_penalties():
    flow = CNF(mlp(2, (4,)), ScaledNormal(2))
    settings = {"solve": Solve(solver="euler", step=0.5)}
    run = eqx.filter_jit(partial(objectives.likelihood, **settings, regularizers={kinetic: 2.0}))
    loss, metrics = run(flow, DATA, KEY)
    assert float(loss) == pytest.approx(float(metrics["nll"] + 2 * metrics["kinetic"]), rel=1e-12)
    assert metrics["kinetic"] > 0


def of_steps(number):
    """Return a step plan with this number of steps in each part."""
    return jnp.broadcast_to(jnp.asarray(number, float), (NUM_BINS,))


def probe(model, found, key, *, solve):
    """Report the given step plan as a metric and return `found` as plan; fail if it is negative."""
    given = jnp.where(jnp.ptp(solve.step_plan) == 0, solve.step_plan[0], jnp.nan)
    return model, {"given": given, "step_plan": of_steps(found), "failed": found < 0}


def step_plans(found, **settings):
    """Return the plan that `probe` got in each step (None if skipped), and the state's plan."""
    model, optimizer = jnp.zeros(()), optax.sgd(0.1)
    settings = {"solve": Solve(step_plan=of_steps(0.25))} | settings
    run = training.make_train_loop(model, probe, lambda key, data: data, optimizer, **settings)
    state, given, left = training.init(model, optimizer), [], []
    np.testing.assert_array_equal(state.step_plan, of_steps(0))
    for step, each in enumerate(found):
        state, totals = run.program(state, jnp.asarray(each), KEY, step + 1)
        given.append(float(totals.sums["given"]) if totals.applied else None)
        left.append(all_of(state.step_plan))
    assert run.program._cache_size() == 1
    return given, left


def all_of(step_plan):
    """Return the number of steps that every part of the plan has."""
    assert step_plan.shape == (NUM_BINS,)
    [number] = set(np.asarray(step_plan).tolist())
    return number


def test_a_step_takes_the_step_plan_that_the_last_one_applied_found():
    given, left = step_plans([0.5, 0.125, -1.0, 1.0, 0.75])
    assert given == [0.0, 0.5, None, 0.125, 1.0]
    assert left == [0.5, 0.125, 0.125, 1.0, 0.75]
    # No plan is known until an update was applied.
    assert step_plans([-1.0, -1.0, 0.5, 0.75]) == ([None, None, 0.0, 0.5], [0.0, 0.0, 0.5, 0.75])


def test_a_step_plan_is_left_as_it_was_by_an_update_of_a_bad_loss_or_gradient():
    def bad(model, power, key, *, solve):
        return (model - 1) ** power, {"step_plan": of_steps(power)}

    run = training.make_train_loop(
        jnp.ones(()), bad, lambda key, data: data, optax.sgd(0.1), solve=Solve()
    )
    state = training.init(jnp.ones(()), optax.sgd(0.1))
    cases = (jnp.nan, "loss", 0.0), (0.5, "gradient", 0.0), (2.0, None, 2.0), (0.5, "gradient", 2.0)
    for step, (power, reason, left) in enumerate(cases):
        state, totals = run.program(state, jnp.asarray(power), KEY, step + 1)
        skipped = {name for name in SKIPPED[1:] if totals.skipped[name]}
        assert skipped == (set() if reason is None else {f"skipped_{reason}"})
        assert all_of(state.step_plan) == left


def test_what_is_carried_is_what_the_solve_told_and_saves_evaluations():
    flow, solve = CNF(mlp(2, (4,)), ScaledNormal(2)), Solve("bosh3", first_step=1.0)
    optimizer = optax.sgd(1e-3)
    run = training.make_train_loop(
        flow, objectives.likelihood, training.draw_rows(None), optimizer, solve=solve
    )

    @jax.jit
    def told(params, step_plan):
        here, given = (
            training.with_params(flow, params),
            dataclasses.replace(solve, step_plan=step_plan),
        )
        return objectives.likelihood(here, DATA, None, solve=given)[1]

    state, nfe, given = training.init(flow, optimizer), [], jnp.zeros(NUM_BINS)
    for step in range(4):
        expected = told(state.params, given)
        state, metrics = after(run, state, step + 1)
        given = state.step_plan
        nfe.append(int(metrics["nfe"]))
        assert nfe[-1] == int(expected["nfe"])
        np.testing.assert_allclose(given, expected["step_plan"], rtol=1e-6)
        assert np.all(given > 0)
    assert max(nfe[1:]) < nfe[0]


def test_mixed_objectives_that_have_a_solve_are_given_one_and_the_finest_step_plan_is_told():
    flow = CNF(mlp(2, ()), ScaledNormal(2))

    # None of these plans is the finest in every part.
    found = {
        "rising": jnp.arange(float(NUM_BINS)),
        "falling": NUM_BINS - jnp.arange(float(NUM_BINS)),
    }
    found |= {"level": of_steps(NUM_BINS * 0.75)}

    def solving(flow, x, key, *, solve, name):
        given = jnp.asarray(all_of(solve.step_plan))
        return given, {name: given, "step_plan": found[name]}

    @objectives.without_solve
    def simple(flow, x, key):
        return jnp.asarray(1.0), {}

    bound = [
        partial(solving, solve=Solve(step_plan=of_steps(own)), name=name)
        for own, name in zip((0.5, 0.25, 0.125), found, strict=True)
    ]
    mixed = partial(objectives.weighted_sum, flow, DATA, KEY)
    finest, given = np.max([*found.values()], axis=0), Solve(step_plan=of_steps(1.0))
    loss, metrics = mixed(weights=dict.fromkeys([*bound, simple], 1.0), solve=given)
    np.testing.assert_array_equal(metrics.pop("step_plan"), finest)
    assert float(loss) == 4.0
    assert metrics == {"rising": 1.0, "falling": 1.0, "level": 1.0}
    loss, metrics = mixed(weights=dict.fromkeys([simple, *bound], 1.0))
    np.testing.assert_array_equal(metrics.pop("step_plan"), finest)
    assert float(loss) == 1.875
    assert metrics == {"rising": 0.5, "falling": 0.25, "level": 0.125}
    # An objective that takes a solve gets it, whether already bound or not, also in a wrapper.
    unbound = objectives.with_context(
        lambda flow, x, key, *, context, solve: solving(flow, x, key, solve=solve, name="level")
    )
    loss, metrics = mixed(weights={unbound: 1.0, simple: 1.0}, solve=given)
    assert float(loss) == 2.0
