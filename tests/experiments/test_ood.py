"""Out-of-distribution detection: densities made by hand, the whole command, and bad input."""

import dataclasses
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments import ood
from experiments._runner.cli import main
from experiments._runner.config import Run
from experiments._runner.run_dir import RunDir
from experiments._tasks import ood_data
from experiments._tasks.image_data import held_out
from experiments._tasks.ood_data import ImageModel
from experiments._tasks.tables import TableFile, TableFlow
from experiments.nice import Couplings, ImageNICE, PlaneNICE
from jcnf import CNF, Exact, Solve, evaluate, fields, training
from jcnf.data.images import load_digits_parts
from jcnf.data.tables import load_table
from jcnf.distributions import StandardNormal
from jcnf.evaluate import Auroc
from jcnf.flows import calibrated

SOLVE = Solve(rtol=1e-6, atol=1e-6)


def table_run(folder, data, context=()):
    """Save a run whose network is 0, so that its density is a standard normal."""
    settings = TableFlow(table=TableFile(data=data, context=context), run=Run(out=folder))
    table = load_table(data)
    flow = settings.make_flow(table.test.shape[1] - len(context), len(context))
    run_dir = RunDir("density", settings)
    params = jax.tree.map(jnp.zeros_like, training.partition(flow)[0])
    notes = {"table": table.scale.to_json(), "warnings": []}
    run_dir.save_flow(training.with_params(flow, params), notes)
    return folder


def digits_run(folder):
    """Save a run of NICE on the digits, calibrated but not trained."""
    flow = dataclasses.replace(ImageNICE().flow, widths=(4,))
    settings = ImageNICE(flow=flow, run=Run(out=folder))
    x = held_out(load_digits_parts()["train"].pixels, 17, 0, jr.key(0))
    RunDir("nice", settings).save_flow(calibrated(settings.make_flow(64), x), {"classes": 0})
    return folder


@pytest.fixture(scope="module")
def normals(tmp_path_factory):
    """Rows of a normal distribution in the plane, and of normals half and twice as wide."""
    folder, rng = tmp_path_factory.mktemp("normals"), np.random.default_rng(0)
    x, units = rng.normal(size=(5, 2000, 2)), np.array([1.0, 100.0])
    np.savez(folder / "all.npz", train=np.concatenate(x[:2]) * units, test=x[2] * units)
    np.save(folder / "half.npy", x[3] / 2 * units)
    np.save(folder / "twice.npy", x[4] * 2 * units)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return digits_run(tmp_path_factory.mktemp("digits") / "run")


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ood", *map(str, words)])
    main(ood.run, ood.OOD)


def test_normals_are_told_apart_as_they_must_be(normals, tmp_path, monkeypatch, capsys):
    run = table_run(tmp_path / "run", normals / "all.npz")
    words = ["--outside", normals / "half.npy", normals / "twice.npy", "--background", run]
    command(monkeypatch, "--from", run, *words, "--count", 2000)
    summary = json.loads((run / "ood" / "summary.json").read_text())
    metrics = summary["metrics"]
    for name, scale in {"half": 0.5, "twice": 2.0}.items():
        # |z|^2 / 2 is exponential inside, and scale^2 times an exponential outside.
        rate = scale**2
        truth = {"likelihood": rate / (1 + rate), "ratio": 0.5}
        truth["typicality"] = typical(rate)
        for score, value in truth.items():
            stderr = metrics[f"auroc_{score}_{name}_stderr"]
            assert metrics[f"auroc_{score}_{name}"] == pytest.approx(value, abs=4 * stderr + 0.02)
        # log_prob is in nats, in the units of the table.
        nats = -math.log(2 * math.pi * 100) - rate
        assert metrics[f"log_prob_{name}"] == pytest.approx(nats, abs=0.15 * max(rate, 1))
    assert metrics["auroc_likelihood_uniform_noise"] > 0.8
    assert metrics["auroc_likelihood_permuted"] == pytest.approx(0.5, abs=0.06)
    half = [line for line in summary["warnings"] if " half " in line]
    assert len(half) == 1
    assert "MORE likely" in half[0]
    assert "no other score can" in half[0]
    assert any("hardly tell permuted" in line for line in summary["warnings"])
    assert set(summary["numerics"].values()) == {0}
    assert (run / "ood" / "figures" / "separation.png").exists()
    assert "half" in capsys.readouterr().out


