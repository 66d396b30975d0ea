"""`jcnf.fit`: its result, the rows that it holds out, and when it stops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import mlp

import jcnf
from jcnf import CNF, objectives
from jcnf.distributions import StandardNormal

pytestmark = pytest.mark.usefixtures("promotion")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 2)) * [0.5, 2.0] + [1.0, -1.0]
SMALL = {"batch": 64, "steps": 40, "every": 10, "progress": False}


@pytest.fixture(scope="module")
def promotion():
    """Optax's Adam mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def flow():
    return CNF(mlp(2, ()), StandardNormal(2))


def test_fit_learns_a_gaussian():
    result = jcnf.fit(
        flow(),
        X,
        key=jr.key(0),
        steps=1500,
        batch=128,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.02, 1500)),
        progress=False,
    )
    nll = -jnp.mean(jcnf.log_prob(result.flow, jnp.asarray(X)))
    entropy = np.log(2 * np.pi * np.e) + np.linalg.slogdet(np.cov(X.T))[1] / 2
    assert entropy - 0.01 < nll < entropy + 0.05
    assert len(result.history) == 50
    assert [record["step"] for record in result.history] == list(range(30, 1501, 30))


def test_fit_returns_the_best_parameters_and_ends_without_patience():
    told = []

    result = jcnf.fit(
        flow(),
        X,
        key=jr.key(0),
        optimizer=optax.sgd(0.3),
        validation=lambda model: float(len(told)),
        patience=2,
        callbacks=[lambda progress: told.append(progress)],
        average=0.0,
        **SMALL,
    )
    assert [progress.step for progress in told] == [10, 20, 30]
    assert [record["score"] for record in result.history] == [0.0, 1.0, 2.0]
    assert eqx.tree_equal(result.flow, told[0].flow)
    assert not eqx.tree_equal(result.flow, told[-1].flow)


def test_fit_ends_where_a_callback_says_so():
    result = jcnf.fit(
        flow(),
        X,
        key=jr.key(0),
        callbacks=[lambda progress: progress.step >= 20, lambda progress: None],
        **SMALL,
    )
    assert [record["step"] for record in result.history] == [10, 20]


def test_fit_of_the_same_key_is_the_same_to_the_bit_and_of_others_is_not():
    first, again, other = (jcnf.fit(flow(), X, key=jr.key(i), **SMALL) for i in (0, 0, 1))
    assert eqx.tree_equal(first.flow, again.flow)
    assert not eqx.tree_equal(first.flow, other.flow)
    for one, two in zip(first.history, again.history, strict=True):
        assert one | {"seconds": 0} == two | {"seconds": 0}


def test_fit_holds_rows_out():
    seen = []

    def objective(model, x, key):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return objectives.flow_matching(model, x, key)

    jcnf.fit(flow(), X, key=jr.key(0), objective=objective, validation=0.25, **SMALL)
    rows = {tuple(row) for batch in seen for row in batch}
    assert 250 < len(rows) <= 300
    assert rows <= {tuple(row) for row in X}


@pytest.mark.parametrize("kind", ["pair", "sampler", "sampler of pairs", "likelihood"])
def test_fit_takes(kind):
    context_dim = 2 if "pair" in kind else 0
    model = CNF(mlp(2, (4,), context_dim=context_dim), StandardNormal(2))

    def sample(key, num):
        x = jr.normal(key, (num, 2))
        return (x, x) if kind == "sampler of pairs" else x

    data = {"pair": (X, X), "likelihood": X}.get(kind, sample)
    solving = {"objective": objectives.likelihood, "solve": jcnf.Solve("heun", step=0.5)}
    settings = solving if kind == "likelihood" else {}
    result = jcnf.fit(model, data, key=jr.key(0), **SMALL, **settings)
    losses = [record["val_nll"] for record in result.history]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"every": 0}, "every"),
        ({"validation": 1.5}, "validation"),
        ({"validation": None, "patience": 3}, "patience"),
        ({"callbacks": ["print"]}, "callbacks"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"data": (X, X[:3])}, "equal numbers of rows"),
        ({"data": X[:1]}, "leaves none of the 1 rows"),
        ({"data": np.where(X > 2, np.nan, X)}, "NaN or inf"),
    ],
)
def test_fit_refuses_bad_arguments(settings, message):
    arguments = {"data": X, **SMALL} | settings
    with pytest.raises(ValueError, match=message):
        jcnf.fit(flow(), key=jr.key(0), **arguments)
