"""Couplings: pairs within groups, of least cost or drawn from a plan, with similar contexts."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jcnf.objectives.couplings import COUPLINGS, ExactOT, SinkhornOT, independent

KEY = jr.key(0)
RNG = np.random.default_rng(0)
X0 = jnp.asarray(RNG.normal(size=(12, 2)))
X1 = jnp.asarray(RNG.normal([1.0, -0.5], [0.5, 2.0], size=(12, 2)))
CLASSES = np.arange(12) % 3
ONE_HOT = jnp.asarray(np.eye(3)[CLASSES])
SMALL = {"independent": independent, "exact": ExactOT(group=5), "sinkhorn": SinkhornOT(group=5)}


def costs(x0, x1):
    """|x0 - x1|^2, with a row for each of x1."""
    return np.sum((np.asarray(x1)[:, None] - np.asarray(x0)[None]) ** 2, axis=-1)


def cost(x0, x1, pairs):
    return np.sum(costs(x0, x1)[np.arange(len(x1)), np.asarray(pairs)])


def plan(x0, x1, epsilon):
    """Entropic plan for uniform weights and costs relative to their mean, by numpy."""
    kernel = np.exp(-costs(x0, x1) / np.mean(costs(x0, x1)) / epsilon)
    rows = columns = np.ones(len(kernel))
    for _ in range(2000):
        rows = 1 / (kernel @ columns)
        columns = 1 / (rows @ kernel)
    return rows[:, None] * kernel * columns / len(kernel)


def test_every_coupling_is_here():
    assert set(SMALL) == set(COUPLINGS)
    assert {type(SMALL[name]) for name in SMALL} == {type(c) for c in COUPLINGS.values()}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("context", [None, ONE_HOT], ids=["", "context"])
def test_partners_are_of_the_same_group_and_the_last_may_be_smaller(name, context):
    batch = 11  # groups of 5, 5 and 1
    of_batch = None if context is None else context[:batch]
    pairs = np.asarray(jax.jit(SMALL[name])(KEY, X0[:batch], X1[:batch], of_batch))
    assert pairs.shape == (batch,)
    assert np.issubdtype(pairs.dtype, np.integer)
    np.testing.assert_array_equal(pairs // 5, np.arange(batch) // 5)
    if name != "sinkhorn":
        np.testing.assert_array_equal(np.sort(pairs), np.arange(batch))


def test_independent_leaves_each_with_its_own():
    np.testing.assert_array_equal(independent(KEY, X0, X1, ONE_HOT), np.arange(12))


def test_exact_costs_no_more_than_any_permutation():
    found = cost(X0, X1, ExactOT()(KEY, X0, X1, None))
    for _ in range(200):
        assert found <= cost(X0, X1, RNG.permutation(12)) + 1e-12
    assert found < 0.7 * cost(X0, X1, np.arange(12))


def test_exact_is_the_best_of_all_permutations_of_a_group():
    pairs = np.asarray(ExactOT(group=5)(KEY, X0[:10], X1[:10], None))
    for start in (0, 5):
        x0, x1 = X0[start:][:5], X1[start:][:5]
        best = min(itertools.permutations(range(5)), key=partial(cost, x0, x1))
        np.testing.assert_array_equal(pairs[start:][:5] - start, best)


def draws(coupling, x0, x1, num):
    """Partners (num, batch), with another key for each draw."""
    return np.asarray(
        jax.jit(jax.vmap(lambda key: coupling(key, x0, x1, None)))(jr.split(KEY, num))
    )


def test_sinkhorn_with_little_entropy_costs_what_exact_does():
    least = cost(X0, X1, ExactOT()(KEY, X0, X1, None))
    coupling = SinkhornOT(epsilon=1e-3, iterations=5000)
    means = [cost(X0, X1, pairs) for pairs in draws(coupling, X0, X1, 50)]
    assert np.mean(means) == pytest.approx(least, rel=0.02)


def test_sinkhorn_draws_by_the_plan():
    num, (x0, x1) = 8000, (X0[:6], X1[:6])
    pairs = draws(SinkhornOT(epsilon=0.2, iterations=2000), x0, x1, num)
    shares = np.mean(pairs[:, :, None] == np.arange(6), axis=0)
    expected = 6 * plan(x0, x1, 0.2)
    # The plan is neither the assignment of least cost nor the independent coupling.
    assert 0.3 < np.max(expected) < 0.95
    assert np.min(expected) < 0.1
    error = np.sqrt(expected * (1 - expected) / num)
    assert np.all(np.abs(shares - expected) < 4 * error + 1e-3)
    # Every base sample is as likely as any other.
    chosen = np.sum(pairs[:, :, None] == np.arange(6), axis=1)
    error = np.std(chosen, axis=0) / np.sqrt(num)
    assert np.all(np.abs(np.mean(chosen, axis=0) - 1) < 4 * error + 1e-3)


def test_sinkhorn_takes_another_key_for_each_group():
    same = jnp.tile(X0[:5], (2, 1))
    pairs = draws(SinkhornOT(group=5, epsilon=10.0), same, same, 20) % 5
    assert not np.array_equal(pairs[:, :5], pairs[:, 5:])


@pytest.mark.parametrize("make", [ExactOT, SinkhornOT])
def test_partners_have_the_same_class(make):
    pairs = np.asarray(jax.jit(make())(KEY, X0, X1, ONE_HOT))
    np.testing.assert_array_equal(CLASSES[pairs], CLASSES)
    # Without the weight, classes mix.
    pairs = np.asarray(jax.jit(make(context_weight=0.0))(KEY, X0, X1, ONE_HOT))
    assert np.any(CLASSES[pairs] != CLASSES)


def test_exact_is_the_best_within_each_class():
    pairs = np.asarray(ExactOT()(KEY, X0, X1, ONE_HOT))
    for label in range(3):
        of_class = np.flatnonzero(label == CLASSES)
        best = linear_sum_assignment(costs(X0[of_class], X1[of_class]))[1]
        np.testing.assert_array_equal(pairs[of_class], of_class[best])


@pytest.mark.parametrize("name", SMALL)
def test_couplings_run_inside_a_compiled_loop(name):
    coupling = SMALL[name]

    @jax.jit
    def loop(key, x0, x1):
        def body(carry):
            i, x0, found = carry
            pairs = coupling(jr.fold_in(key, i), x0, x1, None)
            return i + 1, x0 + 0.5, found.at[i].set(pairs.astype(found.dtype))

        start = (0, x0, jnp.zeros((3, len(x0)), jnp.int32))
        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, start)[2]

    once = jax.jit(lambda key, x0: coupling(key, x0, X1[:5], None))
    expected = [once(jr.fold_in(KEY, i), X0[:5] + 0.5 * i) for i in range(3)]
    np.testing.assert_array_equal(loop(KEY, X0[:5], X1[:5]), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_exact_goes_on_with_a_batch_that_is_not_finite(bad):
    for x1 in (X1.at[3, 0].set(bad), X1.at[:].set(bad)):
        pairs = np.asarray(ExactOT(group=5)(KEY, X0, x1, None))
        np.testing.assert_array_equal(np.sort(pairs), np.arange(12))


def test_in_float32():
    arguments = [x.astype(jnp.float32) for x in (X0, X1, ONE_HOT)]
    for coupling in SMALL.values():
        assert jax.eval_shape(coupling, KEY, *arguments).shape == (12,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactOT(group=1), "group must be a whole number, at least 2"),
        (
            lambda: ExactOT(context_weight=-1.0),
            "context_weight must be at least 0 and finite; got -1.0",
        ),
        (
            lambda: ExactOT(context_weight=np.inf),
            "context_weight must be at least 0 and finite; got inf",
        ),
        (lambda: SinkhornOT(group=0), "got group=0"),
        (
            lambda: SinkhornOT(context_weight=np.nan),
            "context_weight must be at least 0 and finite; got nan",
        ),
        (lambda: SinkhornOT(epsilon=0.0), "epsilon must be positive and finite; got 0.0"),
        (lambda: SinkhornOT(epsilon=np.nan), "epsilon must be positive and finite; got nan"),
        (lambda: SinkhornOT(iterations=0), "got iterations=0"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
