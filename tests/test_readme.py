"""The README is right: its Python runs as printed, and its make targets and files exist."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run_examples(change=lambda script: script):
    """Run the README's Python in a separate process, and return the figures it prints."""
    example, _, loop, devices, field = blocks("python")
    script = example + loop + devices
    script += "import equinox as eqx, jax, jax.numpy as jnp\n" + field
    script += "rotation = jcnf.CNF(Rotation(jnp.ones(())), distributions.StandardNormal(2))\n"
    script += "assert abs(jcnf.transform(rotation, x).logdet).max() == 0\n"
    command = [sys.executable, "-c", change(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return re.match(r"\(1000,\) (\S+) (\S+)\n", done.stdout).groups()


def test_the_examples_run():
    nll, entropy = run_examples(
        lambda script: script.replace("=3000", "=15").replace("(500, 1000, 1500)", "(5, 10, 15)")
    )
    assert float(entropy) < float(nll) < 10


@pytest.mark.slow
def test_the_examples_learn_as_printed():
    nll, entropy = run_examples()
    # A Gaussian with the data's covariance has an NLL of 2.95.
    assert float(entropy) - 0.05 < float(nll) < float(entropy) + 0.15


@pytest.mark.slow
def test_the_example_of_a_table_runs(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 2))
    np.savetxt(tmp_path / "table.csv", x, delimiter=",", header="a,b", comments="")
    script = blocks("python")[1].replace("FlowDensity()", "FlowDensity(steps=20)")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a: unbounded" in done.stdout


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z][a-z-]*)\b", README)) - {"and"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in set(re.findall(r"experiments\.([a-z0-9_]+)", README)):
        assert (ROOT / "experiments" / f"{name}.py").exists(), name
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / path).exists(), path
