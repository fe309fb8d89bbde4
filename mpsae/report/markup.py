"""HTML put together from parts; what is not `Html` already is text, and is escaped."""

from __future__ import annotations

import unicodedata
from html import escape


class Html(str):
    """Markup that may be put into a page as it is."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Make an element; an empty tag where there are no children and ``name`` ends with a slash.

    Args:
        name: of the tag.
        children: put in one after the other; all but :class:`Html` is escaped, None left out.
        attributes: ``class_`` gives class and ``data_x`` data-x; True gives one without a value,
            None and False none.

    Example:
        >>> element("p", "a < b", class_="sum")
        '<p class="sum">a &lt; b</p>'
    """
    head = name.removesuffix("/")
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        head += f" {key}" if value is True else f' {key}="{escape(visible(str(value)))}"'
    if name.endswith("/"):
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Put parts together as :func:`element` does."""
    return Html("".join(_one(child) for child in children if child is not None))


def _one(child: object) -> str:
    return child if isinstance(child, Html) else escape(visible(str(child)), quote=False)


_MARKS = {"\n": "↵", "\r": "␍", "\t": "→"}
_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def visible(text: str) -> str:
    r"""Put marks for line ends and tabs, escapes for what is not seen or turns text round.

    Example:
        >>> visible("a\n\tb\x00\u202e")
        'a↵→b\\x00\\u202e'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_MARKS.get(c) or (_escaped(c) if _hidden(c) else c) for c in text)


def _hidden(character: str) -> bool:
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Cn", "Co", "Zl", "Zp")
        or unicodedata.bidirectional(character) in _TURNS
    )


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]
