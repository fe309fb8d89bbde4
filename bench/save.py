"""Write a results file, with the machine and the commit that it is of."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from mpsae import benchmark

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, versions and commit, as every results file has them."""
    return benchmark.environment() | {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def device_name() -> str:
    """Name the device as its results files do: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", benchmark.environment()["device"].lower()).strip("-")


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<folder>/<name>.json`, the environment first, a row on a line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    whole = {"environment": environment()} | result
    rows = ",\n  ".join(json.dumps(row) for row in whole.pop("rows"))
    head = json.dumps(whole, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
    return path
