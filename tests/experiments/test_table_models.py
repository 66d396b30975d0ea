"""The benchmark of table densities, on tiny tables with stand-ins for slow models."""

import json
import sys
import types
from typing import ClassVar

import jax
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from experiments import tables
from experiments._runner.config import Run
from experiments._tasks import table_models
from experiments._tasks.table_models import MODELS, Fitted
from experiments.tables import TableBenchmark
from jcnf import CNF, Flow, fields
from jcnf._checks import InputError
from jcnf.data.tables import load_table
from jcnf.distributions import StandardNormal
from jcnf.flows import Affine

QUICK = ("ours", "mixture", "kde")


class FlowDensity:
    """A stand-in for `jcnf.sklearn.FlowDensity`: a Gaussian, and a record of what it is given."""

    given: ClassVar[list] = []

    def __init__(self, random_state=0, progress=True):
        self.random_state = random_state
        self.mixture_, self.held_out_nll_ = types.SimpleNamespace(flows=()), 0.0

    def fit(self, rows):
        self.given.append((self.random_state, len(rows)))
        self.density = stats.multivariate_normal(rows.mean(0), np.cov(rows.T))
        return self

    def score_samples(self, rows):
        return self.density.logpdf(rows)


@pytest.fixture(autouse=True)
def given(monkeypatch):
    module = types.SimpleNamespace(FlowDensity=FlowDensity)
    monkeypatch.setitem(sys.modules, "jcnf.sklearn", module)
    monkeypatch.setattr(FlowDensity, "given", [])
    return FlowDensity.given


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    mixing = np.array([[1, 0.8, 0], [0, 1, 0.3], [0, 0, 2]])
    np.savetxt(path / "line.csv", rng.normal(size=(300, 3)) @ mixing, delimiter=",")
    parts = {name: rng.normal(size=(n, 2)) for name, n in (("train", 80), ("val", 30))}
    np.savez(path / "plane.npz", **parts, test=rng.normal(size=(200, 2)))
    (path / "notes.txt").write_text("not a table")
    return path


def settings(folder, out, **changes):
    defaults = {"models": QUICK, "tables": ("line", "plane"), "seconds": 0.3, "seeds": (0, 1)}
    return TableBenchmark(data=folder, run=Run(out=out), **defaults | changes)


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_models_are_measured_on_the_same_rows(folder, tmp_path, given, capsys):
    out = tmp_path / "run"
    tables.run(settings(folder, out))
    assert given == [(seed, n) for seed in (0, 1) for n in (270, 110)]
    summary = summary_of(out)
    assert summary["warnings"] == []
    assert summary["numerics"]["failed"] == 0
    metrics, report = summary["metrics"], json.loads((out / "results.json").read_text())
    table = load_table(folder / "plane.npz")
    rows = {
        model: np.mean(
            [np.load(out / "log_probs" / f"plane-{model}-{s}.npz")["log_prob"] for s in (0, 1)],
            axis=0,
        )
        for model in QUICK
    }
    ours, kde = rows["ours"], rows["kde"]
    np.testing.assert_allclose(
        ours, FlowDensity().fit(np.concatenate([table.train, table.val])).score_samples(table.test)
    )
    assert metrics["ours_plane_nll"] == pytest.approx(-ours.mean())
    assert metrics["ours_plane_nll_stderr"] == pytest.approx(ours.std(ddof=1) / np.sqrt(200))
    assert metrics["kde_plane_median"] == pytest.approx(-np.median(kde))
    assert metrics["kde_plane_trimmed"] == pytest.approx(-np.sort(kde)[2:].mean())
    assert report["plane"]["kde"]["worst_rows"] == np.argsort(kde)[:3].tolist()
    assert metrics["kde_plane_minus_ours"] == pytest.approx((ours - kde).mean())
    error = (ours - kde).std(ddof=1) / np.sqrt(200)
    assert metrics["kde_plane_minus_ours_stderr"] == pytest.approx(error)
    assert metrics["ours_plane_seeds_std"] == 0
    assert "ours_plane_minus_ours" not in metrics
    best = min(QUICK, key=lambda model: -rows[model].mean())
    assert report["plane"][best]["gap"] == 0
    said = capsys.readouterr().out
    assert "[12/12] plane, kde, seed 1: nll" in said
    assert said.count("**") == 4  # the best model of each table
    assert said.endswith((out / "results.md").read_text())
    assert (out / "figures" / "gaps.png").exists()


def test_the_others_have_as_many_seconds_as_ours_took(folder, tmp_path, given, monkeypatch):
    had = []

    def fit(table, seconds, seed):
        had.append(seconds)
        return Fitted(lambda rows: np.zeros(len(rows)), 1, {})

    monkeypatch.setitem(tables.MODELS, "kde", fit)
    out = tmp_path / "run"
    tables.run(settings(folder, out, models=("kde", "ours"), tables=("plane",), seconds=None))
    report = json.loads((out / "results.json").read_text())["plane"]["ours"]["seeds"]
    assert had == [report[seed]["seconds"] for seed in ("0", "1")]
    with pytest.raises(ValueError, match="--seconds is needed"):
        settings(folder, out, models=("kde",), seconds=None)


def test_a_resumed_run_repeats_only_what_is_missing(folder, tmp_path, given, monkeypatch):
    out = tmp_path / "run"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(tables.MODELS, "kde", stop)
        with pytest.raises(KeyboardInterrupt):
            tables.run(settings(folder, out))
    assert {path.stem for path in out.glob("log_probs/*")} == {"line-ours-0", "line-mixture-0"}
    with pytest.raises(InputError, match="unfinished run: add --resume"):
        tables.run(settings(folder, out))
    before = len(given)
    tables.run(settings(folder, out, resume=True))
    assert len(given) - before == 3
    assert summary_of(out)["numerics"]["failed"] == 0


