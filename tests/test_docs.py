"""The site is right: its Python runs as printed, links lead somewhere, every public name is there.

`python -m tests.test_docs docs/page.md` runs the Python of a page and keeps the figures it saves.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
TEXTS = [*sorted(ROOT.glob("*.md")), *PAGES]
# Modules of a room that are not for users, though their names have no underscore.
INTERNAL = {
    *("jcnf.data.images.files", "jcnf.data.tables.checks", "jcnf.data.tables.csv"),
    *("jcnf.data.tables.dependence", "jcnf.sklearn.sides", "jcnf.training.reports"),
}


def blocks(path, language="python"):
    """Return the code blocks of a page that are to be run."""
    text = re.sub(r"^(`{4,}).*?^\1$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run(code, folder, **env):
    """Run code in a separate process, as users do, and return what it prints."""
    settings = {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **env}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_quick(path):
    return "<!-- quick -->" in path.read_text()[:500]


def with_code(paths):
    return [
        pytest.param(
            path,
            id=str(path.relative_to(ROOT)),
            marks=[] if is_quick(path) else [pytest.mark.slow],
        )
        for path in paths
        if blocks(path)
    ]


@pytest.mark.parametrize("path", with_code(PAGES))
def test_the_code_of_a_page_runs(path, tmp_path):
    run("\n".join(blocks(path)), tmp_path)
    shown = {Path(name).name for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text())}
    saved = {figure.name for figure in tmp_path.glob("*.png")}
    assert saved <= shown, f"figures that the page does not show: {saved - shown}"


@pytest.mark.parametrize("path", [p for p in TEXTS if blocks(p)], ids=lambda p: p.name)
def test_the_code_of_a_page_compiles(path):
    for block in blocks(path):
        ast.parse(block)


def anchors(text):
    """Return the anchors of the headings, as MkDocs and code hosts make them, about."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*?)(?: \{.*\})?$", text, flags=re.MULTILINE)
    slugs = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles]
    return {re.sub(r"\s", "-", slug) for slug in slugs}


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"(`{3,}).*?\1|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name} links to {link}, which does not exist"
        assert target.is_relative_to(ROOT), f"{path.name} links to {link}, outside the repository"
        if anchor and target.suffix == ".md" and not anchor.startswith("jcnf."):
            assert anchor in anchors(target.read_text()), f"{path.name} links to {link}: no heading"


def names_of(path):
    """Yield the names that a file defines for users: its classes and functions."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


def public_names():
    """Yield each public name, as `module.name`.

    A package exports what its `__init__` imports as itself. A file from which its package imports
    nothing is public as a whole.
    """
    exported = set()
    for path in (ROOT / "jcnf").rglob("__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("jcnf"):
                exported.add(node.module)
                for alias in node.names:
                    yield f"{package}.{alias.name}"
    for path in (ROOT / "jcnf").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.stem.startswith("_") or module in exported | INTERNAL:
            continue
        for name in names_of(path):
            yield f"{module}.{name}"


def look_up(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_reference_has_every_public_name():
    listed = [
        name
        for page in (DOCS / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
    ]
    assert len(listed) == len(set(listed)), "a name is in the reference twice"
    # Docstrings of files, beside what is in them.
    modules = ("jcnf.ode.adjoint", "jcnf.flows.numpyro")
    entries = [(name.rpartition(".")[2], look_up(name)) for name in set(listed) - {*modules}]
    missing = []
    for name in sorted(set(public_names())):
        value, last = look_up(name), name.rpartition(".")[2]
        is_module = type(value).__name__ == "module"
        if not is_module and not any(last == other and value is v for other, v in entries):
            missing.append(name)
    assert not missing, f"list these in docs/reference/: {missing}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    nav = set(re.findall(r"[\w/]+\.md", text[text.index("\nnav:") : text.index("\nvalidation:")]))
    from_the_top = {"contributing.md", "changelog.md"}  # docs/_hooks/pages.py adds them
    assert nav == {str(path.relative_to(DOCS)) for path in PAGES} | from_the_top


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(path.read_text() for path in PAGES)
    for target in set(re.findall(r"[`\n] *make ([a-z][a-z-]*)\b", text)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for name in set(re.findall(r"experiments\.([a-z0-9_]+)", text)):
        assert (ROOT / "experiments" / f"{name}.py").exists(), name


def keep_figures(page):
    """Run the Python of a page, and keep its figures in docs/figures/."""
    with tempfile.TemporaryDirectory() as folder:
        print(run("\n".join(blocks(page)), folder), end="")
        for figure in Path(folder).glob("*.png"):
            shutil.copy(figure, DOCS / "figures" / figure.name)
            print(f"docs/figures/{figure.name}: {figure.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep_figures(Path(name).resolve())
