"""Words in prompts that ask for their first letter: where the published metric reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from mpsae.activations import Sequences, is_causal
from mpsae.activations.model import reach_of
from mpsae.evaluation.probing.aligned import check_fast, special_tokens
from mpsae.evaluation.probing.rows import Labels, activations, draw_test
from mpsae.evaluation.probing.tasks import FIRST_LETTER

TEMPLATE = "{word} has the first letter:"
EXAMPLES = 10
_AT_ONCE = 1024
_WORD = re.compile(r"([Ġ▁]?)([A-Za-z]+)")  # what byte-level and SentencePiece write for a blank


@dataclass
class Prompts:
    """One prompt a word; the words' tokens are rows in the sense of :class:`Labels`."""

    words: list[str]
    """As they stand in the prompts, with the blank before them if their token has one."""
    texts: list[str]
    """Prompts without the tokenizer's first special token."""
    sequences: Sequences
    """Ids ``[R, L]``, a mask that is true at the word, and attention; padded behind the end."""
    labels: Labels
    """Of the first letter; `missing` says why there is no prompt, if there is none."""

    @property
    def ends(self) -> Sequences:
        """The same sequences with the mask at their last token, which the answer follows."""
        _, _, attention = self.sequences
        last = torch.arange(attention.shape[1]) == attention.sum(1, keepdim=True) - 1
        return self.sequences._replace(mask=last)


def vocabulary_words(tokenizer: Any) -> dict[str, int]:
    """Find the tokens that are Latin letters alone, with or without one blank before them.

    Returns:
        Id of each, by its text, in the order of the ids.
    """
    special, found = set(tokenizer.all_special_tokens), {}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        match = _WORD.fullmatch(token)
        if match and token not in special:
            found[" " * len(match[1]) + match[2]] = number
    return found


def spelling_prompts(
    model: Any, tokenizer: Any, *, max_words: int, seed: int = 0, prepend_bos: bool = True
) -> Prompts:
    """Ask for the first letter of the words of a vocabulary.

    A prompt shows ten other words with their letters and ends behind the one that is read::

         tartan has the first letter: T
        ...
        mirth has the first letter: M
         word has the first letter:

    A line break comes first, and the blank of a word's token is part of the word. Words are split
    into three tenths for tests and the rest, with all forms of a word (capitals, blanks) on one
    side, and examples are words of the same side. A word that is no longer one token in its prompt
    is left out.

    Args:
        model: a causal one of transformers.
        tokenizer: its own, a fast one.
        max_words: take a sample of so many.
        seed: of sample, split and examples.
        prepend_bos: start with the tokenizer's first special token, if it has one.

    Raises:
        ValueError: a tokenizer that does not know characters; ``max_words < 1``.

    References:
        Chanin et al. 2024, arXiv 2409.14507; words, template and examples as in SAEBench, Karvonen
        et al. 2025, arXiv 2503.09532, where the test share is two tenths and two forms of one word
        may be on both sides.
    """
    if max_words < 1:
        raise ValueError(f"max_words={max_words} must be at least 1")
    check_fast(tokenizer)
    if not is_causal(model):
        return _none(f"{type(model).__name__} does not predict the next token")
    ids = vocabulary_words(tokenizer)
    every = list(ids)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    words = [every[i] for i in order[:max_words].tolist()]
    too_few = (
        f"{len(words)} of the vocabulary's {len(every)} tokens of Latin letters alone were taken; "
        f"each needs {EXAMPLES} others on its side of the split"
    )
    names = sorted({_plain(word) for word in words})
    if len(names) < 2:
        return _none(too_few)
    number = {name: i for i, name in enumerate(names)}
    test = draw_test(torch.tensor([number[_plain(word)] for word in words]), seed)
    examples = _examples(words, test, Random(seed))
    if examples is None:
        return _none(too_few)
    texts = [
        "".join(f"\n{_asked(w)} {_letter(w)}" for w in shown) + f"\n{_asked(word)}"
        for word, shown in zip(words, examples, strict=True)
    ]
    begin, _, pad = special_tokens(tokenizer)
    head = [begin] if prepend_bos and begin is not None else []
    rows, places = _tokens(tokenizer, texts, head)
    kept = [
        i
        for i, (row, place) in enumerate(zip(rows, places, strict=True))
        if place is not None and row[place] == ids[words[i]]
    ]
    if not kept:
        return _none("no word of the vocabulary is one token in a prompt")
    longest = max(len(rows[i]) for i in kept)
    reach = reach_of(model)
    if reach is not None and longest > reach:
        return _none(f"prompts have up to {longest} tokens, and the model has {reach} positions")
    place = torch.tensor([places[i] for i in kept])
    length = torch.tensor([len(rows[i]) for i in kept])
    within = torch.arange(longest)
    padded = torch.tensor([rows[i] + [pad] * (longest - len(rows[i])) for i in kept])
    sequences = Sequences(padded, within == place[:, None], within < length[:, None])
    words = [words[i] for i in kept]
    letters = torch.tensor([ord(_plain(word)[0]) - ord("a") for word in words])
    labels = Labels({FIRST_LETTER: letters}, test[kept], "word")
    return Prompts(words, [texts[i] for i in kept], sequences, labels)


