"""The README tells the truth: its Python runs as printed, its make targets and flags exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_runs_as_printed_and_learns():
    example, keep_best, devices, field = blocks("python")
    script = example + keep_best + devices
    script += "import equinox as eqx, jax, jax.numpy as jnp\n" + field
    script += "rotation = jcnf.CNF(Rotation(jnp.ones(())), distributions.StandardNormal(2))\n"
    script += "assert abs(jcnf.transform(rotation, x).logdet).max() == 0\n"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    shape, nll, entropy = re.fullmatch(r"(\(1000,\)) (\S+) (\S+)\n", done.stdout).groups()
    assert shape == "(1000,)"
    # A Gaussian of the data's covariance has 2.95.
    assert float(entropy) - 0.05 < float(nll) < float(entropy) + 0.15


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z][a-z-]*)\b", README)) - {"and"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in set(re.findall(r"experiments\.([a-z0-9_]+)", README)):
        assert (ROOT / "experiments" / f"{name}.py").exists(), name
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / path).exists(), path
