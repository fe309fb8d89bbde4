"""What a language model is asked about latents, and how its answers are read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

Messages = list[dict[str, str]]

EXPLANATION_TOKENS = 200
"""Most tokens of an explanation that is asked for."""

_EXPLAIN = """\
You study one unit of a neural network that reads text. The unit is silent on most text and fires \
on some tokens. You are shown stretches of text on which it fired strongly. Tokens on which it \
fired are marked <<like this>>, and below each text they are listed with their strength from 1 to \
10. Texts are cut off at both ends.

Say what makes the unit fire: a property that the marked tokens, or the text up to them, have in \
common. Be specific, name words or symbols where they matter, and do not mention the unit, the \
marks or that these are examples. If it is about the token itself rather than about the subject, \
say so. Use one or two sentences and end with a line of the form

Explanation: <your explanation>"""

_DETECT = """\
You are given a description of what a unit of a neural network reacts to, and numbered stretches \
of text. Decide for each text on its own whether the unit reacts somewhere in it. There may be \
any number of such texts, also none.

{answer}"""

_FUZZ = """\
You are given a description of what a unit of a neural network reacts to, and numbered stretches \
of text in which some tokens are marked <<like this>>. Decide for each text on its own whether \
the marked tokens are those that the unit reacts to. There may be any number of such texts, also \
none.

{answer}"""

_ANSWER = """\
Answer with a list of {count} numbers in square brackets and nothing else: 1 for yes and 0 for no, \
in the order of the texts, such as {example}."""


def explain(examples: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> Messages:
    """Ask for an explanation.

    Args:
        examples: the highlighted text of each context, and its marked tokens with their strength.
    """
    parts = []
    for number, (text, strengths) in enumerate(examples, 1):
        marks = ", ".join(f"{json.dumps(token)} {strength}" for token, strength in strengths)
        parts.append(f"Text {number}: {text}\nMarked: {marks}")
    return _messages(_EXPLAIN, "\n\n".join(parts))


def detect(explanation: str, texts: Sequence[str]) -> Messages:
    """Ask which texts the explanation fits."""
    return _messages(_DETECT.format(answer=_answer(len(texts))), _asked(explanation, texts))


def fuzz(explanation: str, texts: Sequence[str]) -> Messages:
    """Ask in which texts the right tokens are highlighted."""
    return _messages(_FUZZ.format(answer=_answer(len(texts))), _asked(explanation, texts))


def verdict_tokens(count: int) -> int:
    """Tokens that an answer about ``count`` texts may have, with room for a few words."""
    return 4 * count + 40


def read_explanation(answer: str) -> str | None:
    r"""Find the explanation in an answer; None where there is none.

    Example:
        >>> read_explanation("They are all alike.\nExplanation: the word **cat**")
        'the word **cat**'
    """
    text = _without_thoughts(answer)
    parts = re.split(r"explanation\W*:\**", text, flags=re.IGNORECASE)
    lines = [line.strip() for line in parts[-1].splitlines() if line.strip()]
    return lines[0] if lines else None


def read_verdicts(answer: str, count: int) -> list[bool] | None:
    """Find the verdicts on ``count`` texts; None for anything but a list of so many 0 and 1.

    Example:
        >>> read_verdicts("Sure: [1, 0]", 2), read_verdicts("[1]", 2), read_verdicts("[1, 7]", 2)
        ([True, False], None, None)
    """
    lists = re.findall(r"\[[^\[\]]*\]", _without_thoughts(answer))
    if not lists:
        return None
    try:
        values = json.loads(lists[-1].lower())
    except json.JSONDecodeError:
        return None
    if len(values) != count or any(value not in (0, 1) for value in values):
        return None
    return [bool(value) for value in values]


def _without_thoughts(answer: str) -> str:
    """Drop what a model that reasons aloud puts in front of its answer."""
    return answer.rpartition("</think>")[2]


def _answer(count: int) -> str:
    example = [(number + 1) % 2 for number in range(count)]
    return _ANSWER.format(count=count, example=example)


def _asked(explanation: str, texts: Sequence[str]) -> str:
    shown = "\n\n".join(f"Text {number}: {text}" for number, text in enumerate(texts, 1))
    return f"Description: {explanation}\n\n{shown}"


def _messages(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