def typical(rate):
    """P(|rate e - 1| > |E - 1|) of independent exponentials e and E."""
    e = -np.log1p(-(np.arange(1000) + 0.5) / 1000)
    near = np.abs(e - 1)
    return np.mean(np.abs(rate * e - 1)[:, None] > near)


def test_digits_are_told_from_noise_and_from_files(trained, tmp_path, monkeypatch):
    flat = np.random.default_rng(0).integers(120, 136, size=(30, 1, 1))
    np.savez(tmp_path / "gray.npz", x_test=np.broadcast_to(flat, (30, 8, 8)).astype(np.uint8))
    words = ["--outside", tmp_path / "gray.npz", "--out", tmp_path / "out", "--count", 100]
    command(monkeypatch, "--from", trained, *words)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    metrics = summary["metrics"]
    sets = ["uniform_noise", "shuffled", "gray"]
    scores = ["likelihood", "typicality", "complexity"]
    aurocs = {f"auroc_{score}_{name}" for score in scores for name in sets}
    bits = {f"bits_per_dim_{name}" for name in ["test", *sets]}
    assert set(metrics) == aurocs | {f"{name}_stderr" for name in aurocs} | bits
    assert all(0 <= metrics[name] <= 1 for name in aurocs)
    # A calibrated NICE knows which pixels are dark, and noise does not follow that.
    assert metrics["auroc_likelihood_uniform_noise"] > 0.95
    assert metrics["auroc_likelihood_shuffled"] > 0.95
    assert metrics["bits_per_dim_test"] < metrics["bits_per_dim_shuffled"]
    assert set(summary["numerics"]) == {f"failures_{n}" for n in ["training", "test", *sets]}


