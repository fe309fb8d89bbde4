"""Ctrl-C in a run: a step is taken whole."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupt:
    """Remember the first Ctrl-C, so that a step is taken whole; the second one stops at once.

    With ``patient`` later ones change nothing: torchrun passes on what the terminal sent already.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.seen, self.patient = False, patient
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._remember)

    def _remember(self, *_: object) -> None:
        self.seen = True
        if not self.patient:
            self.close()

    def close(self) -> None:
        """Let the next Ctrl-C stop at once."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None
