"""What each experiment gives to `cli.main`, for tests that call it within the test process."""

import pkgutil
import runpy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import experiments
from experiments._runner import cli

EXPERIMENTS = [
    module.name
    for module in pkgutil.iter_modules(experiments.__path__)
    if not module.ispkg and not module.name.startswith("_")
]


class Command(NamedTuple):
    """The arguments of `cli.main`, and the docstring of the experiment."""

    run: Callable
    settings: Any
    head: str


def command_of(experiment: str) -> Command:
    """Run the module of an experiment, with `cli.main` replaced."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "main", lambda *arguments: found.extend(arguments))
        module = runpy.run_module(f"experiments.{experiment}", run_name="__main__")
    return Command(*found, module["__doc__"])
