"""Text to token sequences: any dataset, packed to a context length."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpsae.activations.stdlib_text import Split, stdlib_documents

_BUILDERS = {
    ".txt": "text", ".md": "text", ".py": "text", ".jsonl": "json", ".json": "json",
    ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
_TOKENIZED_AT_ONCE = 64


@dataclass(kw_only=True)
class TextConfig:
    """Which text is read and how it becomes sequences."""

    dataset: str = field(default="stdlib", metadata={"cmd": False})  # commands have their own
    """Hub id, local file or folder (text, json, csv, parquet), or stdlib: Python's own source."""
    dataset_name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split to train on; a local file or folder of files has only train."""
    heldout_split: str | None = None
    """Split to evaluate on; without one, every tenth sequence of the other is held out."""
    text_column: str = "text"
    """Column that holds the text."""
    streaming: bool = False
    """Read a dataset as it arrives instead of downloading or converting it first."""
    context: int = 256
    """Tokens a sequence."""
    prepend_bos: bool = True
    """Start each sequence with the tokenizer's first special token, if it has one."""
    shuffle_seed: int | None = 0
    """Shuffles the documents; none keeps their order."""

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ValueError(f"context must be at least 2 tokens, not {self.context}")


class Sequences(NamedTuple):
    """A batch of token sequences: ``ids [S, context]`` and ``mask``, true where there is text.

    Special and padding tokens are masked out; ``attention [S, context]`` covers all but padding.
    """

    ids: Tensor
    mask: Tensor
    attention: Tensor


def load_documents(
    config: TextConfig, side: Split = "train", share: tuple[int, int] = (0, 1)
) -> Iterable[str]:
    """Read the documents of one side of a dataset.

    Args:
        config: which dataset.
        side: ``"train"`` or ``"heldout"``. Without ``heldout_split`` both sides of a dataset are
            the same documents, and :func:`sequences` keeps every tenth sequence apart.
        share: rank and number of processes, of which each reads documents of its own.

    Returns:
        The texts, lazily.

    Raises:
        OSError: the dataset cannot be reached or read (the message says what can be passed).
        ValueError: it has no such split or text column.
    """
    if config.dataset == "stdlib":
        texts = [document["text"] for document in stdlib_documents(side)]
        if config.shuffle_seed is not None:
            generator = torch.Generator().manual_seed(config.shuffle_seed)
            texts = [texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()]
        return texts[share[0] :: share[1]]
    split = config.heldout_split if side == "heldout" and config.heldout_split else config.split
    dataset = _load_dataset(config, split)
    columns = dataset.column_names
    if columns is not None and config.text_column not in columns:
        raise _no_column(config, columns)
    if config.shuffle_seed is not None:
        dataset = dataset.shuffle(seed=config.shuffle_seed)
    if share[1] > 1:
        from datasets.distributed import split_dataset_by_node

        dataset = split_dataset_by_node(dataset, *share)
    return _column(dataset, config)


def _column(dataset: Any, config: TextConfig) -> Iterator[str]:
    for row in dataset:
        if config.text_column not in row:  # a stream may not know its columns beforehand
            raise _no_column(config, row)
        yield row[config.text_column]


def _no_column(config: TextConfig, columns: Iterable[str]) -> ValueError:
    return ValueError(
        f"no column {config.text_column!r} in {config.dataset}; it has {', '.join(columns)} "
        "(text_column says which one holds the text)"
    )


def _load_dataset(config: TextConfig, split: str) -> Any:
    import datasets

    path = Path(config.dataset)
    try:
        if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            saved: Any = datasets.load_from_disk(str(path))
            return _pick_split(saved if isinstance(saved, dict) else {"train": saved}, split)
        if path.exists():
            _pick_split({"train": None}, split)
            files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
            files = [f for f in files if f.suffix in _BUILDERS]
            kinds = {_BUILDERS[f.suffix] for f in files}
            if len(kinds) != 1:
                raise OSError(
                    f"{path} holds {', '.join(sorted(kinds)) or 'no'} files; pass text, json, csv "
                    f"or parquet files of one kind ({', '.join(_BUILDERS)})"
                )
            kind = kinds.pop()
            options = {"sample_by": "document"} if kind == "text" else {}
            names = [str(f) for f in files]
            return datasets.load_dataset(
                kind, data_files=names, split="train", streaming=config.streaming, **options
            )
        return datasets.load_dataset(
            config.dataset, config.dataset_name, split=split, streaming=config.streaming
        )
    except ValueError as error:
        raise ValueError(f"cannot read split {split!r} of {config.dataset}: {error}") from error
    except Exception as error:
        raise OSError(
            f"cannot read the dataset {config.dataset!r} ({type(error).__name__}: {error}); pass a "
            "hub id that this machine can reach, a local file or folder, or stdlib"
        ) from error


