"""What jcnf is timed against: each peer's small program, in the manner of its own documentation.

All get our weights, batch, solver, tolerances and optimiser. torch is imported by `load` alone.
"""

import functools
import importlib
import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from jcnf._checks import InputError

NEEDED = ("torch", "torchdiffeq", "torchdyn", "torchcfm", "zuko", "flowjax")
SOLVING = ("torchdiffeq", "torchdyn", "zuko")  # peers with a training step by likelihood


def require_peers() -> None:
    """Raise `InputError` where no peer is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if len(missing) == len(NEEDED):
        raise InputError(
            f"--peers needs some of {', '.join(missing)}: pip install -c constraints.txt -e "
            "'.[peers]'"
        )


def threads() -> int:
    """The processors that this process may use, which is how many threads XLA takes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load(*names: str) -> dict[str, ModuleType]:
    """The programs of these peers by name, with torch on as many threads as XLA.

    A peer that cannot be imported is named, once, and left out.
    """
    found = {name: _program_of(name) for name in names}
    return {name: module for name, module in found.items() if module is not None}


@functools.cache
def _program_of(name):
    try:
        importlib.import_module("torch").set_num_threads(threads())
        return importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # torch's own kinds among them, where its parts do not match
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"  {name}: left out, for it cannot be imported ({reason})")
        return None


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in NEEDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
