"""Faults of a command's files and of its training: the messages, and what is kept."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from jcnf.training import checkpoint

pytestmark = pytest.mark.slow
STEPS = 2000
WORDS = ["--steps", STEPS, "--width", 64, "--batch", 16, "--log-every", 100]
WORDS += ["--checkpoint-every", 200, "--validate-every", 1000, "--test-points", 50]
WORDS += ["--particles", 10, "--frames", 3, "--cells", 20]


def run(out, *words):
    words = ["--out", out, *WORDS, *words]
    command = [sys.executable, "-m", "experiments.toy2d", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def fails(out, *words):
    """The one line with which the command ends."""
    done = run(out, *words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    print(f"  -> {error}")
    return error


def flow_of(out):
    return (out / "flow.jcnf").read_bytes().split(b"\n", 1)[1]


def steps_kept(out):
    """The steps of the checkpoints, all of which can be read."""
    paths = sorted((out / "checkpoints").glob("*.jcnf"))
    for path in paths:
        checkpoint.read_notes(path)
    return [int(path.stem) for path in paths]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def unfinished(whole, tmp_path):
    """A run that has finished training but not its measurements."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    (out / "flow.jcnf").unlink()
    return out


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a small disk with the given options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False)
        if done.returncode:
            pytest.skip("needs to mount a small disk")
        return disk

    yield mount
    subprocess.run(["umount", disk], check=False)


@pytest.mark.parametrize("harm", ["truncated", "a byte flipped", "emptied"])
def test_newest_checkpoint(unfinished, whole, harm):
    path = unfinished / "checkpoints" / f"{STEPS:09}.jcnf"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
    path.write_bytes({"truncated": content[:middle], "emptied": b""}.get(harm, flipped))
    done = run(unfinished, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"warning: {path} is damaged, kept as" in done.stderr
    assert f"going on from step {STEPS - 200}" in done.stderr
    assert flow_of(unfinished) == flow_of(whole)


def test_all_checkpoints_damaged(unfinished):
    for path in (unfinished / "checkpoints").glob("*.jcnf"):
        path.write_bytes(path.read_bytes()[:-1])
    assert "can be read; the newest: " in fails(unfinished, "--resume")


@pytest.mark.parametrize("kilobytes", [100, 240, 800])
def test_disk_full(small_disk, whole, kilobytes):
    disk = small_disk(f"size={kilobytes}k")
    out = disk / "run"
    assert "No space left on device" in fails(out)
    kept = steps_kept(out)
    subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
    done = run(out, *(["--resume"] if (out / "config.json").exists() else []))
    assert done.returncode == 0, done.stderr
    assert flow_of(out) == flow_of(whole)
    print(f"  {kilobytes} kB: {kept} were kept")


def test_read_only_directory(small_disk, unfinished):
    disk = small_disk("size=9m")
    shutil.copytree(unfinished, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "Read-only file system" in fails(disk / "run", "--resume")
    assert "Read-only file system" in fails(disk / "new")
    assert steps_kept(disk / "run") == steps_kept(unfinished)


def test_exploding_learning_rate(tmp_path):
    words = ["--clip", 1e30, "--warmup", 0]
    out = tmp_path / "run"
    assert "nor after 4 rollbacks" in fails(out, "--learning-rate", 1e9, *words)
    report = json.loads((out / "report.json").read_text())
    assert [r["rate"] for r in report["rollbacks"]] == [0.25, 0.0625, 0.25**3, 0.25**4]
    assert steps_kept(out) == [0]


def test_solver_forced_to_fail(tmp_path):
    words = ["objective:likelihood", "--max-steps", 1, "--rtol", 1e-6, "--atol", 1e-6]
    assert "solves failed" in fails(tmp_path / "run", *words)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    counts = report["skipped_since_record"]
    assert counts["skipped_solve"] == counts["skipped"] > 0


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_terminated(tmp_path, whole):
    """SIGTERM in training, and the command that it says resumes."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "experiments.toy2d", "--out", out, *WORDS]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)
    log = out / "metrics.jsonl"
    while not log.exists() or not log.read_text():
        assert process.poll() is None
    process.terminate()
    error = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 143
    print(f"  -> {error}")
    command = error.split("resume with ")[1].split()
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert flow_of(out) == flow_of(whole)