def spelled(model: Any, tokenizer: Any, prompts: Prompts, *, batch: int = 16) -> float | None:
    """Find the share of prompts whose most likely next token is the right letter, a capital.

    Returns:
        The share; None where there is no prompt.

    Notes:
        The head is applied to last tokens alone, so logits of whole prompts are never made.
    """
    if not prompts.words:
        return None
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    hidden = activations(model, f"{name}:input", prompts.ends, batch=batch, progress=True)
    weight = head.weight
    right = 0
    for first in range(0, len(hidden), _AT_ONCE):
        rows = hidden[first : first + _AT_ONCE].to(weight.device, weight.dtype)
        likely = head(rows).argmax(-1).tolist()
        right += sum(
            tokenizer.decode([token]).strip() == _letter(word)
            for token, word in zip(likely, prompts.words[first : first + _AT_ONCE], strict=True)
        )
    return right / len(hidden)


def _none(reason: str) -> Prompts:
    no_rows, no_place = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)
    labels = Labels({FIRST_LETTER: no_rows}, no_rows.bool(), "word", {FIRST_LETTER: reason})
    return Prompts([], [], Sequences(no_place, no_place.bool(), no_place.bool()), labels)


def _plain(word: str) -> str:
    return word.strip().lower()


def _letter(word: str) -> str:
    return word.strip()[0].upper()


def _asked(word: str) -> str:
    return TEMPLATE.format(word=word)


def _examples(words: list[str], test: Tensor, draw: Random) -> list[list[str]] | None:
    """Draw examples for each word, of its side and in no form the word itself; None: too few."""
    drawn: dict[int, list[str]] = {}
    for on_test in (False, True):
        side = [i for i, of_test in enumerate(test.tolist()) if of_test == on_test]
        side.sort(key=lambda i: _plain(words[i]))
        first = 0
        while first < len(side):  # forms of one word are neighbours, from first to before last
            last = first
            while last < len(side) and _plain(words[side[last]]) == _plain(words[side[first]]):
                last += 1
            others = range(len(side) - (last - first))
            if len(others) < EXAMPLES:
                return None
            for i in side[first:last]:
                chosen = draw.sample(others, EXAMPLES)
                drawn[i] = [words[side[j if j < first else j + last - first]] for j in chosen]
            first = last
    return [drawn[i] for i in range(len(words))]


def _tokens(
    tokenizer: Any, texts: list[str], head: list[int]
) -> tuple[list[list[int]], list[int | None]]:
    """Ids of each prompt, and where in them the last word asked for ends, if a token ends there."""
    behind = len(_asked(""))
    rows: list[list[int]] = []
    places: list[int | None] = []
    for first in range(0, len(texts), _AT_ONCE):
        part = texts[first : first + _AT_ONCE]
        encoded = tokenizer(
            part, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for text, ids, offsets in zip(
            part, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            ends = {end: i for i, (_, end) in enumerate(offsets)}
            place = ends.get(len(text) - behind)
            rows.append(head + ids)
            places.append(None if place is None else place + len(head))
    return rows, places
