"""`mpsae push`: trained SAEs to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field as option

from mpsae.cli.saes import find_saes
from mpsae.sae import hub


@dataclass(kw_only=True)
class PushConfig:
    """Upload the SAEs of a run to a repo of the Hugging Face hub, with a card that lists them."""

    run: Path = option(positional=True, metavar="RUN")
    """Folder of a run, or of a single SAE."""
    repo: str = option(positional=True, metavar="USER/REPO")
    """Hub id of the repo, made where it does not exist; the SAEs lie in it as in the run."""
    private: bool = False
    """Make it private; a repo that exists stays as it is."""
    revision: str | None = None
    """Branch to push to, made where it does not exist."""


def run(config: PushConfig) -> None:
    """Upload, and say where the SAEs are now."""
    folders = {_name(folder, config.run): folder for folder in find_saes(config.run)}
    url = hub.push(folders, config.repo, private=config.private, revision=config.revision)
    print(f"pushed {len(folders)} to {url}")


def _name(folder: Path, run: Path) -> str:
    """Place in the repo: that in the run, or in the checkpoint of one that is not finished."""
    parts = folder.relative_to(run).parts
    return "/".join(part for part in parts if not part.startswith("checkpoint-"))
