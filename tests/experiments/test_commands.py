"""The commands that READMEs, pages and the experiments' docstrings print are parsed."""

import ast
import re
from pathlib import Path

import pytest
from command_lines import EXPERIMENTS, command_of

from experiments._runner import cli

ROOT = Path(__file__).parents[2]
NAME = f"(?:{'|'.join(EXPERIMENTS)})"
# The number of commands on each page, at least: what a search that has gone wrong would not find.
LEAST = {"README.md": 2, "experiments/README.md": 30}
LEAST |= {"docs/benchmarks.md": 15, "docs/reproductions.md": 14, "docs/running.md": 2}
LEAST |= {f"experiments/{name}.py": 1 for name in EXPERIMENTS}


def commands_on(page):
    """Return the lines `python -m experiments.NAME ...`, and what backticks quote of this form."""
    text = (ROOT / page).read_text()
    if page.endswith(".py"):
        text = ast.get_docstring(ast.parse(text)) or ""
    lines = re.findall(rf"^ +\S*python -m experiments\.({NAME}\b.*)$", text, flags=re.MULTILINE)
    quoted = re.findall(rf"`(?:python -m experiments\.)?({NAME}\s[^`]*)`", text)
    found = [" ".join(each.replace("...", "").split()) for each in lines + quoted]
    return [each for each in found if "--help" not in each]


COMMANDS = {page: commands_on(page) for page in LEAST}
DISTINCT = sorted({command for found in COMMANDS.values() for command in found})


@pytest.mark.parametrize("page", LEAST)
def test_each_page_has_its_commands(page):
    assert len(COMMANDS[page]) >= LEAST[page]


@pytest.mark.parametrize("command", DISTINCT)
def test_a_printed_command_is_parsed(command):
    name, *words = command.split()
    cli.parse(command_of(name).settings, words)
