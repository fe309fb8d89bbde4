"""The whole page: one file that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from mpsae.report import curves, figures, latents, numbers, tables
from mpsae.report.drawing import Picture
from mpsae.report.groups import Comparison, comparisons
from mpsae.report.markup import Html, element, join
from mpsae.report.records import Record
from mpsae.report.svg import inline, save_png
from mpsae.sae.checkpoint import renamed


def write_report(records: Sequence[Record], out: Path, *, limit: int = 50) -> list[Path]:
    """Write the page, and its pictures as PNG into the folder ``<stem of out>-figures``.

    Args:
        records: of SAEs, at least one.
        out: the page; one that is there is replaced.
        limit: latents shown of an SAE.

    Returns:
        The page, then the pictures. Equal records give equal files.

    Raises:
        ValueError: no records; a limit below 0.
    """
    if not records:
        raise ValueError("there are no SAEs to report on")
    if limit < 0:
        raise ValueError(f"latents={limit} must be at least 0")
    folder = out.with_name(f"{out.stem}-figures")
    written: list[Path] = []

    def shown(pictures: Sequence[Picture], prefix: str) -> Html:
        made = []
        for picture in pictures:
            name = f"{prefix}{picture.name}"
            folder.mkdir(parents=True, exist_ok=True)
            written.append(save_png(picture.figure, folder / f"{name}.png"))
            link = element("a", "PNG", href=quote(f"{folder.name}/{name}.png"))
            made.append(
                element(
                    "figure",
                    inline(picture.figure, name, picture.alt),
                    element("figcaption", picture.caption, " ", link),
                )
            )
        return element("div", *made, class_="figures") if made else Html("")

    text = page(records, shown, limit=limit)
    out.parent.mkdir(parents=True, exist_ok=True)
    with renamed(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [out, *written]


def page(
    records: Sequence[Record], shown: Callable[[Sequence[Picture], str], Html], *, limit: int = 50
) -> str:
    """Lay the page out.

    Args:
        records: of SAEs.
        shown: makes figures of pictures, given a prefix of their names.
        limit: latents shown of an SAE.
    """
    compared = comparisons(records)
    models = list(dict.fromkeys(of.model for of in compared))
    title = f"Sparse autoencoders on {', '.join(models)}"
    parts = [_header(title, records, compared)]
    for number, of in enumerate(compared):
        prefix = f"part-{number + 1}-" if len(compared) > 1 else ""
        parts += _comparison(of, shown, prefix, len(compared) > 1)
    parts += _browse(compared, limit)
    script, style = (_asset(name) for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta/", charset="utf-8"),
        element("meta/", http_equiv="Content-Security-Policy", content=policy),
        element("meta/", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta/", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    body = element("body", element("main", *parts), element("script", Html(script)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return resources.files("mpsae.report").joinpath(name).read_text(encoding="utf-8")


def _header(title: str, records: Sequence[Record], compared: Sequence[Comparison]) -> Html:
    tokens = sorted({r.tokens["reconstruction"] for r in records if "reconstruction" in r.tokens})
    places = ", ".join(dict.fromkeys(of.hookpoint for of in compared))
    facts = [
        ("SAEs", f"{len(records):,}"),
        ("Hookpoint" if len(compared) == 1 else "Hookpoints", places),
        ("Dataset", ", ".join(dict.fromkeys(r.dataset for r in records if r.dataset))),
        ("Held-out tokens", " or ".join(f"{count:,}" for count in tokens)),
    ]
    listed = [
        element("div", element("dt", name), element("dd", value)) for name, value in facts if value
    ]
    note = None
    if len(compared) > 1:
        note = element(
            "p", f"These SAEs encode the activations of {len(compared)} places of models. What is "
            "measured at different places is not compared: each has a part of its own.",
        )  # fmt: skip
    return element("header", element("h1", title), element("dl", *listed, class_="facts"), note)


def _comparison(
    of: Comparison, shown: Callable[[Sequence[Picture], str], Html], prefix: str, several: bool
) -> list[Html]:
    parts = [element("h2", f"{of.model}, {of.hookpoint}" if several else "Summary")]
    parts += [
        tables.findings(of),
        tables.summary(of),
        element(
            "p", "Bold: best of those at about equal L0 (within 10 %). ↓ lower is better, "
            "↑ higher is better.", class_="note",
        ),
        tables.conditions(of),
        tables.meanings(),
        tables.missing([entry.record for entry in of.entries]),
    ]  # fmt: skip
    level = "h3" if several else "h2"
    for heading, note, pictures, more in (
        ("Reconstruction", None, figures.reconstruction(of), numbers.reconstruction(of)),
        (
            "Interpretability beside reconstruction",
            "FVU falls to the left. If SAEs that reconstruct better were less interpretable, the "
            "points on the left would have more absorption and lower scores than others of equal "
            "L0.",
            figures.interpretability(of),
            None,
        ),
        ("Sparse probing", None, curves.probing(of), None),
        ("Firing frequencies", None, curves.firing(of), None),
        ("Atoms that point the same way", None, curves.babel(of), None),
    ):
        if pictures or more:
            parts.append(element(level, heading))
            parts += [element("p", note, class_="note")] if note else []
            parts.append(shown(pictures, prefix))
            parts += [more] if more else []
    return parts


def _browse(compared: Sequence[Comparison], limit: int) -> list[Html]:
    parts: list[Html] = []
    for of in compared:
        for entry in of.entries:
            part = latents.section(entry, limit, opened=not parts)
            if not part:
                continue
            if len(compared) > 1:
                part = join(element("p", f"{of.model}, {of.hookpoint}", class_="note"), part)
            parts.append(part)
    if not parts:
        return []
    note = (
        "Tokens on which the latent fires are marked, the stronger the more; the number is shown "
        "where the pointer rests. ↵ is a line end, → a tab."
    )
    return [element("h2", "Latents"), element("p", note, class_="note"), *parts]
