"""SIGINT and SIGTERM end a run at once, and a training at the next step that can be saved."""

import os
import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Raised when a signal ends a run; the message says how to resume it, if that is known."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


def stop_at_once() -> None:
    """From now on, raise `Stopped` as soon as a signal arrives."""
    _handle_by(_stop)


class DelayedSignals:
    """A context in which the first signal only sets `number`; a second one raises `Stopped`."""

    def __init__(self):
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "DelayedSignals":
        self._before = _handle_by(self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.number is not None:
            _stop(number, frame)
        self.number = number
        # Not with print: the signal may have interrupted one.
        os.write(2, b"\nstopping after the current steps, to save them\n")


def _stop(number, frame):
    raise Stopped(number)


def _handle_by(handler):
    """Install `handler` and return the handlers it replaces; ignored signals stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python handles signals in the main thread only
    before: dict[int, Any] = {n: signal.getsignal(n) for n in SIGNALS}
    before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before
