"""Write a results file, with the machine and the commit that it is of."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from mpsae import benchmark

RESULTS = Path(__file__).parent / "results"


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Device, versions and commit, as every results file has them."""
    return benchmark.environment(device) | {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return ""
    return done.stdout.strip()


def device_name(device: torch.device | None = None) -> str:
    """Name the device as its results files do: lower case, words joined by hyphens."""
    name = benchmark.environment(device)["device"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(
    name: str,
    result: dict[str, Any],
    folder: Path | None = None,
    device: torch.device | None = None,
) -> Path:
    """Write `<name>.json` in results/ or a folder, the environment first, a row on a line."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    whole = {"environment": environment(device)} | result
    rows = ",\n  ".join(json.dumps(row) for row in whole.pop("rows"))
    head = json.dumps(whole, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
    return path