def _pick_split(splits: dict[str, Any], split: str) -> Any:
    if split not in splits:
        raise ValueError(f"it has {', '.join(splits)}")
    return splits[split]


def sequences(
    tokenizer: Any,
    config: TextConfig,
    side: Split = "train",
    *,
    batch: int = 32,
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Sequences]:
    """Tokenise documents and pack them into sequences without gaps.

    Documents are joined by the end-of-text token, cut to ``context`` tokens, and each sequence
    starts with the tokenizer's first special token. Only the last sequence is padded.

    Args:
        tokenizer: of transformers.
        config: which text.
        side: ``"train"`` or ``"heldout"``, which share no sequence.
        batch: sequences at a time.
        skip: sequences of this side, and of this share, to pass over (tokenised, not returned).
        share: rank and number of the processes that share the text.

    Yields:
        Sequences, all but the last of ``batch`` rows.

    Notes:
        Processes read documents of their own where the held-out text is apart (stdlib, or with
        ``heldout_split``). Otherwise each tokenises everything and takes every so many-th sequence:
        which sequences are held out does not depend on the number of processes.
    """
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    separate = side == "heldout" and config.heldout_split is not None
    apart = config.dataset != "stdlib" and config.heldout_split is None and not separate
    rows: list[tuple[Tensor, int]] = []
    kept = 0
    packed = _pack(tokenizer, config, side, (0, 1) if apart else share)
    for number, row in enumerate(packed):
        if apart and (number % 10 == 9) != (side == "heldout"):
            continue
        kept += 1
        if apart and (kept - 1) % share[1] != share[0]:
            continue
        if skip:
            skip -= 1
            continue
        rows.append(row)
        if len(rows) == batch:
            yield _stack(rows, special)
            rows = []
    if rows:
        yield _stack(rows, special)


def _stack(rows: list[tuple[Tensor, int]], special: Tensor) -> Sequences:
    ids = torch.stack([row for row, _ in rows])
    lengths = torch.tensor([length for _, length in rows])
    attention = torch.arange(ids.shape[1]) < lengths[:, None]
    return Sequences(ids, attention & ~torch.isin(ids, special), attention)


def first_token(tokenizer: Any) -> int | None:
    """Id of the special token that a sequence starts with, None where there is none."""
    start = tokenizer.bos_token_id
    return tokenizer.cls_token_id if start is None else start


def _pack(
    tokenizer: Any, config: TextConfig, side: Split, share: tuple[int, int]
) -> Iterator[tuple[Tensor, int]]:
    """Sequences of ``context`` tokens with the number of tokens that are not padding."""
    start = first_token(tokenizer)
    head = [start] if config.prepend_bos and start is not None else []
    end = tokenizer.eos_token_id
    end = tokenizer.sep_token_id if end is None else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or 0)
    room = config.context - len(head)
    stream: list[int] = []
    for ids in _tokenize(tokenizer, load_documents(config, side, share)):
        stream += ids if end is None else [*ids, end]
        whole = len(stream) - len(stream) % room
        for first in range(0, whole, room):
            yield torch.tensor(head + stream[first : first + room]), config.context
        del stream[:whole]
    if stream:
        row = head + stream
        padding = [pad] * (config.context - len(row))
        yield torch.tensor(row + padding), len(row)


def _tokenize(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[int]]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # quiets a warning about forks
    waiting: list[str] = []

    def flush() -> list[list[int]]:
        encoded = tokenizer(waiting, add_special_tokens=False, verbose=False)["input_ids"]
        waiting.clear()
        return encoded

    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"a document is {type(text).__name__}, not text")
        if text:
            waiting.append(text)
        if len(waiting) == _TOKENIZED_AT_ONCE:
            yield from flush()
    if waiting:
        yield from flush()
