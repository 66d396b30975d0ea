"""The experiments as a user runs them: whole runs, resuming, and messages for bad input."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_lines import command_of

from experiments._runner import cli
from experiments._runner.config import Run
from jcnf import CNF
from jcnf.distributions import StandardNormal
from jcnf.fields import Field

LOOP = ["--batch", "32", "--validate-every", "4", "--log-every", "2", "--checkpoint-every", "4"]
SMALL = ["--width", "8", *LOOP]  # of a resnet
NARROW = ["--widths", "8", *LOOP]  # of an mlp
PLANAR = ["--units", "8", "--hyper-width", "4", *LOOP]
TOY = ["--test-points", "2500", "--cells", "24", "--frames", "2"]
PICTURES = ["--test-images", 20, "--validation-images", 20]
FEW = ["--test-points", "50", "--width", "8", "--batch", "16"]


def command(name, *words):
    return [sys.executable, "-m", f"experiments.{name}", *map(str, words)]


def run(name, *words):
    return subprocess.run(command(name, *words), capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("toy") / "run"
    done = run("toy2d", "--out", out, "--steps", 10, *TOY, *SMALL)
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
    assert summary["config"]["training"]["steps"] == 10
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


def test_a_finished_run_is_never_overwritten(toy_run, monkeypatch, capsys):
    out, _ = toy_run
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags in ([], ["--resume"]):
        words = ["--out", out, "--steps", 10, *TOY, *SMALL, *flags]
        assert call_main("toy2d", monkeypatch, words) == 2
        said = capsys.readouterr().err.strip()
        assert said == f"error: {out} holds a finished run: choose another --out"
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_density_scores_in_the_units_of_the_data(density_run, table, tmp_path, monkeypatch, capsys):
    summary = json.loads((density_run / "summary.json").read_text())
    metrics = summary["metrics"]
    x = np.loadtxt(table, delimiter=",", skiprows=1)
    # The standard deviations of the training part are close to those of the whole table.
    log_std = np.log(x.std(axis=0)).sum()
    assert metrics["test_nll_original"] - metrics["test_nll"] == pytest.approx(log_std, abs=0.2)

    words = ["use", "--from", density_run, "--score", table, "--out", tmp_path]
    done = run("density", *words, "--samples", 2000)
    assert done.returncode == 0, done.stderr
    log_prob = np.loadtxt(tmp_path / "log_prob.csv", skiprows=1)
    assert log_prob.shape == (600,)
    assert -log_prob.mean() == pytest.approx(metrics["test_nll_original"], abs=0.5)
    samples = np.loadtxt(tmp_path / "samples.csv", delimiter=",", skiprows=1)
    assert samples.shape == (2000, 3)
    assert (tmp_path / "samples.csv").read_text().startswith("a,b,c\n")
    # The hardly trained flow is near its base: its samples have the center and scale of the data.
    np.testing.assert_allclose(samples.mean(axis=0), x.mean(axis=0), atol=0.5 * x.std(axis=0).min())

    with jax.enable_x64(False):
        assert call_main("density", monkeypatch, words) == 2
    assert "log_prob.csv exists" in capsys.readouterr().err


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
    words = ["use", "--from", out, "--score", table, "--samples", 3, "--out", again]
    refused = run("density", *words)
    assert refused.returncode == 2
    assert "--context-table" in refused.stderr
    (tmp_path / "given.csv").write_text("a,b\n100,50\n-80,7\n")
    done = run("density", *words, "--context-table", tmp_path / "given.csv")
    assert done.returncode == 0, done.stderr
    drawn = np.loadtxt(again / "samples.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(drawn[:, :2], [[100, 50], [-80, 7], [100, 50]], rtol=1e-4)
    assert np.loadtxt(again / "log_prob.csv", skiprows=1).shape == (600,)


# Command lines, and a pattern of what their errors say. Values that no run accepts are in
# test_settings.py.
BAD = {
    "toy2d --resume --out nowhere": "nowhere.*--resume",
    "toy2d --out text.csv/run": "text.csv/run.*--out",
    "toy2d --out .": "not empty.*--out",
    "density": "--data",
    "density --data none.csv": "none.csv",
    "density --data text.csv": "'high'.*drop",
    "density --data nan.csv": "row 3.*column",
    "density --data constant.csv": "constant.*drop=",
    "density --data copy.csv": "copies|depend",
    "density --data few.csv --context q": "q.*a, b",
    "density --data few.csv --context a b": "--context",
    "density --data few.csv --drop q": "no column 'q'.*drop",
    "density --data few.csv --context a field:planar": "planar.*context",
    "density use": "--from",
    "density use --from nowhere": "--score.*--samples",
    "density use --from nowhere --samples 3": "nowhere",
    "density use --from nowhere --impute few.csv --context-table few.csv": "--samples",
    "tabular table:suite --data . --suite mnist": "mnist.*power",
    "tabular --data few.csv": "table:file",
    "tables --data none --models kde --seconds 1": "--data.*none",
    "tables --data . --tables other --models kde --seconds 1": "other.*digits",
    "earth": "earth/fire.csv",
    "earth --set fire --folder none": "none/fire.csv",
    "earth --data few.csv": "latitude.*a, b",
    "torus --data none.csv": "none.csv",
    "torus --data text.csv": "'high'.*drop",
    "imputation": "--data",
    "imputation --data none.csv --out o": "none.csv",
    "imputation use --from nowhere": "nowhere",
    "estimators use --from nowhere": "nowhere",
    "posterior --task moon": "--task.*two_moons",
    "posterior --folder none": "none/two_moons.npz.*--folder",
    "posterior --simulator mine:model --prior mine:prior": "no module 'mine'.*directory",
    "energy --target u5": "'u5'.*u1.*module:function",
    "energy --target mine:bowl": r"mine:bowl.*extent=\(z1_min",
    "energy --extent -1 1 -1 1": "u1.*its own extent",
    "energy_sweep --units 2 2": "--units",
    "energy_sweep --targets mine:bowl": "u1",
    "picture --image none.png": "none.png",
    "picture --image few.csv": "few.csv.*.png",
    "picture --image .": "directory",
    "nice mnist --files no.npz": "no.npz",
    "nice digits --files few.csv": "digits.*--files",
    "images --test-images 1": "--test-images.*2",
    "images --alpha 0.7": "alpha.*0.7",
    "images --alpha 1e-9": "--alpha.*1e-07",
    "images --channels": "--channels",
    "images --scales 5": "5 scales.*8 x 8",
    "images ffjord-cifar10 --scales 7": "7 scales.*32 x 32",
    "images objective:flow-matching --scales 2": "--scales",
    "images flow-mnist --drop-context 0 --guidance 2": "--guidance.*--drop-context",
    "inpaint": "--from",
    "inpaint --from nowhere": "nowhere",
    "ood": "--from",
    "ood --from nowhere": "nowhere",
    "latent --seed 2147483647": "--seed",
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


def call_main(experiment, monkeypatch, words, run=None):
    """Call `cli.main` as `python -m experiments.EXPERIMENT WORDS` would; return its exit code."""
    command = command_of(experiment)
    monkeypatch.setattr(sys, "argv", [experiment, *map(str, words)])
    spec = types.SimpleNamespace(name=f"experiments.{experiment}")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    with pytest.raises(SystemExit) as stopped:
        cli.main(run or command.run, command.settings)
    return stopped.value.code


@pytest.mark.parametrize("line", BAD)
def test_bad_input_says_what_to_do_and_leaves_nothing_behind(line, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    before = sorted(bad_files.rglob("*"))
    experiment, *words = line.split()
    assert call_main(experiment, monkeypatch, words) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(BAD[line], said), said
    assert sorted(bad_files.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("density --data few.csv --out there", "--resume"),
        ("density use --from run --samples 3 --out there", "only the files"),
    ],
)
def test_a_full_disk_is_named_where_its_error_names_none(line, hint, monkeypatch, capsys):
    def full(settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    experiment, *words = line.split()
    call_main(experiment, monkeypatch, words, full)
    said = capsys.readouterr().err
    assert said.startswith("error: there: No space left on device")
    assert hint in said


def test_resuming_with_other_settings_names_them(tmp_path, toy_run, monkeypatch, capsys):
    out, _ = toy_run
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    words = ["--out", tmp_path, "--resume", "--steps", 11, *TOY, *SMALL]
    assert call_main("toy2d", monkeypatch, words) == 2
    assert "training.steps 10 -> 11" in capsys.readouterr().err


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
                *("--steps", 2, "--lbfgs-steps", 2, "--test-points", 50),
                *("--regularizers", "lambda2", 0.01),
            ],
            "histogram",
        ),
        ("two_circles", ["--steps", 4, "--test-points", 20, *PLANAR], "densities"),
        (
            "six_gaussians",
            ["--steps", 4, "--augment", 1, "--test-points", 20, "--particles", 50, *NARROW],
            "trajectories",
        ),
        ("ot_flow", ["--steps", 4, "--test-points", 20, "--rank", 4, *SMALL], "densities"),
        (
            "spiral",
            ["--steps", 4, "--points", 20, "--irregular", "--lbfgs-steps", 2, *NARROW],
            "learning",
        ),
        ("picture", ["--steps", 4, "--test-points", 20, "--particles", 20, *SMALL], "densities"),
        ("nice", ["--steps", 10, "--test-points", 50, *NARROW], "densities"),
        ("nice", ["digits", "--steps", 10, *PICTURES, *NARROW], "interpolation"),
        (
            "images",
            [
                *("--channels", 4, "--steps", 4, "--precision", "bfloat16"),
                *(
                    "test-divergence:hutchinson",
                    "--reference-images",
                    2,
                    "--test-draws",
                    2,
                    *PICTURES,
                    *LOOP,
                ),
            ],
            "samples",
        ),
        (
            "images",
            [
                *("flow-mnist", "--data", "digits", "--channels", 4, "--guidance", 2),
                *("--steps", 4, "--reference-images", 2, "--test-draws", 2, *PICTURES, *LOOP),
            ],
            "samples",
        ),
        (
            "energy",
            ["--steps", 4, "--hot-steps", 4, "--test-points", 20, *PLANAR],
            "densities",
        ),
        (
            "torus",
            ["--steps", 4, "--coupling", "independent", "--cells", 20, "--samples", 20, *FEW],
            "densities",
        ),
        (
            "rotations",
            ["--steps", 4, "--coupling", "independent", "--cells", 3, "--samples", 20, *FEW],
            "rotations",
        ),
        (
            "posterior",
            [
                *("--simulations", 100, "--steps", 4, "--samples", 50),
                *("--checks", 20, "--draws", 9),
            ],
            "posterior",
        ),
        (
            "energy_sweep",
            ["--targets", "u2", "--units", 2, 3, "--steps", 4, "--hot-steps", 0, *FEW[:2]],
            "units",
        ),
        (
            "latent",
            ["--steps", 4, "--seeds", 1, "--latent", 2, "--samples", 3, *NARROW],
            "posteriors",
        ),
    ],
)
def test_measurements_run_and_draw(tmp_path, name, settings, figure):
    done = run(name, *settings, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "figures" / f"{figure}.png").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["experiment"] == name


def test_pictures_without_labels_have_no_classes(tmp_path):
    from experiments._tasks.images import learn_images
    from experiments.images import FLOW_MNIST
    from jcnf._checks import InputError

    x = np.zeros((20, 28, 28), np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x, x_test=x)
    images = dataclasses.replace(FLOW_MNIST.images, files=tmp_path / "mnist.npz")
    settings = dataclasses.replace(FLOW_MNIST, images=images, run=Run(out=tmp_path / "run"))
    with pytest.raises(InputError, match=r"labels 0 to 9: .*--no-conditional"):
        learn_images("images", settings)
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_run_are_found_by_name(tmp_path):
    from experiments._runner.run_dir import RunDir, kind_of
    from experiments.nice import PlaneNICE
    from jcnf._checks import InputError
    from jcnf.training import checkpoint

    settings = PlaneNICE(run=Run(out=tmp_path / "run"))
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
    checkpoint.save(tmp_path / "flow.jcnf", (), {"run_state": {}})
    with pytest.raises(InputError, match="is not a trained flow"):
        kind_of(tmp_path)


@pytest.mark.slow
def test_a_table_of_the_suite_is_measured_and_read_by_density(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "miniboone").mkdir()
    np.save(tmp_path / "miniboone" / "data.npy", rng.normal(size=(2000, 43)))
    out = tmp_path / "run"
    words = ["table:suite", "--suite", "miniboone", "--data", tmp_path, "--out", out]
    done = run("tabular", *words, "--steps", 10, *SMALL)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    # The hardly trained flow is near its base, which is the distribution of the data here.
    assert metrics["test_nll"] == pytest.approx(43 / 2 * np.log(2 * np.pi * np.e), abs=3)
    assert metrics["gaussian_nll"] == pytest.approx(metrics["test_nll"], abs=3)
    done = run("density", "use", "--from", out, "--samples", 5, "--out", tmp_path)
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
    words = ["--steps", 30, "--test-points", 100, *SMALL]
    words += ["finetune:likelihood", "--finetune-steps", 30]
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
    words = ["--steps", 400, "--patience", 2, "--learning-rate", 1e-30]
    words += ["finetune:likelihood", "--finetune-steps", 6]
    out = tmp_path / "run"
    done = run("toy2d", "--out", out, *words, "--test-points", 100, *SMALL)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {name: [r["step"] for r in records if name in r] for name in ("matching", "nll")}
    assert steps == {"matching": [2, 4, 6, 8, 10, 12], "nll": [14, 16, 18]}
    nlls = [r["val_nll"] for r in records if "val_nll" in r]
    assert nlls[0] == nlls[1] == nlls[2] > nlls[-1]


def test_settings_of_an_experiment_are_the_defaults_of_its_flags():
    from experiments.two_circles import SETTINGS

    assert (SETTINGS.training.steps, SETTINGS.flow.field.units) == (1000, 64)
    changed = cli.parse(SETTINGS, ["--steps", "5", "--units", "8"])
    assert (changed.training.steps, changed.flow.field.units) == (5, 8)
    assert changed.flow.t1 == SETTINGS.flow.t1


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
    from jcnf.training.fit import _shown

    assert _shown({"loss": loss, "nfe": 20.0}, 3) == f"loss {shown}, 20 NFE, 3 skipped"


def test_total_variation_on_points_is_half_the_mean_difference():
    from experiments.gaussian_1d import half_difference

    assert half_difference(np.log([0.5, 0.2]), np.log([0.1, 0.4])) == pytest.approx(0.15)


@pytest.mark.slow
def test_extra_dimensions_that_do_nothing_change_no_figure(tmp_path):
    """A field that starts at 0 stays there with a learning rate near 0: the model is N(0, I)."""
    words = ["--steps", 4, "--learning-rate", 1e-30, "--test-points", 500, "--particles", 20]
    words += SMALL
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
