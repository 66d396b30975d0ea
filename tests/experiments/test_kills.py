"""Fifty SIGKILLs at random moments of a command: every run still ends bit for bit the same."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jcnf.training import checkpoint

KILLS = 50
STEPS = 30_000
WORDS = ["--steps", STEPS, "--width", 8, "--batch", 16, "--log-every", 500]
WORDS += ["--checkpoint-every", 1000, "--validate-every", 6000, "--test-points", 50]
WORDS += ["--particles", 10, "--frames", 3, "--cells", 20]


def start(out):
    words = ["--out", out, *WORDS, *(["--resume"] if (out / "config.json").exists() else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.toy2d", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def result(out):
    """The arrays of the last checkpoint and of the flow, as bytes."""
    files = [out / "checkpoints" / f"{STEPS:09}.jcnf", out / "flow.jcnf"]
    return [file.read_bytes().split(b"\n", 1)[1] for file in files]


def records_of(out):
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    tic = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read().decode()
    took = time.monotonic() - tic
    expected = result(tmp_path / "whole")
    chance, kills, ends, places = random.Random(0), 0, 0, []
    while kills < KILLS or not (out / "summary.json").exists():
        out = tmp_path / f"killed-{ends}"
        process = start(out)
        try:
            if kills == KILLS:
                code = process.wait()  # the last run is not killed
            elif chance.random() < 0.25:
                code = process.wait(chance.uniform(0, took))
            else:
                records = records_of(out) + chance.randrange(12)
                while records_of(out) < records and process.poll() is None:
                    time.sleep(0.001)
                code = process.wait(chance.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            paths = list((out / "checkpoints").glob("[0-9]*"))
            for path in paths:
                checkpoint.read_notes(path)  # raises if it is damaged
            places.append(max((int(path.stem) for path in paths), default=None))
            if not (out / "summary.json").exists():
                continue
            code = 0
        finally:
            error = process.stderr.read().decode()
            process.stderr.close()
        assert code == 0, error
        assert result(out) == expected
        assert not list((out / "checkpoints").glob("*.damaged"))
        ends += kills < KILLS
    print(f"{kills} kills, {ends + 1} runs, newest checkpoint at each: {places}")
    in_training = sum(place is not None and place < STEPS for place in places)
    assert in_training >= KILLS // 2, "hardly any kill came while training"
