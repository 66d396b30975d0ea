"""The experiments as a user runs them: whole runs, resuming, and messages for bad input."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jcnf import CNF
from jcnf.distributions import StandardNormal
from jcnf.fields import Field

SMALL = ["--widths", "8", "--batch", "32", "--validate-every", "4", "--log-every", "2"]
SMALL += ["--checkpoint-every", "4"]
PLANAR = ["--widths", "8", "4"]
PICTURES = ["--test-images", 20, "--validation-images", 20]
FEW = ["--test-points", "50", "--widths", "8", "--batch", "16"]


def command(name, *words):
    return [sys.executable, "-m", f"experiments.{name}", *map(str, words)]


def run(name, *words):
    return subprocess.run(command(name, *words), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    done = run("toy2d", "--out", out, "--steps", 10, "--test-points", 5000, "--cells", 60, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 2]]) * 100 + 7
    np.savetxt(path, x, delimiter=",", header="a,b,c", comments="")
    return path


@pytest.fixture(scope="module")
def density_run(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("density") / "run"
    done = run("density", "--data", table, "--out", out, "--steps", 10, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_everything_it_promises(toy_run):
    out, done = toy_run
    summary = json.loads((out / "summary.json").read_text())
    assert summary["experiment"] == "toy2d"
    assert summary["config"]["steps"] == 10
    assert set(summary) == {
        "experiment", "config", "metrics", "numerics", "timing", "warnings", "environment"
    }  # fmt: skip
    metrics = summary["metrics"]
    assert metrics["nll_gap"] == pytest.approx(metrics["test_nll"] - metrics["entropy"], abs=0.1)
    numerics = summary["numerics"]
    assert numerics["mass"] == pytest.approx(1, abs=0.01)
    assert numerics["solver_failures"] == numerics["skipped_updates"] == 0
    assert numerics["roundtrip_error"] < 1e-3
    assert 0 < numerics["log_prob_error"] <= numerics["log_prob_error_max"] < 1e-2
    assert numerics["nfe_backward"] > 0
    assert summary["warnings"] == []
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10]
    assert [r["step"] for r in records if "val_nll" in r] == [4, 8, 10]
    figures = {path.name for path in (out / "figures").iterdir()}
    assert figures == {
        "densities.png", "trajectories.png", "snapshots.png", "training.png", "flow.gif"
    }  # fmt: skip
    assert "nll_gap" in done.stdout
    assert str(out) in done.stdout


def test_a_finished_run_is_never_overwritten(toy_run):
    out, _ = toy_run
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags in ([], ["--resume"]):
        again = run("toy2d", "--out", out, "--steps", 10, *SMALL, *flags)
        assert again.returncode == 2
        assert again.stderr.strip() == f"error: {out} holds a finished run: choose another --out"
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_density_scores_in_the_units_of_the_data(density_run, table, tmp_path):
    summary = json.loads((density_run / "summary.json").read_text())
    metrics = summary["metrics"]
    x = np.loadtxt(table, delimiter=",", skiprows=1)
    # The standard deviations of the training part are close to those of the whole table.
    log_std = np.log(x.std(axis=0)).sum()
    assert metrics["test_nll_original"] - metrics["test_nll"] == pytest.approx(log_std, abs=0.2)

    done = run(
        "density", "--from", density_run, "--score", table, "--samples", 2000, "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    log_prob = np.loadtxt(tmp_path / "log_prob.csv", skiprows=1)
    assert log_prob.shape == (600,)
    assert -log_prob.mean() == pytest.approx(metrics["test_nll_original"], abs=0.5)
    samples = np.loadtxt(tmp_path / "samples.csv", delimiter=",", skiprows=1)
    assert samples.shape == (2000, 3)
    assert (tmp_path / "samples.csv").read_text().startswith("a,b,c\n")
    # The hardly trained flow is near its base: its samples have the center and scale of the data.
    np.testing.assert_allclose(samples.mean(axis=0), x.mean(axis=0), atol=0.5 * x.std(axis=0).min())

    again = run("density", "--from", density_run, "--score", table, "--out", tmp_path)
    assert again.returncode == 2
    assert "log_prob.csv exists" in again.stderr


@pytest.mark.slow
def test_density_given_a_column_scores_and_samples_the_others(table, tmp_path):
    out = tmp_path / "run"
    words = ["--data", table, "--out", out, "--context", "a", "2"]
    done = run("density", *words, "--steps", 10, *SMALL)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    metrics = summary["metrics"]
    x = np.loadtxt(table, delimiter=",", skiprows=1)
    # The density is of c alone, in its units.
    assert metrics["test_nll_original"] - metrics["test_nll"] == pytest.approx(
        np.log(x[:, 2].std()), abs=0.2
    )
    samples = np.loadtxt(out / "samples.csv", delimiter=",", skiprows=1)
    # The given columns come from test rows.
    known = {tuple(row) for row in np.round(x[:, :2], 2)}
    assert {tuple(row) for row in np.round(samples[:50, :2], 2)} <= known

    again = tmp_path / "again"
    words = ["--from", out, "--score", table, "--samples", 3, "--out", again]
    refused = run("density", *words)
    assert refused.returncode == 2
    assert "--given" in refused.stderr
    (tmp_path / "given.csv").write_text("a,b\n100,50\n-80,7\n")
    done = run("density", *words, "--given", tmp_path / "given.csv")
    assert done.returncode == 0, done.stderr
    drawn = np.loadtxt(again / "samples.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(drawn[:, :2], [[100, 50], [-80, 7], [100, 50]], rtol=1e-4)
    assert np.loadtxt(again / "log_prob.csv", skiprows=1).shape == (600,)


BAD = {
    "unknown toy": (["toy2d", "--data", "8gausians"], ["8gaussians", "checkerboard"]),
    "unknown time": (["toy2d", "--field", "mlp", "--time", "gate"], ["gate", "concatsquash"]),
    "unknown solver": (["toy2d", "--solver", "rk9"], ["rk9", "dopri5"]),
    "unknown base": (["toy2d", "--base", "cauchy"], ["cauchy", "logistic"]),
    "euler without step": (["toy2d", "--solver", "euler"], ["step"]),
    "no steps": (["toy2d", "--steps", "0"], ["--steps"]),
    "negative rate": (["toy2d", "--learning-rate", "-1"], ["--learning-rate"]),
    "width 0": (["toy2d", "--widths", "0"], ["--widths", "(0,)"]),
    "resume without out": (["toy2d", "--resume"], ["--out"]),
    "negative seed": (["toy2d", "--seed", "-1"], ["--seed"]),
    "step too small": (["toy2d", "--fixed-step", "1e-4"], ["--fixed-step", "--max-steps"]),
    "resume nothing": (["toy2d", "--resume", "--out", "nowhere"], ["nowhere", "--resume"]),
    "out in a file": (["toy2d", "--out", "text.csv/run"], ["text.csv/run", "--out"]),
    "out of something else": (["toy2d", "--out", "."], ["not empty", "--out"]),
    "no data": (["density"], ["--data", "--from"]),
    "missing file": (["density", "--data", "none.csv"], ["none.csv"]),
    "text": (["density", "--data", "text.csv"], ["row 2", "column 2", "'high'", "drop="]),
    "NaN": (["density", "--data", "nan.csv"], ["row 3", "column 1"]),
    "constant": (["density", "--data", "constant.csv"], ["constant", "drop="]),
    "duplicated": (["density", "--data", "copy.csv"], ["copies", "drop="]),
    "unknown objective": (["toy2d", "--objective", "elbo"], ["elbo", "flow_matching"]),
    "unknown path": (["toy2d", "--path", "round"], ["round", "linear"]),
    "unknown coupling": (["toy2d", "--coupling", "ot"], ["ot", "sinkhorn"]),
    "unknown times": (["toy2d", "--times", "early"], ["early", "lattice"]),
    "regularizers of no use": (
        ["toy2d", "--regularizers", "hjb", "1"],
        ["--regularizers", "likelihood"],
    ),
    "context of a run": (["density", "--from", "r", "--samples", "3", "--drop", "a"], ["--drop"]),
    "couplings of no use": (
        ["toy2d", "--objective", "likelihood", "--coupling", "exact"],
        ["--coupling", "flow_matching"],
    ),
    "unknown schedule": (["toy2d", "--schedule", "linear"], ["linear", "cosine"]),
    "a batch of no use": (["toy2d", "--lbfgs-batch", "8"], ["--lbfgs-batch", "--lbfgs-steps"]),
    "L-BFGS without reverse mode": (
        ["toy2d", "--objective", "likelihood", "--lbfgs-steps", "3", "--adjoint", "forward"],
        ["L-BFGS", "--adjoint"],
    ),
    "L-BFGS on no samples": (
        ["toy2d", "--lbfgs-steps", "3", "--lbfgs-batch", "0"],
        ["--lbfgs-batch"],
    ),
    "scale of no use": (
        ["toy2d", "--base", "logistic", "--base-scale", "2"],
        ["--base-scale", "normal"],
    ),
    "scale 0": (["toy2d", "--base-scale", "0"], ["--base-scale"]),
    "fewer than no dimensions": (["toy2d", "--augment", "-1"], ["--augment"]),
    "tolerance under a fixed step": (
        ["toy2d", "--objective", "likelihood", "--fixed-step", "0.1", "--rtol", "1e-6"],
        ["--rtol", "--fixed-step"],
    ),
    "activation of no use": (
        ["toy2d", "--field", "planar", "--widths", "8", "4", "--activation", "tanh"],
        ["--activation", "mlp"],
    ),
    "noise of no use": (
        ["toy2d", "--objective", "likelihood", "--noise", "gaussian"],
        ["--noise", "hutchinson"],
    ),
    "rk4 without step": (["toy2d", "--solver", "rk4"], ["step"]),
    "unequal blocks": (["toy2d", "--widths", "8", "9"], ["resnet", "one width"]),
    "negative patience": (["toy2d", "--patience", "-1"], ["--patience"]),
    "dropping no context": (["toy2d", "--drop-context", "0.2"], ["drop_context", "context"]),
    "unknown context": (["density", "--data", "few.csv", "--context", "q"], ["q", "a, b"]),
    "nothing to model": (["density", "--data", "few.csv", "--context", "a", "b"], ["--context"]),
    "given for nothing": (["density", "--data", "few.csv", "--given", "few.csv"], ["--given"]),
    "unknown drop": (["density", "--data", "few.csv", "--drop", "q"], ["no column 'q'", "drop"]),
    "score missing": (
        ["density", "--data", "few.csv", "--batch", "8", "--score", "n.csv"],
        ["n.csv"],
    ),
    "no run": (["density", "--from", "nowhere", "--samples", "3"], ["nowhere"]),
    "nothing to impute by": (
        ["density", "--data", "few.csv", "--context", "a", "--impute", "few.csv"],
        ["--impute", "--context"],
    ),
    "no table to hide": (["imputation"], ["--data", "--from"]),
    "nothing hidden": (["imputation", "--data", "few.csv", "--hide", "0"], ["--hide"]),
    "from for nothing": (["density", "--from", "nowhere"], ["--score", "--samples"]),
    "unknown energy": (["energy", "--target", "u5"], ["'u5'", "u1", "module:function"]),
    "energy without extent": (["energy", "--target", "mine:bowl"], ["mine:bowl", "extent=(z1_min"]),
    "extent of no use": (["energy", "--extent", "-1", "1", "-1", "1"], ["u1", "its own extent"]),
    "no data to finetune by": (["energy", "--finetune-steps", "5"], ["--finetune-steps"]),
    "energy by likelihood": (["energy", "--objective", "likelihood"], ["reverse_kl"]),
    "path of an energy": (["energy", "--path", "trigonometric"], ["--path", "flow_matching"]),
    "temperature of no use": (
        ["energy", "--temperature", "2", "--hot-steps", "0"],
        ["--temperature", "--hot-steps"],
    ),
    "temperature 0": (["energy", "--temperature", "0"], ["--temperature"]),
    "units twice": (["energy_sweep", "--units", "2", "2"], ["--units"]),
    "units by widths": (["energy_sweep", "--widths", "4", "32"], ["--units"]),
    "no seeds": (["latent", "--seeds", "0"], ["--seeds"]),
    "unknown conditioning": (["latent", "--conditioning", "film"], ["'film'", "modulate"]),
    "missing picture": (["picture", "--image", "none.png"], ["none.png"]),
    "no picture": (["picture", "--image", "few.csv"], ["few.csv", ".png"]),
    "a folder of pictures": (["picture", "--image", "."], ["directory"]),
    "a side of nothing": (["picture", "--side", "1"], ["--side"]),
    "a sweep of yours": (["energy_sweep", "--targets", "mine:bowl"], ["experiments.energy"]),
    "unknown preset": (["nice", "--preset", "nope"], ["'nope'", "digits, mnist"]),
    "a preset of no name": (["images", "--preset"], ["--preset", "ffjord-mnist"]),
    "unknown pictures": (["images", "--data", "mnits"], ["mnits", "mnist"]),
    "digits from a file": (["nice", "--data", "digits", "--path", "."], ["digits", "--path"]),
    "no pictures there": (["nice", "--data", "mnist", "--path", "no.npz"], ["no.npz", "--path"]),
    "one test picture": (["images", "--test-images", "1"], ["--test-images", "2"]),
    "alpha beyond a half": (["images", "--alpha", "0.7"], ["alpha", "0.7"]),
    "scales of 8x8": (["images", "--scales", "5"], ["5 scales", "8 x 8"]),
    "channel 0": (["images", "--channels", "0"], ["--channels", "(0,)"]),
    "flow matching of scales": (
        ["images", "--objective", "flow_matching", "--scales", "2"],
        ["one ODE", "--scales 1"],
    ),
    "guidance without classes left out": (
        ["images", "--preset", "flow-mnist", "--drop-context", "0", "--guidance", "2"],
        ["--guidance", "--drop-context"],
    ),
    "frequencies of no use": (["images", "--frequencies", "2"], ["--frequencies", "unet"]),
    "draws of no estimator": (["images", "--test-draws", "8"], ["--test-draws", "--test-probes"]),
    "U-Net without levels": (["images", "--field", "unet", "--channels"], ["channels", "()"]),
    "too many scales of CIFAR-10": (
        ["images", "--preset", "ffjord-cifar10", "--scales", "7"],
        ["7 scales", "32 x 32"],
    ),
    "no table to train on": (["imputation", "--data", "none.csv", "--out", "o"], ["none.csv"]),
    "noise of other ways": (
        ["inpaint", "--from", "r", "--way", "langevin", "--noise", "2"],
        ["--noise", "ascend"],
    ),
    "no run to inpaint": (["inpaint", "--from", "nowhere"], ["nowhere"]),
    "no run to score": (["ood", "--from", "nowhere"], ["nowhere"]),
    "seeds beyond": (["latent", "--seed", "2147483647"], ["--seed"]),
    "unknown precision": (["images", "--precision", "int8"], ["int8", "bfloat16"]),
}

SETTINGS = {
    "toy2d": "Toy2D",
    "density": "Density",
    "energy": "MatchEnergy",
    "energy_sweep": "EnergySweep",
    "imputation": "Imputation",
    "inpaint": "Inpaint",
    "ood": "OOD",
    "latent": "Latent",
    "picture": "Picture",
    "nice": {"parabola": "PlaneNICE", "digits": "DigitsNICE", "mnist": "MNISTNICE"},
    "images": {
        "digits": "Digits",
        "ffjord-mnist": "FFJORDMnist",
        "ffjord-cifar10": "FFJORDCifar10",
        "flow-mnist": "FlowMnist",
    },
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    rows = [f"{a:.6f},{b:.6f}" for a, b in x]

    def write(name, lines):
        (folder / name).write_text("a,b\n" + "\n".join(lines) + "\n")

    write("few.csv", rows)
    write("text.csv", [rows[0], "1.5,high", *rows[2:]])
    write("nan.csv", [*rows[:2], "nan,0.5", *rows[3:]])
    write("constant.csv", [f"{a:.6f},3" for a, _ in x])
    write("copy.csv", [f"{a:.6f},{a:.6f}" for a, _ in x])
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_says_what_to_do(name, bad_files, monkeypatch, capsys):
    words, expected = BAD[name]
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(sys, "argv", words)
    before = sorted(bad_files.rglob("*"))
    from experiments._runner.cli import main

    module = importlib.import_module(f"experiments.{words[0]}")
    settings = jax.tree.map(lambda name: getattr(module, name), SETTINGS[words[0]])
    with pytest.raises(SystemExit) as stopped:
        main(module.run, settings)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    for part in expected:
        assert part in lines[0]
    assert sorted(bad_files.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "hint"),
    [(["--data", "t.csv"], "--resume"), (["--from", "run", "--samples", "3"], "only the files")],
)
def test_a_full_disk_is_named_where_its_error_names_none(words, hint, monkeypatch, capsys):
    from experiments._runner.cli import main
    from experiments.density import Density

    def full(settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "argv", ["density", "--out", "there", *words])
    with pytest.raises(SystemExit):
        main(full, Density)
    said = capsys.readouterr().err
    assert said.startswith("error: there: No space left on device")
    assert hint in said


def test_resuming_with_other_settings_names_them(tmp_path, toy_run):
    out, _ = toy_run
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    done = run("toy2d", "--out", tmp_path, "--resume", "--steps", 11, "--test-points", 5000, *SMALL)
    assert done.returncode == 2
    assert "steps 10 -> 11" in done.stderr


@pytest.mark.slow
def test_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path):
    words = ["--steps", 60, "--test-points", 5000, "--seed", 3, *SMALL]
    whole = run("toy2d", "--out", tmp_path / "whole", *words)
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("toy2d", "--out", killed, *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = killed / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 9):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    resumed = run("toy2d", "--out", killed, "--resume", *words)
    assert resumed.returncode == 0, resumed.stderr

    def parameters(path: Path):
        return path.read_bytes().split(b"\n", 1)[1]

    for name in ("checkpoints/000000060.jcnf", "flow.jcnf"):
        assert parameters(tmp_path / "whole" / name) == parameters(killed / name)
    losses = [
        [(r["step"], r["loss"]) for r in map(json.loads, (p / "metrics.jsonl").open())]
        for p in (tmp_path / "whole", killed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "figure"),
    [
        ("adjoints", ["--steps", 2, "--batch", 8, "--loosest", 3, "--tightest", 3], "adjoints"),
        (
            "estimators",
            ["--steps", 2, "--dim", 3, "--points", 4, "--draws", 3, "--time-dims", 5],
            "variance",
        ),
        (
            "flow_matching",
            ["--budgets", 0.1, 0.2, *FEW],
            "gaps",
        ),
        (
            "reflow",
            ["--steps", 20, "--reflow-steps", 20, "--pairs", 50, "--mmd-points", 50, *FEW],
            "mmd",
        ),
        ("conditional", ["--steps", 10, "--test-points", 20, *SMALL], "guidance"),
        (
            "gaussian_1d",
            [
                "--steps",
                2,
                "--lbfgs-steps",
                2,
                "--test-points",
                50,
                "--regularizers",
                "lambda2",
                0.01,
            ],
            "histogram",
        ),
        ("two_circles", ["--steps", 4, "--test-points", 20, *SMALL[2:], *PLANAR], "densities"),
        (
            "six_gaussians",
            ["--steps", 4, "--augment", 1, "--test-points", 20, "--particles", 50, *SMALL],
            "trajectories",
        ),
        ("ot_flow", ["--steps", 4, "--test-points", 20, *SMALL[2:], *PLANAR], "densities"),
        (
            "spiral",
            ["--steps", 4, "--points", 20, "--irregular", "--lbfgs-steps", 2, *SMALL],
            "learning",
        ),
        ("picture", ["--steps", 4, "--test-points", 20, "--particles", 20, *SMALL], "densities"),
        ("nice", ["--steps", 10, "--test-points", 50, *SMALL], "densities"),
        ("nice", ["--data", "digits", "--steps", 10, *PICTURES, *SMALL], "interpolation"),
        (
            "images",
            [
                *("--channels", 4, "--steps", 4, "--precision", "bfloat16", "--test-probes", 1),
                *("--reference-images", 2, "--test-draws", 2, *PICTURES, *SMALL[2:]),
            ],
            "samples",
        ),
        (
            "images",
            [
                *("--preset", "flow-mnist", "--data", "digits", "--channels", 4, "--guidance", 2),
                *("--steps", 4, "--reference-images", 2, "--test-draws", 2, *PICTURES, *SMALL[2:]),
            ],
            "samples",
        ),
        (
            "energy",
            ["--steps", 4, "--hot-steps", 4, "--test-points", 20, *SMALL[2:], *PLANAR],
            "densities",
        ),
        (
            "energy_sweep",
            ["--targets", "u2", "--units", 2, 3, "--steps", 4, "--hot-steps", 0, *FEW[:2]],
            "units",
        ),
        (
            "latent",
            ["--steps", 4, "--seeds", 1, "--latent", 2, "--samples", 3, *SMALL],
            "posteriors",
        ),
    ],
)
def test_measurements_run_and_draw(tmp_path, name, settings, figure):
    done = run(name, "--out", tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "figures" / f"{figure}.png").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["experiment"] == name


def test_pictures_without_labels_have_no_classes(tmp_path):
    from experiments._tasks.images import learn_pictures
    from experiments.images import FlowMnist
    from jcnf._checks import InputError

    x = np.zeros((20, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x, x_test=x)
    settings = FlowMnist(path=tmp_path / "mnist.npz", out=tmp_path / "run")
    with pytest.raises(InputError, match=r"labels 0 to 9: .*--no-conditional"):
        learn_pictures("images", settings, lambda images: None)
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_run_are_found_by_name(tmp_path):
    from experiments._runner.run_dir import RunDir, kind_of
    from experiments.nice import PlaneNICE
    from jcnf._checks import InputError
    from jcnf.training import checkpoint

    settings = PlaneNICE(out=tmp_path / "run")
    RunDir("nice", settings).save_flow(CNF(Straight(), StandardNormal(2)), {})
    assert kind_of(tmp_path / "run") is PlaneNICE
    for name in (
        "os:system",
        "experiments.nice:CALIBRATION_IMAGES",
        "experiments.no:One",
        "experiments",
    ):
        notes = {"experiment": "nice", "settings": name, "config": {}, "dim": 2, "context_dim": 0}
        checkpoint.save(tmp_path / "flow.jcnf", (), notes)
        with pytest.raises(InputError, match="a run of another experiment or version"):
            kind_of(tmp_path)
    checkpoint.save(tmp_path / "flow.jcnf", (), {"place": {}})
    with pytest.raises(InputError, match="is not a trained flow"):
        kind_of(tmp_path)


@pytest.mark.slow
def test_a_table_of_the_suite_is_measured_and_read_by_density(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", rng.normal(size=(2000, 43)))
    out = tmp_path / "run"
    words = ["--suite", "miniboone", "--data", tmp_path, "--out", out, "--steps", 10, *SMALL]
    done = run("tabular", *words)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    # The hardly trained flow is near its base, which is the distribution of the data here.
    assert metrics["test_nll"] == pytest.approx(43 / 2 * np.log(2 * np.pi * np.e), abs=3)
    assert metrics["gaussian_nll"] == pytest.approx(metrics["test_nll"], abs=3)
    done = run("density", "--from", out, "--samples", 5, "--out", tmp_path)
    assert done.returncode == 0, done.stderr


def test_digits_are_dequantized_and_split_for_good():
    from jcnf.data.images import load_digits_table

    table, again = load_digits_table(), load_digits_table()
    assert [len(p) for p in (table.train, table.val, table.test)] == [1079, 119, 599]
    np.testing.assert_array_equal(table.test, again.test)
    levels = 17 * table.scale.unstandardize(table.test)
    assert (levels > -1e-5).all()
    assert (levels < 17).all()
    np.testing.assert_allclose(table.train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(table.train.std(axis=0), 1, atol=1e-4)
    noise = levels % 1
    assert 0.45 < noise.mean() < 0.55


@pytest.mark.slow
def test_killed_between_stages_ends_bit_for_bit_the_same(tmp_path):
    words = ["--steps", 30, "--finetune-steps", 30, "--test-points", 100, *SMALL]
    whole = run("toy2d", "--out", tmp_path / "whole", *words)
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("toy2d", "--out", killed, *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = killed / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 14):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    resumed = run("toy2d", "--out", killed, "--resume", *words)
    assert resumed.returncode == 0, resumed.stderr
    flows = [
        (p / "flow.jcnf").read_bytes().split(b"\n", 1)[1] for p in (tmp_path / "whole", killed)
    ]
    assert flows[0] == flows[1]


@pytest.mark.slow
def test_a_part_of_training_ends_early_and_the_next_goes_on(tmp_path):
    """With a learning rate near 0 no validation after the first is a new best."""
    words = ["--steps", 400, "--patience", 2, "--finetune-steps", 6, "--learning-rate", 1e-30]
    out = tmp_path / "run"
    done = run("toy2d", "--out", out, *words, "--test-points", 100, *SMALL)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {name: [r["step"] for r in records if name in r] for name in ("matching", "nll")}
    assert steps == {"matching": [2, 4, 6, 8, 10, 12], "nll": [14, 16, 18]}
    nlls = [r["val_nll"] for r in records if "val_nll" in r]
    assert nlls[0] == nlls[1] == nlls[2] > nlls[-1]


def test_a_preset_has_other_defaults_and_the_same_types_and_help():
    import dataclasses

    from tyro import extras

    from experiments._runner.flow_config import FitSettings
    from experiments.two_circles import TwoCircles

    assert (TwoCircles().steps, TwoCircles().widths) == (1000, (64, 32))
    assert dataclasses.asdict(FitSettings())["steps"] == 10_000
    types = {field.name: field.type for field in dataclasses.fields(TwoCircles)}
    assert types | {f.name: f.type for f in dataclasses.fields(FitSettings)} == types
    assert "optimizer steps (default: 1000)" in extras.get_parser(TwoCircles).format_help()


def test_a_preset_names_known_settings_only():
    from experiments._runner.config import preset
    from experiments._tasks.density2d import PlaneFit

    with pytest.raises(TypeError, match="learning_rte"):

        @preset
        class Misspelt(PlaneFit):
            learning_rte = 0.1


class Straight(Field):
    """v = (2, 0) from the potential 2 t - 2 x1: straight, at constant speed, satisfying HJB."""

    dim: int = 2

    def __call__(self, t, x, context=None):
        return jnp.array([2.0, 0.0], x.dtype)

    def gradient(self, t, x):
        return jnp.array([-2.0, 0.0, 2.0], x.dtype)


@pytest.mark.slow
def test_figures_of_a_transport():
    from experiments.ot_flow import OTFlow, transport_figures

    flow = CNF(Straight(), StandardNormal(2))
    figures = transport_figures(OTFlow(), flow)
    assert figures["transport_cost"] == pytest.approx(2, rel=1e-6)
    assert figures["straightness"] == pytest.approx(1, rel=1e-6)
    assert figures["hjb_residual"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("loss", "shown"), [(2.3456, "2.346"), (0.0012344, "0.001234")])
def test_the_progress_bar_shows_four_digits_of_the_loss(loss, shown):
    from experiments._runner.loop import _shown

    assert _shown({"loss": loss, "nfe": 20.0}, 3) == f"loss {shown}, 20 NFE, 3 skipped"


def test_total_variation_on_points_is_half_the_mean_difference():
    from experiments.gaussian_1d import half_difference

    assert half_difference(np.log([0.5, 0.2]), np.log([0.1, 0.4])) == pytest.approx(0.15)


@pytest.mark.slow
def test_extra_dimensions_that_do_nothing_change_no_figure(tmp_path):
    """A field that starts at 0 stays there with a learning rate near 0: the model is N(0, I)."""
    words = [
        "--steps",
        4,
        "--learning-rate",
        1e-30,
        "--test-points",
        500,
        "--particles",
        20,
        *SMALL,
    ]
    metrics = {}
    for extra in (0, 2):
        out = tmp_path / str(extra)
        done = run("toy2d", "--out", out, "--augment", extra, *words)
        assert done.returncode == 0, done.stderr
        summary = json.loads((out / "summary.json").read_text())
        assert summary["numerics"]["solver_failures"] == 0
        metrics[extra] = summary["metrics"]
    for name in ("test_nll", "nll_gap", "test_nll_stderr"):
        assert metrics[0][name] == pytest.approx(metrics[2][name], rel=1e-5)
    # E|x|^2 / 2 + log(2 pi) for 8 Gaussians at radius 4 with sigma 0.5, x being divided by 1.414.
    expected = (4**2 + 2 * 0.5**2) / 1.414**2 / 2 + np.log(2 * np.pi)
    assert abs(metrics[0]["test_nll"] - expected) < 4 * metrics[0]["test_nll_stderr"]
