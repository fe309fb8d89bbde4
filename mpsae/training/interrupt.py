"""Ctrl-C and SIGTERM in a run: a step is taken whole."""

from __future__ import annotations

import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A command ended on a signal, with everything written that it needs to go on."""

    def __init__(self, signal: signal.Signals):
        super().__init__(signal)
        self.signal = signal

    def __str__(self) -> str:
        return f"stopped by {self.signal.name}"


class Interrupt:
    """Remember the first SIGINT or SIGTERM, so that a step is taken whole; a second stops at once.

    A signal that the process ignores stays ignored, and outside the main thread nothing is changed.
    With ``patient`` later ones change nothing: on a Ctrl-C torchrun sends its processes, which have
    had that of the terminal, one more and a SIGTERM. It kills those that are there half a minute
    later.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.seen: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: set by other than Python, and not to be set again
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, _: object) -> None:
        self.seen = self.seen or signal.Signals(number)
        if not self.patient:
            self.close()

    def close(self) -> None:
        """Let the next signal do what it did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
