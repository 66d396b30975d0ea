"""The command line of every experiment: parse and check it, run it, report errors in one line."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from experiments._runner.config import Experiment
from experiments._runner.progress import show_warnings_in_one_line
from experiments._runner.signals import Stopped, stop_at_once
from jcnf import sharding
from jcnf._checks import InputError

S = TypeVar("S", bound=Experiment)
CONFIG = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitArgPrefixes)


def parse(
    settings: Any, words: Sequence[str], description: str | None = None, program: str | None = None
) -> Any:
    """Return the settings that command-line words describe.

    `settings` is a class of settings, an instance that gives the defaults, or a mapping from names
    to either. If the first word is one of these names it chooses; otherwise the first name does.

    Flags need no prefix and may stand in any order, those of a choice such as `field:mlp` anywhere
    after it.
    """
    if isinstance(settings, Mapping):
        names = ", ".join(settings)
        description = (
            f"{description}\n\nThe first word can be one of: {names} (default: the first)."
        )
        chosen = next(iter(settings))
        if words and words[0] in settings:
            chosen, *words = words
            program = program and f"{program} {chosen}"
        settings = settings[chosen]
    # Set the precision first: it decides which tolerances are possible.
    if "--x64" in words:
        jax.config.update("jax_enable_x64", True)
    default = {} if isinstance(settings, type) else {"default": settings}
    kind = settings if isinstance(settings, type) else type(settings)
    return tyro.cli(
        kind, args=words, prog=program, description=description, config=CONFIG, **default
    )


def main(run: Callable[[S], None], settings: type[S] | S | Mapping[str, type[S] | S]) -> None:
    """Run an experiment from `sys.argv`, with settings as `parse` takes them.

    Bad input and a disk that is full or cannot be written end in one line on standard error and
    exit code 2. SIGINT and SIGTERM end in a line that says how to resume and exit codes 130 and
    143.
    """
    module: Any = sys.modules["__main__"]
    program = f"python -m {module.__spec__.name}" if module.__spec__ else None
    config = parse(settings, sys.argv[1:], module.__doc__, program)
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
        mesh = config.make_mesh()
        try:
            config.trace()
        except ValueError as error:
            raise InputError(str(error)) from None
        with jax.set_mesh(mesh):
            run(config)
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit(_fail("error: out of memory: lower --batch, --widths or the number of rows", 2))
    except OSError as error:
        path = error.filename or config.run.out or "a file"
        hint = f"free some space or use another path; {_resume_hint(config)}"
        sys.exit(_fail(f"error: {path}: {error.strerror or error}: {hint}", 2))
    except Stopped as stop:
        sys.exit(_fail(str(stop) or f"stopped: {_resume_hint(config)}", 128 + stop.number))


def _resume_hint(config):
    """Return a hint on how to resume a run that was cut short."""
    if config.resumes is not None:
        return "resume from what is saved with --resume --out RUN_DIRECTORY"
    return "only the files already written are kept"


def _fail(message, code):
    print(message, file=sys.stderr)
    return code
