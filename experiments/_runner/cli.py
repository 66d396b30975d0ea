"""The command line of every experiment: parse, check, run, and say in one line what was wrong."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from experiments._runner.config import RunSettings
from experiments._runner.signals import Stopped, stop_at_once
from jcnf import sharding
from jcnf._checks import InputError

S = TypeVar("S", bound=RunSettings)


def main(run: Callable[[S], None], settings: type[S] | Mapping[str, type[S]]) -> None:
    """Run an experiment from `sys.argv`.

    Of several `settings`, presets by name, `--preset NAME` chooses; without it --data does where it
    names one, or else it is the first. Bad input ends in one line on standard error and exit code
    2, a disk that is full or cannot be written too; SIGINT and SIGTERM in how to go on, and 130
    and 143.
    """
    words, description = sys.argv[1:], sys.modules["__main__"].__doc__
    kind: Any = settings
    if isinstance(settings, Mapping):
        description = f"{description}\n--preset: {', '.join(settings)}"
        try:
            kind, words = _preset(settings, words)
        except InputError as error:
            sys.exit(_fail(f"error: {error}", 2))
    config = tyro.cli(kind, args=words, description=description)
    if config.x64:
        jax.config.update("jax_enable_x64", True)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "jcnf" / "xla"))
    stop_at_once()
    try:
        sharding.join()
        stop_at_once()  # again: jax.distributed takes SIGTERM to itself
        if jax.process_index() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end)
        config.check()
        with jax.set_mesh(config.make_mesh()):
            run(config)
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit(_fail("error: out of memory: lower --batch, --widths or the rows asked for", 2))
    except OSError as error:
        place = error.filename or config.out or "a file"
        message = f"error: {place}: {error.strerror or error}"
        sys.exit(_fail(f"{message}: make room, or give another place; {_going_on(config)}", 2))
    except Stopped as stop:
        sys.exit(_fail(str(stop) or f"stopped: {_going_on(config)}", 128 + stop.number))


def _going_on(config):
    """How to go on with a run that ended before its end."""
    if hasattr(config, "resume") and getattr(config, "from_run", None) is None:
        return "--resume and --out RUN_DIRECTORY go on from the last checkpoint"
    return "nothing of it is kept but the files it has written"


def _preset(presets, words):
    """The settings that the words name, and the words without the flag that did so."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    try:
        chosen, rest = parser.parse_known_args(words)
        parser.add_argument("--data")
        data = parser.parse_known_args(rest)[0].data
    except argparse.ArgumentError as error:
        raise InputError(f"{error}: name one of {', '.join(presets)}") from None
    if chosen.preset is not None and chosen.preset not in presets:
        raise InputError(f"unknown preset '{chosen.preset}': use one of {', '.join(presets)}")
    name = chosen.preset or (data if data in presets else next(iter(presets)))
    return presets[name], rest


def _fail(message, code):
    print(message, file=sys.stderr)
    return code
