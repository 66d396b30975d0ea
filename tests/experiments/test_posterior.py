"""The experiment on posteriors, with exact and overconfident posteriors in place of trainings."""

import dataclasses
import json
import sys
from typing import Any, NamedTuple

import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from experiments import posterior
from experiments._runner.config import Run
from experiments._tasks.simulators import TASKS
from experiments.posterior import PUBLISHED, PosteriorExperiment
from jcnf import sbi
from jcnf._checks import InputError

NOISE = np.sqrt(0.1)  # of the task gaussian_linear, and the standard deviation of its prior


pytestmark = pytest.mark.usefixtures("as_users_have_jax")


class Exact(NamedTuple):
    """The posterior N(x / 2, 0.05) of gaussian_linear, with `width` times its true width."""

    prior: sbi.Prior
    width: float

    def sample(self, key, n, x):
        rng = np.random.default_rng(np.asarray(jr.key_data(key)))
        return x[:, None] / 2 + self.width * np.sqrt(0.05) * rng.normal(size=(len(x), n, 10))

    def log_prob(self, theta, x):
        return stats.norm.logpdf(theta, x / 2, self.width * np.sqrt(0.05)).sum(axis=1)

    def save(self, path):
        path.write_bytes(b"")


@pytest.fixture
def exact(monkeypatch):
    """Replace trainings by posteriors of these widths, in turn; return the numbers of rows."""
    widths, given = [1.0], []

    def fit(prior, simulations, *, key, steps):
        given.append(len(simulations.theta))
        return Exact(prior, widths[min(len(given), len(widths)) - 1])

    monkeypatch.setattr(sbi, "fit_posterior", fit)
    return widths, given


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("references")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 10)) * np.sqrt(0.2)
    references = x[:, None] / 2 + np.sqrt(0.05) * rng.normal(size=(3, 400, 10))
    arrays = {"observation": x, "reference": references.astype(np.float32)}
    np.savez(path / "gaussian_linear.npz", **arrays)
    return path


def settings(out, **changes) -> PosteriorExperiment:
    defaults: dict[str, Any] = {"task": "gaussian_linear", "checks": 200, "draws": 19}
    return PosteriorExperiment(run=Run(out=out), simulations=100, **defaults | changes)


def results(out):
    return json.loads((out / "results.json").read_text())["rows"]


def figures(out):
    return {path.stem for path in (out / "figures").iterdir()}


def test_an_exact_posterior_passes_all_checks(exact, tmp_path, capsys):
    out = tmp_path / "run"
    posterior.run(settings(out))
    (row,) = results(out)
    checks = row["checks"]
    assert len(checks["verdicts"]) == 12  # ten parameters, coverage, TARP
    assert all(verdict["inside"] for verdict in checks["verdicts"])
    # The entropy of N(., 0.05) in 10 dimensions, and the information in x: 10 log(2) / 2 nats.
    entropy = 10 * stats.norm(0, np.sqrt(0.05)).entropy()
    assert abs(checks["nll"] - entropy) < 4.5 * checks["nll_stderr"]
    assert abs(checks["gain"] - 5 * np.log(2)) < 4.5 * checks["gain_stderr"]
    assert "c2st" not in row
    assert figures(out) == {"calibration", "ranks", "posterior"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["warnings"] == []
    assert summary["metrics"]["gain_100"] == checks["gain"]
    said = capsys.readouterr().out
    assert "SBC of theta[9]: p = " in said
    assert "OUTSIDE" not in said


def test_an_overconfident_posterior_fails_and_the_run_says_so(exact, tmp_path, capsys):
    exact[0][:] = [0.7]
    out = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"coverage: p = .*OUTSIDE the band.*too narrow"):
        posterior.run(settings(out))
    (row,) = results(out)
    coverage, tarp = row["checks"]["verdicts"][-2:]
    assert not coverage["inside"]
    assert not tarp["inside"]
    assert coverage["p_value"] < 1e-6
    assert coverage["area"] < -0.02
    assert "OUTSIDE" in capsys.readouterr().out


def test_c2st_tells_a_narrow_posterior_from_an_exact_one(exact, folder, tmp_path):
    exact[0][:] = [1.0, 0.3]
    out = tmp_path / "run"
    changes = {"folder": folder, "observations": 2, "samples": 80, "checks": 0}
    posterior.run(settings(out, budgets=(100, 1000), **changes))
    assert exact[1] == [100, 1000]
    first, second = results(out)
    assert [len(row["c2st"]) for row in (first, second)] == [2, 2]
    assert 0.35 < np.mean(first["c2st"]) < 0.65
    assert np.mean(second["c2st"]) > 0.75
    assert (first["published_npe"], second["published_npe"]) == (None, 0.694)
    assert "checks" not in first
    assert figures(out) == {"posterior-100", "posterior-1000"}
    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    assert metrics["c2st_100"] == pytest.approx(np.mean(first["c2st"]))
    assert "| 1000 | " in (out / "results.md").read_text()


