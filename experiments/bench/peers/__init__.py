"""The peers of jcnf: a small program for each, written as in the peer's own documentation.

All of them get our weights, batch, solver, tolerances and optimizer. Only `load` imports torch.
"""

import functools
import importlib
import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from jcnf._checks import InputError

PACKAGES = ("torch", "torchdiffeq", "torchdyn", "torchcfm", "zuko", "flowjax")
SOLVING = ("torchdiffeq", "torchdyn", "zuko")  # peers with a training step by likelihood


def require_peers() -> None:
    """Raise `InputError` if no peer is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if len(missing) == len(PACKAGES):
        raise InputError(
            f"--peers needs at least one of {', '.join(missing)}: pip install -c constraints.txt "
            "-e '.[peers]'"
        )


def threads() -> int:
    """Return the number of processors that this process may use, as XLA does."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load(*names: str) -> dict[str, ModuleType]:
    """Return the programs of these peers by name, with as many torch threads as XLA has.

    A peer that cannot be imported is left out, with a message the first time.
    """
    found = {name: _program_of(name) for name in names}
    return {name: module for name, module in found.items() if module is not None}


@functools.cache
def _program_of(name):
    try:
        importlib.import_module("torch").set_num_threads(threads())
        return importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # torch raises its own kinds when its parts do not match
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"  {name}: left out because it cannot be imported ({reason})")
        return None


def versions() -> dict[str, str]:
    """Return the versions of the installed peers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
