"""Held-out token sequences that know which characters of which document each token stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsae.activations import Sequences, TextConfig, load_documents

_READ_AHEAD = 8
_READ_LEAST = 2**18


@dataclass
class AlignedText:
    """Token sequences and their place in the text; all tensors ``[S, context]``."""

    sequences: Sequences
    """Ids, mask and attention, as of :func:`mpsae.activations.sequences`."""
    documents: list[str]
    """Whole texts."""
    document: Tensor
    """Number of a token's document, -1 where the token is special or padding."""
    start: Tensor
    """First character."""
    end: Tensor
    """Character behind the last one."""


def read_aligned(
    tokenizer: Any, config: TextConfig, *, max_tokens: int, max_read: int | None = None
) -> AlignedText:
    """Take evenly spaced sequences from the held-out side of a text.

    The sequences are those of :func:`mpsae.activations.sequences`. More is read than taken, so
    that a few long documents do not make up the whole sample.

    Args:
        tokenizer: of transformers, a fast one, which knows the characters of its tokens.
        config: which text.
        max_tokens: where to stop, to the next whole sequence.
        max_read: tokens to read, by default 8 times as many as are taken and at least 2^18.

    Raises:
        ValueError: a tokenizer that does not know characters; no text on the held-out side.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    check_fast(tokenizer)
    documents: list[str] = []
    rows: list[Tensor] = []
    if max_read is None:
        max_read = max(_READ_AHEAD * max_tokens, _READ_LEAST)
    most = -(-max_tokens // config.context)
    limit = max(most, max_read // config.context)
    for row in _held_out(tokenizer, config, documents):
        rows.append(row)
        if len(rows) == limit:
            break
    wanted = min(len(rows), most)
    if not wanted:
        raise ValueError(f"no token of text on the held-out side of {config.dataset}")
    chosen = torch.arange(wanted) * len(rows) // wanted
    ids, document, start, end, attention = torch.stack([rows[i] for i in chosen]).unbind(1)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    seen = attention.bool()
    text = Sequences(ids, seen & ~torch.isin(ids, special), seen)
    return AlignedText(text, documents, document, start, end)


def check_fast(tokenizer: Any) -> None:
    """Raise ValueError where the tokenizer does not know the characters of its tokens."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for; "
            "probing needs a fast tokenizer"
        )


def _held_out(tokenizer: Any, config: TextConfig, documents: list[str]) -> Iterator[Tensor]:
    """``[5, context]``: ids, document, start, end and attention of each held-out sequence."""
    apart = config.dataset != "stdlib" and config.heldout_split is None
    for number, row in enumerate(_pack(tokenizer, config, documents)):
        if not apart or number % 10 == 9:
            yield row


def _pack(tokenizer: Any, config: TextConfig, documents: list[str]) -> Iterator[Tensor]:
    begin, stop, pad = special_tokens(tokenizer)
    outside = (-1, 0, 0, 1)  # no document, attended to
    head = [[begin, *outside]] if config.prepend_bos and begin is not None else []
    tail = [] if stop is None else [[stop, *outside]]
    room = config.context - len(head)
    stream: list[list[int]] = []
    for text in load_documents(config, "heldout"):
        if not text:
            continue
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        number = len(documents)
        documents.append(text)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        stream += [[token, number, start, end, 1] for token, (start, end) in pairs]
        stream += tail
        whole = len(stream) - len(stream) % room
        for first in range(0, whole, room):
            yield torch.tensor(head + stream[first : first + room]).T
        del stream[:whole]
    if stream:
        row = head + stream
        padding = [[pad, -1, 0, 0, 0]] * (config.context - len(row))
        yield torch.tensor(row + padding).T


def special_tokens(tokenizer: Any) -> tuple[int | None, int | None, int]:
    """Tokens before a sequence, behind a document, and of padding."""
    begin = tokenizer.bos_token_id
    begin = tokenizer.cls_token_id if begin is None else begin
    stop = tokenizer.eos_token_id
    stop = tokenizer.sep_token_id if stop is None else stop
    pad = tokenizer.pad_token_id
    return begin, stop, (stop or 0) if pad is None else pad