def test_a_resumed_run_repeats_nothing_that_is_saved(exact, tmp_path):
    out = tmp_path / "run"
    wanted = settings(out, budgets=(100, 200), checks=0, samples=50)
    posterior.run(wanted)
    before = results(out)
    (out / "summary.json").unlink()
    (out / "results" / "200.json").unlink()
    exact[1].clear()
    posterior.run(dataclasses.replace(wanted, resume=True))
    assert exact[1] == [200]
    after = results(out)
    assert after[0] == before[0]  # with its seconds
    assert after[1] != before[1]


OWN = """
import jax.random as jr
import numpy as np
from numpyro import distributions as dist

def simulator(key, theta):
    noise = np.random.default_rng(np.asarray(jr.key_data(key))).normal(size=theta.shape)
    return theta + 0.5 * noise

prior = {"a": dist.Normal(0, 1), "b": dist.Uniform(-1, 1)}

def make_prior():
    return dist.Normal(0, 1)

def failing_prior():
    raise RuntimeError("no prior today")

def broken(key, theta):
    raise RuntimeError("out of luck")

def later(key, theta):
    if len(theta) > 2:
        raise RuntimeError("too many")
    return theta

def one(key, theta):
    return 3.0

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_simulator.py").write_text(OWN)
    (tmp_path / "imports_nothing.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_simulator", "imports_nothing"):
        sys.modules.pop(name, None)


def own_settings(out, simulator="simulator", prior="prior", module="own_simulator", **changes):
    names = {"simulator": f"{module}:{simulator}", "prior": f"{module}:{prior}"}
    return settings(out, task=None, **names, **changes)


@pytest.mark.slow
def test_a_simulator_of_ones_own_is_learned_and_saved(own, tmp_path):
    """The whole way, with a training of a few steps."""
    out = tmp_path / "run"
    wanted = own_settings(out, steps=4, checks=20, draws=9, samples=50)
    posterior.run(wanted)
    (row,) = results(out)
    assert [v["name"] for v in row["checks"]["verdicts"][:2]] == ["SBC of a", "SBC of b"]
    assert row["seconds"].keys() == {"simulate", "train", "check", "sample"}
    assert figures(out) == {"calibration", "ranks", "posterior"}
    problem = posterior.load_problem(wanted)
    found = sbi.Posterior.load(out / "results" / "posterior-100.jcnf", problem.prior)
    samples = found.sample(jr.key(0), 200, np.array([3.0, 0.0]))
    assert np.abs(samples[:, 1]).max() < 1
    assert samples[:, 0].mean() > 0.5


def test_a_function_may_make_the_prior(own, tmp_path):
    assert posterior.load_problem(own_settings(tmp_path, prior="make_prior")).prior.dim == 1


BAD = {
    "no module": ({"module": "no_such_simulator"}, "no_such_simulator.*working directory"),
    "its import": ({"module": "imports_nothing"}, "imports no_such_module"),
    "no function": ({"simulator": "other"}, "has no 'other'"),
    "not a function": ({"simulator": "number"}, "--simulator needs a function.*number"),
    "no prior": ({"prior": "number"}, "--prior own_simulator:number: expected a distribution"),
    "prior raises": ({"prior": "failing_prior"}, "--prior.*RuntimeError: no prior today"),
    "raises": ({"simulator": "broken"}, "own_simulator:broken.*RuntimeError: out of luck"),
    "one number": ({"simulator": "one"}, r"shape \(\).*expected \(2, ...\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_simulator_is_refused_before_the_run_begins(case, own, tmp_path):
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        posterior.run(own_settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_simulator_that_fails_later_ends_in_a_message(own, tmp_path):
    with pytest.raises(InputError, match="simulations 0 to 99: RuntimeError: too many"):
        posterior.run(own_settings(tmp_path / "run", simulator="later"))


def test_files_without_what_is_needed_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"no file .*two_moons.npz.*--folder"):
        posterior.run(settings(tmp_path / "run", task="two_moons", folder=folder))
    np.savez(tmp_path / "slcp.npz", observation=np.zeros((5, 8)))
    with pytest.raises(InputError, match="no array 'observation_distractors'; it has observation"):
        posterior.run(settings(tmp_path / "run", task="slcp_distractors", folder=tmp_path))
    np.savez(tmp_path / "slcp.npz", observation=np.zeros((5, 8)), reference=np.zeros((5, 9, 2)))
    with pytest.raises(InputError, match=r"observations \(m, 8\) and .*\(m, n, 5\); .*\(5, 9, 2\)"):
        posterior.run(settings(tmp_path / "run", task="slcp", folder=tmp_path))
    assert not (tmp_path / "run").exists()


def test_published_values_are_of_the_tasks_and_fall_with_simulations():
    assert PUBLISHED.keys() == TASKS.keys()
    for values in PUBLISHED.values():
        assert 1 > values[0] > values[1] > values[2] > 0.5