def test_files_are_read_in_the_gray_values_of_the_run(trained, tmp_path):
    from experiments._tasks.ood_data import load_model, load_sets

    _, settings = load_model(trained)
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    np.savez(tmp_path / "every.npz", x=every)
    np.savez(tmp_path / "dark.npz", x=every // 16)
    files = [tmp_path / "every.npz", tmp_path / "dark.npz"]
    sets = load_sets(trained, settings, files, 1000, 0)
    levels = np.floor(np.linspace(0, 17, 256, endpoint=False)).reshape(4, 64)
    np.testing.assert_array_equal(sets.pixels["every"], levels)
    assert len(sets.warnings) == 1
    assert "dark.npz" in sets.warnings[0]
    test = load_digits_parts()["test"].pixels
    np.testing.assert_array_equal(sets.pixels["test"], test)
    np.testing.assert_array_equal(np.floor(sets.x["test"] * 17), test)
    # Shuffling keeps the gray values of each image.
    np.testing.assert_array_equal(np.sort(sets.pixels["shuffled"]), np.sort(test))
    assert (sets.pixels["shuffled"] != test).any(axis=1).all()


def test_of_classes_the_density_is_their_mixture():
    key, draw_key = jr.split(jr.key(0))
    flow = CNF(fields.MLP(2, (4,), context_dim=3, key=key), StandardNormal(2))
    x = np.random.default_rng(0).normal(size=(4, 2))
    model = ImageModel(flow, (1, 2, 1), 3, Exact(), 4)
    each = [
        evaluate.log_prob(
            flow, jnp.asarray(x), context=jnp.tile(jnp.eye(3)[k : k + 1], (4, 1)), solve=SOLVE
        ).log_prob
        for k in range(3)
    ]
    assert np.ptp(each, axis=0).min() > 1e-3
    mixture = np.log(np.mean(np.exp(each), axis=0))
    np.testing.assert_allclose(model.log_prob(x, draw_key, SOLVE), mixture, rtol=1e-12)


def test_a_density_given_columns_scores_the_others(normals, tmp_path, monkeypatch):
    run = table_run(tmp_path / "run", normals / "all.npz", context=("1",))
    # Only the second column is modeled, given the first, whose unusual values do not count.
    x = np.load(normals / "all.npz")["test"] * [1000, 1]
    np.save(tmp_path / "far.npy", x)
    command(monkeypatch, "--from", run, "--outside", tmp_path / "far.npy")
    metrics = json.loads((run / "ood" / "summary.json").read_text())["metrics"]
    assert metrics["auroc_likelihood_far"] == pytest.approx(0.5, abs=1e-9)
    nats = -0.5 * math.log(2 * math.pi * 100**2) - 0.5
    assert metrics["log_prob_test"] == pytest.approx(nats, abs=0.1)


def test_points_without_a_density_are_the_strangest_and_counted():
    log_prob = {"test": np.array([-1.0, -2.0, -3.0, -4.0]), "far": np.array([np.nan, -2.5])}
    sets = ood_data.Sets(log_prob, np.zeros(1), [])
    scores = ood.scores_of(sets, log_prob, np.array([-2.5]))
    assert scores["likelihood"]["far"].tolist() == [np.inf, 2.5]
    assert scores["typicality"]["far"].tolist() == [np.inf, 0.0]
    aurocs = ood.aurocs_of(scores)
    assert aurocs["likelihood"]["far"].value == (1 + 0.5) / 2
    assert ood.mean_of(sets, log_prob["far"]) == -2.5
    assert ood.lost(log_prob) == [
        "the solve failed for 1 of 2 points of far: they have no density and count as the most "
        "unusual"
    ]


def test_warnings_are_plain():
    def found(**values):
        return {score: {"shoes": Auroc(value, 0.01)} for score, value in values.items()}

    assert ood.verdicts(found(likelihood=0.21, typicality=0.7, complexity=0.97)) == [
        "likelihood ranks shoes as MORE likely than the run's own test data (AUROC 0.21): it "
        "cannot tell them apart; complexity can (0.97)"
    ]
    assert ood.verdicts(found(likelihood=0.49, typicality=0.7)) == [
        "likelihood can hardly tell shoes from the run's own test data (AUROC 0.49); no other "
        "score can (the best is typicality, 0.70)"
    ]
    assert ood.verdicts(found(likelihood=0.9, typicality=0.1)) == []


BAD = {
    "--from none": "none/flow.jcnf",
    "--from unfinished": "not finished training.*--resume",
    "--from toy": "PlaneNICE.*images, density",
    "--from digits --count 1": "--count",
    "--from digits --test-tolerance 0": "--test-tolerance",
    "--from digits --outside gone.npz": "gone.npz",
    "--from digits --outside wide.npz": "wide.npz: .*8x8x1.*8x9x1",
    "--from digits --outside small.npz sub/small.npz": "sub/small.npz.*called small.*rename",
    "--from digits --outside test.npz": "called test",
    "--from table --outside one.npy": "one.npy",
    "--from moved": "gone.npz.*does not exist.*restore it",
    "--from changed": "changed.npy.*has changed",
    "--from digits --background table": "--background",
    "--from digits --background none": "none/flow.jcnf",
    "--from digits --out done": "done holds a finished run",
}


@pytest.fixture(scope="module")
def bad(normals, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "digits").symlink_to(trained)
    rows = np.random.default_rng(0).normal(size=(100, 2))
    np.save(folder / "changed.npy", rows)
    table_run(folder / "table", normals / "all.npz")
    table_run(folder / "changed", folder / "changed.npy")
    np.savez(folder / "gone.npz", rows=rows)
    table_run(folder / "moved", folder / "gone.npz")
    (folder / "gone.npz").unlink()
    np.save(folder / "changed.npy", rows[::-1] * 2)
    np.save(folder / "one.npy", np.zeros((4, 1)))
    (folder / "sub").mkdir()
    for name in ("small", "sub/small", "test"):
        np.savez(folder / f"{name}.npz", x=np.zeros((3, 8, 8), np.uint8))
    np.savez(folder / "wide.npz", x=np.zeros((3, 8, 9), np.uint8))
    toy = PlaneNICE(flow=Couplings(widths=(3,), couplings=2), run=Run(out=folder / "toy"))
    RunDir("nice", toy).save_flow(toy.make_flow(2), {})
    RunDir("nice", ImageNICE(run=Run(out=folder / "unfinished")))
    (folder / "done").mkdir()
    (folder / "done" / "summary.json").write_text("{}")
    return folder


@pytest.mark.parametrize("line", BAD)
def test_bad_input_says_what_to_do_and_leaves_nothing_behind(line, bad, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    before = sorted(bad.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *line.split())
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(BAD[line], said), said
    assert sorted(bad.rglob("*")) == before
