"""Figures as PNG files, and as SVG that lives in a page and takes its colours from there."""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mpsae.report import style
from mpsae.report.markup import Html, visible

_NAMES = (
    "BLUE", "SKY", "RED", "ORANGE", "GREY", "GREEN", "PINK", "INK", "RULE", "PAPER",
)  # fmt: skip
VARIABLES = {getattr(style, name).lower(): f"--{name.lower()}" for name in _NAMES}
"""Colours of figures and the CSS variables that stand for them in a page."""

RC: dict[Any, Any] = style.STYLE | {
    "svg.fonttype": "none", "svg.hashsalt": "mpsae",  # text stays text; ids are always the same
    "text.color": style.INK, "axes.labelcolor": style.INK, "axes.edgecolor": style.INK,
    "xtick.color": style.INK, "ytick.color": style.INK, "grid.color": style.RULE,
    "axes.facecolor": "none", "figure.facecolor": style.PAPER, "text.parse_math": False,
}  # fmt: skip


def save_png(figure: Figure, path: Path) -> Path:
    """Write a picture with a white ground."""
    figure.savefig(path, format="png", dpi=200, metadata={"Software": None})
    figure.set_layout_engine("none")  # what it laid out stays, for the next file
    return path


def inline(figure: Figure, name: str, alt: str) -> Html:
    """Make SVG for a page, with ids of its own and the page's colours on no ground.

    Args:
        figure: drawn under :data:`RC`.
        name: prefix of its ids.
        alt: what the picture says, for those who do not see it.
    """
    drawn = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    for part in ("metadata", "style"):  # its rules would be those of the whole page
        text = re.sub(rf"<{part}.*?</{part}>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("#[0-9a-fA-F]{6}\\b", _variable, text)
    size = re.findall(r'viewBox="[^"]*"', text)[0]
    head = (
        f'<svg {size} role="img" aria-label="{escape(visible(alt))}" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Html(re.sub(r"^<svg[^>]*>", lambda _: head, text).strip())


def _variable(found: re.Match[str]) -> str:
    name = VARIABLES.get(found[0].lower())
    return found[0] if name is None else f"var({name})"
