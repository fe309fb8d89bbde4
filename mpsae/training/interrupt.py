"""Ctrl-C in a run: a step is taken whole."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupt:
    """Remember the first Ctrl-C, so that a step is taken whole; the second one stops at once.

    With ``patient`` later ones change nothing, and SIGTERM is remembered too: on a Ctrl-C torchrun
    sends its processes, which have had that of the terminal, one more and a SIGTERM. It kills those
    that are there half a minute later.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.seen, self.patient = False, patient
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM)[: 1 + patient]:
                self.before[number] = signal.signal(number, self._remember)

    def _remember(self, *_: object) -> None:
        self.seen = True
        if not self.patient:
            self.close()

    def close(self) -> None:
        """Let the next Ctrl-C stop at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
