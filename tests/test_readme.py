"""README, CONTRIBUTING and CITATION are right: examples run; commands, links and versions exist."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Pages outside docs/ whose commands and links are checked.
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt", "experiments/README.md")


def read(page):
    return (ROOT / page).read_text()


def run_examples(page, change=lambda script: script):
    """Run the Python of a page in a separate process, as a reader pastes it; return the output."""
    script = "\n".join(re.findall(r"```python\n(.*?)```", read(page), flags=re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", change(script)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=os.environ | {"JAX_ENABLE_X64": "0"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_example_shortened_runs():
    nll, entropy = run_examples("README.md", lambda s: s.replace("=3000", "=15")).split()
    assert float(entropy) < float(nll) < 10


@pytest.mark.slow
def test_readme_example_learns_as_printed():
    nll, entropy = run_examples("README.md").split()
    # A Gaussian with the data's covariance has an NLL of 2.95.
    assert float(entropy) - 0.05 < float(nll) < float(entropy) + 0.15


@pytest.mark.slow
@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "llms.txt"])
def test_examples_run(page):
    run_examples(page)


@pytest.mark.parametrize("page", [*PAGES, "docs/releasing.md", "docs/running.md"])
def test_commands_and_links_exist(page):
    text = read(page)
    makefile = read("Makefile")
    for target in re.findall(r"`make ([a-z][a-z-]*)`|^ {4}make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert re.search(rf"^{target[0] or target[1]}:", makefile, flags=re.MULTILINE), target
    for name in set(re.findall(r"\bexperiments\.([a-z0-9][a-z0-9_]*)", text)):
        assert (ROOT / "experiments" / f"{name}.py").exists(), name
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_citation_has_the_version_of_the_package():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert re.findall(r"^version: (.*)$", read("CITATION.cff"), flags=re.MULTILINE) == [version]
    assert f"[{version}]" in read("CHANGELOG.md")
