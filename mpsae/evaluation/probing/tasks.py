"""Features of a text that its characters tell, as labels of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

from mpsae.evaluation.probing.document import CODE, COMMENT, STRING, Document

YES_NO = ("no", "yes")
FIRST_LETTER = "first_letter"  # the task of the published absorption
Label = Callable[[Document, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Task:
    """A labelling of tokens.

    ``label(document, start, end)`` gives the class of tokens that stand for the characters from
    start to before end (``[m]`` int64), -1 for a token that has none.
    """

    name: str
    classes: tuple[str, ...]
    label: Label
    needs: str = ""
    """What a text must be for any token to have a label."""

    @property
    def probed(self) -> Sequence[int]:
        """Classes that are told from the others; only "yes" where it is yes or no."""
        return (1,) if self.classes == YES_NO else range(len(self.classes))


def _visible(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """First character of each token that is no whitespace, -1 where it has none."""
    place = document.next_visible[start]
    return np.where(place < end, place, -1)


def _word_start(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """First visible character of tokens that begin a word, -1 for others."""
    place = _visible(document, start, end)
    return np.where((place >= 0) & np.isin(place, document.word_starts), place, -1)


def _letter(document: Document, place: np.ndarray) -> np.ndarray:
    """0 to 25 for a to z and A to Z, -1 for other characters and for no place."""
    number = (document.codes[place] | 0x20).astype(np.int64) - ord("a")
    return np.where((place >= 0) & (number >= 0) & (number < 26), number, -1)


def _first_letter(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    return _letter(document, _word_start(document, start, end))


def _next_letter(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    if not len(document.word_starts):
        return np.full(len(end), -1)
    following = np.searchsorted(document.word_starts, end)
    last = len(document.word_starts) - 1
    place = document.word_starts[np.minimum(following, last)]
    return _letter(document, np.where(following <= last, place, -1))


def _capital(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    place = _word_start(document, start, end)
    upper = (document.codes[place] & 0x20) == 0
    return np.where(_letter(document, place) >= 0, upper, -1)


def _digit(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    count = document.digits_before[end] - document.digits_before[start]
    return np.where(_visible(document, start, end) >= 0, count > 0, -1)


def _line(document: Document, place: np.ndarray) -> np.ndarray:
    """Start of the line that holds each place."""
    number = np.searchsorted(document.line_starts, place, side="right") - 1
    return document.line_starts[np.maximum(number, 0)]


def _line_start(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    place = _visible(document, start, end)
    return np.where(place >= 0, document.next_visible[_line(document, place)] == place, -1)


def _indentation(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    place = _visible(document, start, end)
    line = _line(document, place)
    first = document.next_visible[line]
    tabs = np.concatenate([[0], np.cumsum(document.codes == ord("\t"))])
    columns = first - line + 3 * (tabs[first] - tabs[line])
    return np.where(place >= 0, np.minimum(columns // 4, 4), -1)


def _of_kind(kind: int) -> Label:
    def label(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        place, syntax = _visible(document, start, end), document.syntax
        if syntax is None:
            return np.full(len(place), -1)
        return np.where(place >= 0, syntax.kind[place] == kind, -1)

    return label


def _keyword(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    place, syntax = _word_start(document, start, end), document.syntax
    if syntax is None:
        return np.full(len(place), -1)
    code = (place >= 0) & (syntax.kind[place] == CODE)
    return np.where(code, syntax.keyword[place], -1)


def _bracket_depth(document: Document, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    place, syntax = _visible(document, start, end), document.syntax
    if syntax is None:
        return np.full(len(place), -1)
    code = (place >= 0) & (syntax.kind[place] == CODE)
    return np.where(code, np.minimum(syntax.depth[place], 3), -1)


_LETTERS = tuple(ascii_lowercase)
_PYTHON = "Python source"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(FIRST_LETTER, _LETTERS, _first_letter, "words in Latin letters"),
        Task("next_letter", _LETTERS, _next_letter, "words in Latin letters"),
        Task("capital", YES_NO, _capital, "words in Latin letters"),
        Task("digit", YES_NO, _digit),
        Task("line_start", YES_NO, _line_start),
        Task("indentation", ("0", "1", "2", "3", "4 or more"), _indentation),
        Task("string", YES_NO, _of_kind(STRING), _PYTHON),
        Task("comment", YES_NO, _of_kind(COMMENT), _PYTHON),
        Task("keyword", YES_NO, _keyword, _PYTHON),
        Task("bracket_depth", ("0", "1", "2", "3 or more"), _bracket_depth, _PYTHON),
    )
}
"""Tasks by name.

first_letter: of the word that the token begins. next_letter: of the first word that begins behind
the token. capital: the token begins a word with a capital. digit: it holds a digit. line_start: it
is the first of a line. indentation: of its line, in steps of four columns. string, comment: it lies
in one (docstrings are strings). keyword: it begins a keyword, against other words of code.
bracket_depth: brackets open before it, in code. Where a token begins with whitespace, what follows
that counts; tokens of whitespace alone have no label but for next_letter.
"""
