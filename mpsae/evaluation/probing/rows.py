"""Activations of held-out tokens with their labels, split by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpsae.activations import Sequences, record
from mpsae.activations.model import check_context
from mpsae.evaluation.probing.aligned import AlignedText
from mpsae.evaluation.probing.document import Document
from mpsae.evaluation.probing.tasks import Task

_TEST_SHARE = 0.3
_MIN_DOCUMENTS = 5  # with fewer the split is by sequence


@dataclass
class Labels:
    """Labels of the tokens of a text; row by row, in the order of the text."""

    of: dict[str, Tensor]
    """Class of each row for each task, ``[R]`` int64, -1 for none."""
    test: Tensor
    """Rows that probes are tested on; the others train them. ``[R]`` bool."""
    split_by: str
    """What is whole on one side: ``"document"``, ``"sequence"`` or ``"word"``."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a task has no label, where that is known better than from the task."""


def label_rows(text: AlignedText, tasks: Sequence[Task], *, seed: int = 0) -> Labels:
    """Label the tokens of a text, and split them into training and test rows.

    Documents are drawn for the test side until it has three tenths of the rows; where there are
    fewer than five, sequences are.

    Args:
        text: what to label.
        tasks: how.
        seed: of the split.

    Raises:
        ValueError: one document that is a single sequence, which cannot be split.
    """
    mask = text.sequences.mask
    document, start, end = (t[mask] for t in (text.document, text.start, text.end))
    labels = {task.name: torch.full((len(document),), -1) for task in tasks}
    for number in document.unique().tolist():
        rows = (document == number).nonzero()[:, 0]
        whole = Document(text.documents[number])
        places = start[rows].numpy(), end[rows].numpy()
        for task in tasks:
            found = torch.from_numpy(task.label(whole, *places).astype("int64"))
            labels[task.name][rows] = found
    split_by, group = "document", document
    if len(document.unique()) < _MIN_DOCUMENTS:
        number = torch.arange(len(mask))[:, None].expand_as(mask)
        split_by, group = "sequence", number[mask]
    return Labels(labels, draw_test(group, seed), split_by)


def join(parts: Sequence[tuple[Tensor, Labels]]) -> tuple[Tensor, Labels]:
    """Put the rows of several sources one behind the other.

    Args:
        parts: activations ``[R, d]`` and labels of each; a task that one of them does not know has
            no label in its rows.

    Returns:
        Activations and labels of all.
    """
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for _, labels in parts for name in labels.of)
    of = {
        name: torch.cat([own.of.get(name, torch.full((len(x),), -1)) for x, own in parts])
        for name in names
    }
    return torch.cat([x for x, _ in parts]), Labels(
        of,
        torch.cat([labels.test for _, labels in parts]),
        ", ".join(labels.split_by for _, labels in parts),
        {name: why for _, labels in parts for name, why in labels.missing.items()},
    )


def draw_test(group: Tensor, seed: int) -> Tensor:
    """Rows of randomly drawn groups that make up the test share; ``[R]`` bool.

    Args:
        group: number of each row's group, ``[R]`` int64.
        seed: of the draw.

    Raises:
        ValueError: a single group.
    """
    names, counts = group.unique(return_counts=True)
    if len(names) < 2:
        raise ValueError(
            f"{len(group)} tokens of a single sequence cannot be split into training and test "
            "rows; take more tokens or a shorter context"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    before = counts[order].cumsum(0) - counts[order]
    chosen = order[before < _TEST_SHARE * len(group)]
    chosen = chosen[: len(names) - 1]  # some rows are left to train on
    return torch.isin(group, names[chosen])


@torch.no_grad()
def activations(
    model: Any, hookpoint: str, sequences: Sequences, *, batch: int = 16, progress: bool = False
) -> Tensor:
    """Record the activations of text tokens, ``[R, d]`` fp32 on the CPU.

    Raises:
        ValueError: no such hookpoint; sequences longer than the model reaches.
    """
    check_context(model, sequences.ids.shape[1])
    rows = []
    starts = range(0, len(sequences.ids), batch)
    for first in tqdm(
        starts, desc=f"activations of {hookpoint}", disable=None if progress else True, leave=False
    ):
        ids, mask, attention = (t[first : first + batch] for t in sequences)
        hidden = record(model, [hookpoint], ids, attention)[hookpoint]
        rows.append(hidden[mask.to(hidden.device)].float().cpu())
    return torch.cat(rows)
