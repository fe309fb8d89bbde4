"""A text as arrays over its characters: words, lines, and the syntax of Python source."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from functools import cached_property
from keyword import iskeyword
from typing import NamedTuple

import numpy as np

CODE, STRING, COMMENT = range(3)
_FORMATTED = ("FSTRING", "TSTRING")  # one token each before Python 3.12


class Syntax(NamedTuple):
    """What each character of Python source is; arrays ``[characters]``."""

    kind: np.ndarray
    """CODE, STRING or COMMENT."""
    keyword: np.ndarray
    """Part of a keyword."""
    depth: np.ndarray
    """Brackets open before it."""


class Document:
    """A text and, made when they are first asked for, arrays over its characters."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def codes(self) -> np.ndarray:
        """Code points, with one space behind the end. ``[characters + 1]`` uint32."""
        return np.frombuffer((self.text + " ").encode("utf-32-le", "surrogatepass"), dtype="<u4")

    @cached_property
    def next_visible(self) -> np.ndarray:
        """First character from here on that is no whitespace, or the end."""
        places = np.arange(len(self.text) + 1)
        blank = np.array([c.isspace() for c in self.text] + [False])
        places[blank] = len(self.text)
        return np.minimum.accumulate(places[::-1])[::-1]

    @cached_property
    def word_starts(self) -> np.ndarray:
        """Where runs of letters start."""
        return np.array([m.start() for m in re.finditer(r"[^\W\d_]+", self.text)], dtype=np.int64)

    @cached_property
    def line_starts(self) -> np.ndarray:
        """Where lines start."""
        return np.array([0, *(m.end() for m in re.finditer("\n", self.text))], dtype=np.int64)

    @cached_property
    def digits_before(self) -> np.ndarray:
        """How many digits lie before each place. ``[characters + 1]``."""
        return np.cumsum([0, *(c.isdigit() for c in self.text)])

    @cached_property
    def syntax(self) -> Syntax | None:
        """Syntax of each character; None where the text is no source of the running Python."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on escapes that the source spells wrongly
                ast.parse(self.text)
            return self._tokenized()
        except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
            return None

    def _tokenized(self) -> Syntax:
        size = len(self.text) + 1
        kind, keyword = np.zeros(size, dtype=np.int8), np.zeros(size, dtype=bool)
        change = np.zeros(size + 1, dtype=np.int64)
        open_strings: list[int] = []

        def place(position: tuple[int, int]) -> int:
            line, column = position
            if line > len(self.line_starts):
                return len(self.text)
            return int(self.line_starts[line - 1]) + column

        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            start, end = place(token.start), place(token.end)
            name = tokenize.tok_name[token.type]
            if name == "STRING":
                kind[start:end] = STRING
            elif name == "COMMENT":
                kind[start:end] = COMMENT
            elif name == "NAME":
                keyword[start:end] = iskeyword(token.string)
            elif name == "OP" and token.string in ("(", "[", "{"):
                change[start + 1] += 1
            elif name == "OP" and token.string in (")", "]", "}"):
                change[start + 1] -= 1
            elif name.startswith(_FORMATTED) and name.endswith("_START"):
                open_strings.append(start)
            elif name.startswith(_FORMATTED) and name.endswith("_END"):
                kind[open_strings.pop() : end] = STRING
        return Syntax(kind, keyword, np.cumsum(change)[:size])
