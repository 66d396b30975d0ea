"""The command line of every experiment: parse, check and run it; report an error in one line."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from experiments._runner.config import RunSettings
from experiments._runner.progress import show_warnings_in_one_line
from experiments._runner.signals import Stopped, stop_at_once
from jcnf import sharding
from jcnf._checks import InputError

S = TypeVar("S", bound=RunSettings)


def main(run: Callable[[S], None], settings: type[S] | Mapping[str, type[S]]) -> None:
    """Run an experiment from `sys.argv`.

    If `settings` maps names to presets, `--preset NAME` chooses one. Without that flag, the preset
    named by `--data` is used if there is one, otherwise the first.

    Bad input and a disk that is full or cannot be written end in one line on standard error and
    exit code 2. SIGINT and SIGTERM end in a line that says how to resume and exit codes 130 and
    143.
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
    show_warnings_in_one_line()
    stop_at_once()
    try:
        sharding.initialize()
        stop_at_once()  # again, because jax.distributed installs a SIGTERM handler
        if jax.process_index() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until exit)
        config.check()
        with jax.set_mesh(config.make_mesh()):
            run(config)
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit(_fail("error: out of memory: lower --batch, --widths or the number of rows", 2))
    except OSError as error:
        place = error.filename or config.out or "a file"
        message = f"error: {place}: {error.strerror or error}"
        sys.exit(_fail(f"{message}: free some space or use another path; {_going_on(config)}", 2))
    except Stopped as stop:
        sys.exit(_fail(str(stop) or f"stopped: {_going_on(config)}", 128 + stop.number))


def _going_on(config):
    """Return a hint on how to resume a run that was cut short."""
    if hasattr(config, "resume") and getattr(config, "from_run", None) is None:
        return "resume from the last checkpoint with --resume --out RUN_DIRECTORY"
    return "only the files already written are kept"


def _preset(presets, words):
    """Return the settings that the words choose, and the words without `--preset`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    try:
        chosen, rest = parser.parse_known_args(words)
        parser.add_argument("--data")
        data = parser.parse_known_args(rest)[0].data
    except argparse.ArgumentError as error:
        raise InputError(f"{error}: use one of {', '.join(presets)}") from None
    if chosen.preset is not None and chosen.preset not in presets:
        raise InputError(f"unknown preset '{chosen.preset}': use one of {', '.join(presets)}")
    name = chosen.preset or (data if data in presets else next(iter(presets)))
    return presets[name], rest


def _fail(message, code):
    print(message, file=sys.stderr)
    return code
