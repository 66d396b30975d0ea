"""The directory of one run.

It holds `config.json`, `metrics.jsonl`, `checkpoints/` and `figures/`; once trained, `flow.jcnf`;
once finished, `summary.json`; and if training broke down, `report.json`.
"""

import atexit
import datetime
import importlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import filelock
import jax

from experiments._runner.config import Experiment
from experiments._runner.metrics_log import json_ready, read_json
from experiments._runner.settings import flat, from_json, to_json
from jcnf import sharding
from jcnf._checks import InputError
from jcnf.flows import Flow
from jcnf.training import checkpoint

# Settings that may change when a run is resumed, because they do not change what it computes.
FREE_SETTINGS = ("run.out", "resume", "loop.resume", "loop.keep_checkpoints", "loop.devices")
# The notes that every flow.jcnf has at least, with their types.
FLOW_NOTES = {"experiment": str, "settings": str, "config": dict, "dim": int, "context_dim": int}


S = TypeVar("S", bound=Experiment)


class RunDir:
    """The directory of a new run or, with --resume, of an unfinished one.

    A run may be `part_of` another one, whose command line then resumes both.

    With several processes, only the first one uses the directory. Each of the others works in a
    temporary copy that is deleted at the end, so that they need no shared file system.

    **Raises:** `InputError` if the directory holds a finished run, an unfinished one without
    --resume, or one with other settings; if it is in use; or if it cannot be written.
    """

    def __init__(
        self,
        name: str,
        settings: Experiment,
        *,
        part_of: "RunDir | None" = None,
    ):
        self.name, self.part_of = name, part_of
        self.settings = _name_of(type(settings))
        self.config = json_ready(to_json(settings))
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.path = settings.run.out or Path("runs") / name / f"{stamp}-{settings.run.seed}"
        self.home = self.path  # the real directory, also in processes that work in a copy
        files = sharding.on_process_zero(lambda: self._open(settings.resumes))
        if jax.process_index() > 0:
            self._copy(files)
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "metrics.jsonl"
        print(f"run directory: {self.path}")

    def _open(self, resume):
        """Check the directory and create it if new; return its files for other processes."""
        if (self.path / "summary.json").exists():
            raise InputError(f"{self.path} holds a finished run: choose another --out")
        started = (self.path / "config.json").exists()
        if started and not resume:
            hint = "" if resume is None else "add --resume to resume it, or "
            raise InputError(f"{self.path} holds an unfinished run: {hint}choose another --out")
        if resume and not started:
            raise InputError(f"no run to resume in {self.path}: drop --resume to start one")
        # A hidden file is the rest of a first write that was killed.
        if not started and any(path for path in self.path.glob("*") if path.name[0] != "."):
            raise InputError(f"{self.path} is not empty and holds no run: choose another --out")
        if started:
            self._same_settings()
            (self.path / "figures").mkdir(exist_ok=True)  # missing if a kill came first
        else:
            self._create()
        self._hold()
        if jax.process_count() == 1:
            return {}
        files = (*self.path.glob("*"), *self.path.glob("checkpoints/*"))
        return {f.relative_to(self.path): f.read_bytes() for f in files if f.is_file()}

    def _copy(self, files):
        self.path = Path(tempfile.mkdtemp(prefix="jcnf-"))
        atexit.register(shutil.rmtree, self.path, ignore_errors=True)
        (self.path / "figures").mkdir()
        for name, content in files.items():
            (self.path / name).parent.mkdir(exist_ok=True)
            (self.path / name).write_bytes(content)

    def _create(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", self.config)
            (self.path / "figures").mkdir()
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path} ({error.strerror}): choose another --out"
            ) from None

    def _hold(self):
        """Lock out other processes until this one ends, if the file system has locks."""
        self._lock = filelock.FileLock(self.path / ".lock", is_singleton=True)
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise InputError(
                f"{self.path} is in use by another process: wait for it to end, or stop it"
            ) from None
        except NotImplementedError:
            pass

    def _same_settings(self):
        self._check_config(f"{self.path} was started", read_json(self.path / "config.json"))

    def _check_config(self, what, before):
        old, new = flat(before), flat(self.config)
        differ = [n for n in new | old if n not in FREE_SETTINGS and old.get(n) != new.get(n)]
        if differ:
            listed = ", ".join(f"{n} {old.get(n)} -> {new.get(n)}" for n in differ)
            raise InputError(
                f"{what} with other settings ({listed}): use the same ones, or choose another --out"
            )

    def check_notes(self, notes: dict[str, Any]) -> dict[str, Any]:
        """Return the notes of a checkpoint, if it is from this run and this version.

        **Raises:** `InputError` that names what differs.
        """
        parts = ("versions", "config", "run_state", "snapshot")
        if not all(isinstance(notes.get(part), dict) for part in parts):
            raise InputError(
                f"a file in {self.checkpoints} is not a checkpoint of a training: "
                "choose another --out"
            )
        self._check_config(f"the checkpoint in {self.checkpoints} was written", notes["config"])
        here, there = versions(), dict.fromkeys(versions()) | notes["versions"]
        if there["jcnf"] != here["jcnf"]:
            raise InputError(
                f"the checkpoint in {self.checkpoints} was written by jcnf {there['jcnf']}, this "
                f"is {here['jcnf']}: resume with that version, or choose another --out"
            )
        others = [f"{n} {there[n]} -> {here[n]}" for n in here if there[n] != here[n]]
        if others:
            warnings.warn(
                "versions have changed, so the run will not be reproduced bit for bit: "
                f"{', '.join(others)}",
                stacklevel=2,
            )
        return notes

    def command_to_resume(self) -> str:
        """Return the command line that resumes this run."""
        if self.part_of is not None:
            return self.part_of.command_to_resume()
        words = [word for word in sys.argv[1:] if word != "--resume"]
        if not any(word.split("=")[0] == "--out" for word in words):
            words += ["--out", str(self.home)]
        return shlex.join(["python", "-m", f"experiments.{self.name}", *words, "--resume"])

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` to the file `name`, whole or not at all."""
        text = json.dumps(json_ready(content), indent=2, allow_nan=False)
        checkpoint.write_atomically(self.path / name, text.encode())

    def save_figures(self, **figures: Any) -> None:
        """Save matplotlib figures as figures/NAME.png."""
        for name, figure in figures.items():
            figure.savefig(self.path / "figures" / f"{name}.png")

    def save_flow(self, flow: Flow, notes: dict[str, Any]) -> None:
        """Save the trained flow as flow.jcnf, with the settings and `notes` for its use."""
        notes = json_ready(
            {
                "experiment": self.name,
                "settings": self.settings,
                "config": self.config,
                "dim": flow.base.dim,
                "context_dim": flow.context_dim or 0,
            }
            | notes
        )
        checkpoint.save(self.path / "flow.jcnf", flow, notes)

    def finish(
        self, metrics: dict, numerics: dict, timing: dict, doubts: Sequence[str] = ()
    ) -> None:
        """Write summary.json, which marks the run as finished, and print its figures.

        The `doubts` are reasons not to trust them, which become the summary's warnings.
        """
        parts = {"metrics": metrics, "numerics": numerics, "timing": timing}
        head = {"experiment": self.name, "config": self.config}
        tail = {"warnings": doubts, "environment": environment()}
        self.write_json("summary.json", head | parts | tail)
        for name, part in parts.items():
            shown = "  ".join(f"{key} {_shown(value)}" for key, value in part.items())
            if shown:
                print(f"{name}: {shown}")
        for doubt in doubts:
            warnings.warn(doubt, stacklevel=2)
        print(f"results and figures: {self.path}")


def kind_of(path: Path) -> type[Experiment]:
    """Return the class of the settings of a trained run.

    **Raises:** `InputError` if it is not the run of an experiment of this version.
    """
    notes = read_flow_notes(path)
    module, _, name = notes["settings"].partition(":")
    # Only from this package, so that a file cannot choose other code to import.
    if module.startswith("experiments."):
        try:
            kind = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            kind = None
        if isinstance(kind, type) and issubclass(kind, Experiment):
            return kind
    raise InputError(f"{path} is a run of another experiment or version ({notes['experiment']})")


def load_flow(path: Path, kind: type[S]) -> tuple[Any, S, dict[str, Any]]:
    """Load the trained flow of a run, its settings of class `kind`, and the flow's notes."""
    notes = read_flow_notes(path)
    try:
        settings = from_json(kind, notes["config"])
    except (InputError, ValueError, TypeError):
        raise InputError(
            f"{path} is a run of another experiment or version ({notes['experiment']})"
        ) from None
    try:
        flow = settings.make_flow(notes["dim"], notes["context_dim"])
    except (ValueError, TypeError) as error:
        raise InputError(f"{path / 'flow.jcnf'} has settings that make no flow: {error}") from None
    flow, _ = checkpoint.load(path / "flow.jcnf", flow)
    return flow, settings, notes


def read_flow_notes(path: Path) -> dict[str, Any]:
    """Return the notes saved with the trained flow of a run."""
    if (path / "config.json").exists() and not (path / "flow.jcnf").exists():
        raise InputError(f"{path} has not finished training: finish it with --resume first")
    notes = checkpoint.read_notes(path / "flow.jcnf")
    if not all(isinstance(notes.get(name), kind) for name, kind in FLOW_NOTES.items()):
        raise InputError(f"{path / 'flow.jcnf'} is not a trained flow")
    return notes


def versions() -> dict[str, str | None]:
    """Return the versions of the packages on which the exact bits of a training depend."""
    return {name: _version(name) for name in ("jcnf", "jax", "equinox", "diffrax", "optax")}


def environment() -> dict[str, Any]:
    """Return the versions, device and commit for the summary."""
    return versions() | {"device": jax.devices()[0].device_kind, "git": _commit()}


def _name_of(kind):
    """Return a class as module:name, with the experiment's module in place of __main__."""
    module = kind.__module__
    spec = getattr(sys.modules[module], "__spec__", None)
    return f"{spec.name if module == '__main__' and spec else module}:{kind.__qualname__}"


def _version(name):
    try:
        return version(name)
    except PackageNotFoundError:  # a checkout on the path that is not installed
        return None


def _commit():
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
