"""Ctrl-C, SIGTERM and SIGHUP: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # a terminal that is closed; Windows has none
    _SIGNALS.append(signal.SIGHUP)

NOTICE = "saving everything after this step; Ctrl-C again stops at once"


class Interruption:
    """A context in which the first Ctrl-C, SIGTERM or SIGHUP sets a flag.

    It does so in the main thread. A SIGHUP that is ignored, as under nohup, stays so.
    """

    def __init__(self, on_request: Callable[[], None]):
        self.requested = False
        self._on_request = on_request
        self._number: int = signal.SIGINT
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _SIGNALS if not _is_ignored_hangup(number)]
            self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def end(self) -> NoReturn:
        """End as the signal would have ended it."""
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and _comes_twice(number):
            return
        self._number = number
        if self.requested:
            self.end()
        self.requested = True
        with suppress(RuntimeError):  # the signal came in the midst of a write to the terminal
            self._on_request()


def _comes_twice(number: int) -> bool:
    """Whether a closed terminal may send it a second time, from the kernel and from the shell."""
    return number == getattr(signal, "SIGHUP", None)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
