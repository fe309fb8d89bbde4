"""How many requests may still be made, shared by all threads that make them."""

from __future__ import annotations

import threading


class LimitReachedError(Exception):
    """No further request may be made."""


class Requests:
    """Count requests up to a limit, and wake those that wait when all is to end.

    Args:
        limit: requests, each repetition counted; None for any number.
    """

    def __init__(self, limit: int | None = None):
        if limit is not None and limit < 0:
            raise ValueError(f"max_requests must be at least 0, not {limit}")
        self.limit = limit
        self.made = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def take(self) -> None:
        """Count one request.

        Raises:
            LimitReachedError: it would be one too many, or all is to end.
        """
        with self._lock:
            if self._ended.is_set() or (self.limit is not None and self.made >= self.limit):
                raise LimitReachedError(f"{self.made} requests were made")
            self.made += 1

    def wait(self, seconds: float) -> None:
        """Wait before a repetition, not longer than until the end."""
        self._ended.wait(seconds)

    def end(self) -> None:
        """Allow no further request."""
        self._ended.set()