def test_a_saved_result_of_another_table_is_refused(tmp_path):
    result = tables.Result(np.zeros(3), 1.0, np.nan, {"steps": 5}, "")
    result.save(tmp_path / "a.npz", "digest")
    loaded = tables.Result.load(tmp_path / "a.npz", "digest")
    np.testing.assert_equal(loaded._asdict(), result._asdict())
    with pytest.raises(InputError, match="changed"):
        tables.Result.load(tmp_path / "a.npz", "another")


def test_a_model_that_fails_is_reported_and_the_others_go_on(folder, tmp_path, monkeypatch):
    def broken(table, seconds, seed):
        if seed == 1:
            raise RuntimeError("no luck\nin many lines")
        log_prob = np.zeros(len(table.test))
        log_prob[7] = np.nan
        return Fitted(lambda rows: log_prob, 1, {})

    monkeypatch.setitem(tables.MODELS, "kde", broken)
    out = tmp_path / "run"
    tables.run(settings(folder, out, tables=("plane",)))
    summary = summary_of(out)
    assert summary["numerics"]["failed"] == 2
    nan, raised = (w for w in summary["warnings"] if "failed" in w)
    assert nan.startswith("plane, kde, seed 0 failed: the log-density is not finite in 1 of 200")
    assert "row 7" in nan
    assert raised == "plane, kde, seed 1 failed: no luck"
    assert "RuntimeError: no luck" in (out / "failures.txt").read_text()
    assert "| failed |" in (out / "results.md").read_text()
    assert "mixture_plane_nll" in summary["metrics"]
    assert "kde_plane_nll" not in summary["metrics"]


def test_tables_are_found_by_the_names_of_their_files(folder, tmp_path):
    assert [*tables.load_tables(settings(folder, None, tables=()))] == ["line", "plane", "digits"]
    assert [*tables.load_tables(settings(None, None, tables=()))] == ["digits"]
    for name in ("line.csv", "plane.npz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "line.npz").write_bytes((folder / "plane.npz").read_bytes())
    chosen = settings(tmp_path, None, tables=("line.npz", "plane"))
    assert [*tables.load_tables(chosen)] == ["line.npz", "plane"]
    with pytest.raises(InputError, match=r"line; there are line\.csv, line\.npz, plane, dig"):
        tables.load_tables(settings(tmp_path, None, tables=("line",)))
    with pytest.raises(InputError, match="--data must be a folder"):
        tables.load_tables(settings(folder / "line.csv", None))


def test_the_size_of_a_mixture_is_the_number_of_its_free_parameters(folder):
    table = load_table(folder / "line.csv")
    for kind in table_models.COVARIANCES:
        from sklearn.mixture import GaussianMixture

        model = GaussianMixture(4, covariance_type=kind).fit(table.train)
        free = 3 + 4 * 3 + table_models._covariance_size(kind, 4, 3)
        assert free == model._n_parameters()


def test_the_size_of_ours_counts_trained_networks_and_normal_distributions():
    field = fields.MLP(3, (4,), time="ignore", key=jr.key(0))
    flows = CNF(field, StandardNormal(3)), Flow(Affine(np.ones(3), np.eye(3)), StandardNormal(3))
    assert [table_models._flow_size(flow) for flow in flows] == [4 * 4 + 3 * 5, 6]


def test_a_grid_ends_with_the_seconds_and_passes_over_what_fails():
    class Model:
        def __init__(self, value):
            if value == 1:
                raise ValueError("singular")
            self.value = value

        def score_samples(self, rows):
            return self.value * np.ones(len(rows))

    grid = [{"value": value} for value in (1, 2, 5, 3)]
    rows = np.zeros((4, 1))
    model, chosen = table_models._best(Model, grid, rows, 100.0)
    assert (model.value, chosen) == (5, {"value": 5, "settings_tried": 4})
    model, chosen = table_models._best(Model, grid, rows, 0.0)
    assert chosen == {"value": 2, "settings_tried": 2}
    with pytest.raises(ValueError, match="singular"):
        table_models._best(Model, grid[:1], rows, 100.0)


def test_kernels_of_a_large_table_are_put_on_some_of_its_rows(folder, monkeypatch):
    monkeypatch.setattr(table_models, "MAX_KERNELS", 50)
    table = load_table(folder / "line.csv")
    fitted = MODELS["kde"](table, 1.0, 0)
    assert fitted.note == "kernels on 50 of 240 training rows only"
    assert fitted.size == 50 * 3
    assert fitted.log_prob(table.test).shape == (30,)


@pytest.mark.parametrize("name", ["spline", "maf"])
def test_autoregressive_flows_are_densities_near_that_of_the_table(name, folder):
    pytest.importorskip("flowjax")
    table = load_table(folder / "plane.npz")
    # flowjax relies on the promotions that the tests forbid.
    line = np.linspace(-10, 10, 101)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        fitted = MODELS[name](table, 0.1, 0)
        mass = np.exp(fitted.log_prob(grid)).sum() * 0.2**2
        log_prob = fitted.log_prob(table.test)
    assert mass == pytest.approx(1, abs=0.03)
    gaussian = stats.norm.logpdf(table.test).sum(axis=1)
    assert log_prob.mean() == pytest.approx(gaussian.mean(), abs=1)
    assert fitted.size > 1000
    assert fitted.chosen["steps"] >= 1
