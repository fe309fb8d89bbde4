"""Latents to browse: contexts with the tokens on which a latent fires marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from mpsae.report.groups import Entry
from mpsae.report.markup import Html, element
from mpsae.report.records import Context, Latent

OPEN, TOP, QUANTILES = 4, 20, 40
"""Contexts that are shown at once, and at most in the folds, of each latent."""


def chosen(latents: Sequence[Latent], limit: int) -> list[Latent]:
    """At most ``limit`` latents, spread evenly over their frequencies, the most frequent first."""
    order = sorted(latents, key=lambda latent: (-latent.frequency, latent.id))
    if len(order) <= limit:
        return order
    if limit == 1:
        return order[:1]
    return [order[place * (len(order) - 1) // (limit - 1)] for place in range(limit)]


def section(entry: Entry, limit: int, opened: bool) -> Html:
    """Make the part of one SAE; empty where it has no latents."""
    record = entry.record
    shown = chosen(record.latents, limit)
    if not shown:
        return Html("")
    ids = {latent.id for latent in shown}
    known = [name for name in ("detection", "fuzzing", "embedding") if _any(shown, name)]
    count = f"{len(shown):,}" if len(shown) == len(record.latents) else (
        f"{len(shown):,} of {len(record.latents):,} collected"
    )  # fmt: skip
    about = f"{count} latents, {record.tokens['latents']:,} held-out tokens"
    if record.explainer:
        about += f"; explained by {record.explainer}"
    cards = [_card(latent, entry.anchor, ids) for latent in shown]
    return element(
        "details",
        element("summary", element("h3", entry.label), " ", element("span", about)),
        _tools(entry.label, known),
        element("div", *cards, class_="cards"),
        id=entry.anchor, class_="sae", open=opened,
    )  # fmt: skip


def _any(latents: Sequence[Latent], score: str) -> bool:
    return any(score in latent.scores for latent in latents)


def _tools(label: str, known: Sequence[str]) -> Html:
    """Make what filters and sorts; only a script can show it, since it needs one."""
    orders = [("frequency", "most frequent"), ("id", "number")]
    orders += [(name, f"best {name} score") for name in known]
    options = [element("option", words, value=value) for value, words in orders]
    return element(
        "p",
        element("label", "Find ", element("input/", type="search", aria_label=f"Find in {label}")),
        element("label", "Sort by ", element("select", *options)),
        element("output", aria_live="polite"),
        class_="tools", hidden=True,
    )  # fmt: skip


def _card(latent: Latent, anchor: str, ids: set[int]) -> Html:
    peak = max((abs(v) for c in latent.top for v in c.activations), default=0.0)
    peak = peak or max((abs(v) for c in latent.quantiles for v in c.activations), default=0.0)
    facts = [element("span", f"fires on {100 * latent.frequency:.3g} % of tokens")]
    facts += [element("span", f"{name} {value:.3f}") for name, value in latent.scores.items()]
    top, drawn = latent.top[:TOP], latent.quantiles[:QUANTILES]
    parts = [
        element("h4", f"Latent {latent.id}"),
        element("p", *_spaced(facts), class_="facts"),
    ]
    if latent.explanation is not None:
        parts.append(element("p", latent.explanation, class_="explanation"))
    parts += [_context(context, peak) for context in top[:OPEN]]
    if len(top) > OPEN:
        parts.append(_fold(f"{len(top) - OPEN} more of the strongest contexts",
                           [_context(context, peak) for context in top[OPEN:]]))  # fmt: skip
    if drawn:
        parts.append(_fold("Contexts of all strengths", list(_quantiles(drawn, peak))))
    if latent.nearest:
        links = [
            element("a", str(near), href=f"#{anchor}-{near}") if near in ids else str(near)
            for near in latent.nearest
        ]
        parts.append(element("p", "Nearest: ", *_spaced(links, ", "), class_="nearest"))
    scores = {f"data_{name}": f"{value:.6g}" for name, value in latent.scores.items()}
    return element(
        "article", *parts, id=f"{anchor}-{latent.id}", data_id=latent.id,
        data_frequency=f"{latent.frequency:.6g}", **scores,
    )  # fmt: skip


def _fold(title: str, parts: Sequence[Html]) -> Html:
    return element("details", element("summary", title), *parts)


def _quantiles(contexts: Sequence[Context], peak: float) -> Iterator[Html]:
    for quantile, own in groupby(contexts, key=lambda c: c.quantile):
        yield element("h5", f"Part {(quantile or 0) + 1} by strength")
        for context in own:
            yield _context(context, peak)


def _context(context: Context, peak: float) -> Html:
    """Mark the tokens that fire, the more opaque the more they do; others are plain text."""
    parts: list[object] = []
    for token, value in zip(context.tokens, context.activations, strict=True):
        if value == 0:
            parts.append(token)
            continue
        opacity = 0.15 + 0.85 * min(1.0, abs(value) / peak) if peak else 0.15
        parts.append(
            element(
                "mark", token.replace(" ", "·") if token.isspace() else token,
                style=f"--a:{opacity:.2f}", title=f"{value:.4g}",
                class_="negative" if value < 0 else None,
            )
        )  # fmt: skip
    return element("p", *parts, class_="context")


def _spaced(parts: Sequence[object], between: str = " ") -> list[object]:
    spaced: list[object] = []
    for part in parts:
        spaced += [between, part] if spaced else [part]
    return spaced
