"""The JSON files of a run directory, and `metrics.jsonl`, which grows by a line per record."""

import json
import math
import os
from pathlib import Path
from typing import Any

from jcnf._checks import InputError
from jcnf.training import checkpoint


class MetricsLog:
    """The log metrics.jsonl, cut back to the step from which a run resumes."""

    def __init__(self, path: Path, records: list[dict], step: int):
        self.path = path
        self.records = [r for r in records if r["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in self.records)
        checkpoint.write_atomically(path, lines.encode())

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.records.append(json_ready(record))
        with open(self.path, "a") as file:
            file.write(json.dumps(self.records[-1], allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run directory; raise `InputError` if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: is {path.parent} a run directory?") from None
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged: restore it, or start a new run") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, except for a last line that a kill cut short.

    **Raises:** `InputError` with the number of any other damaged line.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise InputError(
                    f"line {number} of {path} is damaged: repair it, or remove it"
                ) from None
    return records


def json_ready(value: Any) -> Any:
    """Replace paths by strings, tuples by lists, and NaN and infinities by None."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
