"""The command line of every experiment: parse, check, run, and say in one line what was wrong."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import tyro

from experiments.run_settings import RunSettings
from jcnf.errors import InputError

S = TypeVar("S", bound=RunSettings)


def main(run: Callable[[S], None], settings: type[S]) -> None:
    """Run an experiment from `sys.argv`.

    Bad input ends in one line on standard error and exit code 2; Ctrl-C in how to go on, and 130.
    """
    config = tyro.cli(settings, description=sys.modules[settings.__module__].__doc__)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "jcnf" / "xla"))
    try:
        config.check()
        run(config)
    except InputError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit(_fail("error: out of memory: lower --batch, --widths or the rows asked for", 2))
    except KeyboardInterrupt:
        sys.exit(
            _fail("interrupted: go on with the same command, --out RUN_DIRECTORY and --resume", 130)
        )


def _fail(message, code):
    print(message, file=sys.stderr)
    return code
