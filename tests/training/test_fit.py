"""`jcnf.fit`: its result, the rows that it holds out, when it stops, and how it goes on."""

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
from jcnf.training import Snapshot, checkpoint

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
        ({"callbacks": print}, "callbacks must be a sequence"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"start": "checkpoint"}, "start must be a Snapshot"),
        ({"data": (X, X[:3])}, "equal numbers of rows"),
        ({"data": X[:1]}, "leaves none of the 1 rows"),
        ({"data": X.tolist()}, "data must be an array"),
        ({"data": {"x": X}, "batch": lambda key, data: data["x"]}, "validation=0.1, data must be"),
        ({"flow": mlp(2, ())}, "expected a flow.*; got one of type MLP"),
        ({"data": lambda key, num: [X, X]}, r"data\(key, num\) returns must .* got a list"),
        ({"validation": X.tolist()}, "validation must be .* got a list"),
        ({"validation": X[:, :1]}, r"validation must be .*'rows', 2\); got \('rows', 1\)"),
        ({"validation": (X, X)}, "validation must be of the form of data"),
        ({"validation": (X, X[:3])}, "validation must be .* equal numbers of rows"),
        ({"validation": np.where(X > 2, np.nan, X)}, "validation has NaN or inf"),
        ({"data": np.where(X > 2, np.nan, X)}, "NaN or inf"),
    ],
)
def test_fit_refuses_bad_arguments(settings, message):
    arguments = {"flow": flow(), "data": X, **SMALL} | settings
    with pytest.raises(ValueError, match=message):
        jcnf.fit(key=jr.key(0), **arguments)


TARGET = jnp.array([1.0, -2.0])


def squares(model, x, key):
    """(w - target)^2 with noise; the solve fails where w[0] is above 0.55."""
    loss = jnp.sum((model["w"] - TARGET + 0.1 * jnp.mean(x, axis=0) + 0.1 * jr.normal(key)) ** 2)
    return loss, {"failed": model["w"][0] > 0.55}


def distance(model):
    return float(jnp.sum((model["w"] - TARGET) ** 2))


def quick_fit(**settings):
    """Fit a model that compiles quickly."""
    settings = {
        **{"objective": squares, "steps": 40, "every": 8, "batch": 16, "validate_every": 16},
        **{"optimizer": optax.adam(0.01), "validation": distance, "average": 0.9},
        **{"progress": False} | settings,
    }
    return jcnf.fit({"w": jnp.zeros(2)}, X, key=jr.key(3), **settings)


@pytest.fixture(scope="module")
def whole():
    return quick_fit()


def without_seconds(result):
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]
    return history, result.flow, result.snapshot._replace(seconds=0.0)


def assert_the_same(result, other):
    for one, two in zip(without_seconds(result), without_seconds(other), strict=True):
        assert eqx.tree_equal(one, two)


def test_fit_ends_where_a_callback_says_so_and_ignores_other_answers(whole):
    answers = [lambda progress: np.asarray(progress.step) >= 16, lambda progress: "written"]
    result = quick_fit(callbacks=answers)
    assert [record["step"] for record in result.history] == [8, 16]
    assert_the_same(quick_fit(callbacks=answers[1:]), whole)


def test_fit_validates_at_the_first_record_after_so_many_steps_and_at_the_end(whole):
    assert [record["step"] for record in whole.history] == [8, 16, 24, 32, 40]
    assert [record["step"] for record in whole.history if "score" in record] == [16, 32, 40]
    seconds = [record["seconds"] for record in whole.history]
    assert 0 < seconds[0] < seconds[-1] == whole.snapshot.seconds


def test_fit_interrupted_goes_on_bit_for_bit_from_a_snapshot_on_disk(whole, tmp_path):
    """Some of the stops are at records, some at validations, and some between them."""
    start, history, file = None, [], tmp_path / "snapshot"
    like = Snapshot.first({"w": jnp.zeros(2)}, optax.adam(0.01)).arrays
    for stop in (1, 8, 9, 16, 17, None):
        part = quick_fit(start=start, interrupt=lambda at, stop=stop: at.step == stop)
        assert part.snapshot.step == (stop or 40)
        checkpoint.save(file, part.snapshot.arrays, part.snapshot.numbers)
        start = Snapshot.restored(*checkpoint.load(file, like))
        history += part.history
    assert_the_same(part._replace(history=history, snapshot=start), whole)


def test_fit_goes_on_from_the_snapshot_that_a_callback_returns(whole):
    kept, steps = [], []

    def back_once(progress):
        steps.append(progress.step)
        if progress.step == 16:
            kept.append(progress.snapshot)
        return kept[0] if steps.count(24) == 1 and progress.step == 24 else None

    result = quick_fit(callbacks=[back_once])
    assert steps == [8, 16, 24, 24, 32, 40]
    assert_the_same(result, whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": lambda model: None}, "validation must return a number; got None"),
        ({"validation": lambda model: model["w"]}, "validation must return a number"),
        ({"objective": lambda model, x, key: jnp.sum(model["w"])}, "return a pair"),
        ({"objective": lambda model, x, key: (model["w"], {})}, r"the loss of shape \(2,\)"),
        ({"objective": lambda model, x, key: (model["w"][0], {"x": x[0]})}, r"'x' of shape \(2,\)"),
    ],
)
def test_fit_refuses_functions_that_do_not_return_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        quick_fit(**settings)


def test_fit_whose_validations_are_not_finite_warns():
    with pytest.warns(UserWarning, match="no validation gave a finite score"):
        quick_fit(validation=lambda model: np.nan)


def test_fit_that_is_stuck_asks_the_callbacks_and_then_ends_with_a_warning():
    told = []
    settings = {"optimizer": optax.sgd(0.1), "steps": 100, "max_skips": 5}
    with pytest.warns(UserWarning, match="ended before step 100, after 5 skipped updates in a row"):
        result = quick_fit(callbacks=[told.append], **settings)
    assert [progress.stuck for progress in told] == [False] * (len(told) - 1) + [True]
    assert result.history[-1]["step"] == told[-1].step == result.snapshot.step < 100
    assert distance(result.flow) == result.snapshot.lowest < distance({"w": jnp.zeros(2)})
    firsts = [progress.snapshot for progress in told if not progress.stuck][:1]
    back = lambda progress: firsts.pop() if progress.stuck and firsts else None  # noqa: E731
    with pytest.warns(UserWarning, match="were skipped"):
        again = quick_fit(callbacks=[back], **settings)
    assert eqx.tree_equal(again.flow, result.flow)
    assert not firsts


def test_fit_that_never_learned_raises():
    def failing(model, x, key):
        return jnp.sum(model["w"]), {"failed": jnp.asarray(True)}

    with pytest.raises(RuntimeError, match="nothing was learned: 40 of 40 updates"):
        quick_fit(objective=failing)


def test_fit_draws_batches_by_a_function_of_the_data():
    def draw(key, tables):
        return tables["x"][:4] + jr.normal(key)

    def objective(model, x, key):
        return jnp.sum(model["w"] * jnp.mean(x, axis=0)), {"rows": jnp.asarray(float(len(x)))}

    result = jcnf.fit(
        *({"w": jnp.zeros(2)}, {"x": X, "unused": X[:3]}),
        key=jr.key(0),
        objective=objective,
        **SMALL | {"batch": draw, "validation": None, "optimizer": optax.sgd(0.1)},
    )
    assert [record["rows"] for record in result.history] == [4.0] * 4
