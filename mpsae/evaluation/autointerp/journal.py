"""What is known of latents so far, a line of JSON each, so that nothing is asked twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Append records to a file and find them again by key.

    Args:
        path: made with the first record. A last line that was cut short is passed over.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._records: dict[str, dict[str, Any]] = {}
        self._whole = True
        if path.exists():
            text = path.read_text(errors="replace")
            self._whole = text.endswith("\n") or not text
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                    self._records[record["key"]] = record
                except (ValueError, TypeError, LookupError):
                    continue

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, which has a `key`; it is on its way to the disk when this returns."""
        line = json.dumps(record) + "\n"
        with self._lock:
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("a") as file:
                file.write(line if self._whole else "\n" + line)
            self._whole = True
            self._records[record["key"]] = dict(record)
