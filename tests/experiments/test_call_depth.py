"""Few calls lie between the command line and a training step."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Runs `python -m experiments.toy2d`, and prints the calls of our code that lead to the first
# execution of the compiled training program.
COUNT = """
import os, runpy, sys, traceback
from jax.stages import Compiled

def program(self, *arguments):
    paths = [os.path.relpath(frame.filename) for frame in traceback.extract_stack()]
    print(*[path for path in paths if path.startswith(("jcnf/", "experiments/"))])
    sys.exit()

Compiled.__call__ = program
runpy.run_module("experiments.toy2d", run_name="__main__", alter_sys=True)
"""


def test_toy2d_from_its_command_line_to_a_step_has_at_most_9_frames(tmp_path):
    words = ["--out", tmp_path / "run", "--steps", 2]
    command = [sys.executable, "-c", COUNT, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    frames = done.stdout.splitlines()[-1].split()
    print(*frames, sep="\n")
    assert frames[0] == "experiments/toy2d.py", done.stderr
    assert frames[-1] == "jcnf/training/fit.py"
    assert len(frames) <= 9, frames
