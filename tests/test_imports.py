"""Imports go in one direction, and `import jcnf` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A part of the package imports from itself and from the parts before it.
ORDER = [
    *("_checks", "data", "plot", "sharding", "distributions", "fields", "divergence"),
    *("manifolds", "regularizers", "ode", "flows", "objectives", "training", "evaluate"),
    *("inference", "sklearn", "sbi", "selfcheck"),
]
# These import no other parts than `_checks`.
ALONE = ("data", "plot")
FILES = sorted((ROOT / "jcnf").rglob("*.py"))
SCRIPTS = sorted((ROOT / "experiments").rglob("*.py"))
HEAVY = ["matplotlib", "PIL", "sklearn", "pandas", "tyro", "tqdm", "ott"]
HEAVY += ["distrax", "tensorflow_probability", "experiments"]


def imported(path):
    """Yield the dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
    """Return the part of jcnf, a module or a folder, that a file belongs to."""
    return path.relative_to(ROOT / "jcnf").parts[0].removesuffix(".py")


def users(package):
    return {part(path) for path in FILES if any(n.split(".")[0] == package for n in imported(path))}


def test_every_module_has_its_place():
    assert {part(path) for path in FILES} == {*ORDER, "__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    here = part(path)
    allowed = {
        **{name: set(ORDER[: i + 1]) - set(ALONE) for i, name in enumerate(ORDER)},
        **{name: {"_checks", name} for name in ALONE},
        "sklearn": set(ORDER) - {"plot", "sbi", "selfcheck"},  # it knows tables
        "__init__": set(ORDER),
    }[here]
    names = list(imported(path))
    used = {name.split(".")[1] for name in names if name.startswith("jcnf.")}
    assert used <= allowed, f"{path} imports {used - allowed}"
    assert not [name for name in names if name.split(".")[0] in ("experiments", "tests")]


@pytest.mark.parametrize(
    "path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "experiments"))
)
def test_no_experiment_imports_another(path):
    names = [name.split(".") for name in imported(path)]
    used = {name[1] for name in names if name[0] == "experiments" and len(name) > 1}
    here = path.relative_to(ROOT / "experiments").parts[0]
    shared = {"_runner": {"_runner"}, "_tasks": {"_runner", "_tasks"}}
    assert used <= shared.get(here, {"_runner", "_tasks", "bench"})


def test_diffrax_and_distrax_have_their_place():
    assert users("diffrax") == {"ode"}
    assert users("distrax") == {"distributions", "flows", "sbi"}
    assert users("tensorflow_probability") == set()


def test_import_is_light():
    code = f"import sys, jcnf; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
