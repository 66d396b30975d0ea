"""SIGINT and SIGTERM: they end a run, and training at the next step at which it can be saved."""

import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the message says how to go on, where that is known."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


def stop_at_once() -> None:
    """From now on a signal raises `Stopped`, wherever the program is."""
    _handle_by(_stop)


class Waiting:
    """A context in which the first signal waits: it is `number`, None before. A second does not."""

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Waiting":
        self._before = _handle_by(self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.number is not None:
            _stop(number, frame)
        self.number = number
        # Not by print, which a signal may have interrupted.
        os.write(2, b"\nending after the steps under way, to save them\n")


def _stop(number, frame):
    raise Stopped(number)


def _handle_by(handler):
    """Handle the signals so, and give their handlers until now; those ignored stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # where Python handles none
    before: dict[int, Any] = {n: signal.getsignal(n) for n in SIGNALS}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before
