"""`mpsae report`: a page about SAEs, from what the other commands wrote into their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simple_parsing import field as option

from mpsae.cli.saes import find_saes


@dataclass(kw_only=True)
class ReportConfig:
    """Write a page that compares SAEs, from what eval, probe, latents and autointerp measured."""

    runs: list[Path] = option(positional=True, nargs="+", metavar="RUN")
    """Folders of runs, or of single SAEs."""
    out: Path = Path("report.html")
    """The page; its pictures are written as PNG into a folder beside it."""
    latents: int = 50
    """Latents to show of each SAE, spread over their frequencies."""


def run(config: ReportConfig) -> None:
    """Write the page and print where it is, and where its pictures are."""
    from mpsae.report import read_record, write_report  # matplotlib takes a while

    found: dict[Path, tuple[Path, Path]] = {}
    for given in config.runs:
        for folder in find_saes(given):
            found.setdefault(folder.resolve(), (folder, given))
    records = [read_record(folder, given) for folder, given in found.values()]
    page, *pictures = write_report(records, config.out, limit=config.latents)
    print(page)
    if pictures:
        print(f"{pictures[0].parent}: {len(pictures)} pictures")
