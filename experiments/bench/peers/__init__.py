"""What jcnf is timed against: each peer's small program, in the manner of its own documentation.

All get our weights, batch, solver, tolerances and optimiser. torch is imported by `load` alone.
"""

import importlib
import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from jcnf.errors import InputError

NEEDED = ("torch", "torchdiffeq", "torchdyn", "torchcfm", "zuko", "flowjax")
SOLVING = ("torchdiffeq", "torchdyn", "zuko")  # peers with a training step by likelihood


def require_peers() -> None:
    """Raise `InputError` where a peer is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--peers needs {', '.join(missing)}: pip install -c constraints.txt -e '.[peers]'"
        )


def threads() -> int:
    """The processors that this process may use, which is how many threads XLA takes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load(*names: str) -> list[ModuleType]:
    """The programs of these peers, with torch on as many threads as XLA."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads())
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in NEEDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
