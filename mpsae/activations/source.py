"""Where rows of activations come from: what a stream asks of a source, and the model as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mpsae import checks
from mpsae.activations.model import check_context, record, resolve_hookpoint, widths
from mpsae.activations.stdlib_text import Split
from mpsae.activations.text import TextConfig, sequences


class Rows(NamedTuple):
    """Activations of some sequences.

    ``lengths`` has the tokens of text of each sequence, ``values`` for each hookpoint their rows
    ``[sum(lengths), d]``, sequence after sequence.
    """

    lengths: list[int]
    values: dict[str, Tensor]


class Source(Protocol):
    """What :class:`mpsae.activations.ShuffledStream` reads.

    Attributes:
        hookpoints: which ones it gives.
        device: where the rows are.
        size: sequences in a pass, where the order of later passes depends on it; otherwise 0.
    """

    hookpoints: list[str]
    device: torch.device
    size: int

    def widths(self) -> dict[str, int]:
        """Give the number of features of each hookpoint."""

    def rows(self, skip: int, before: int) -> Iterator[Rows]:
        """Read one pass, in an order that depends on the arguments alone.

        One of several processes that share a pass would take every so many-th sequence of it here.

        Args:
            skip: sequences of this pass to leave out, from its beginning.
            before: sequences of all earlier passes.

        Yields:
            Rows, fp32, of the next sequences.
        """


class ModelSource:
    """Run a language model over a text.

    Args:
        model, tokenizer: of transformers.
        hookpoints: see :func:`mpsae.activations.resolve_hookpoint`.
        text: which text.
        side: ``"train"`` or ``"heldout"``.
        model_batch: sequences a forward pass.
        check_finite: stop at NaN or Inf.

    Raises:
        ValueError: no hookpoint, or an unknown one; a context that the model does not reach. While
            reading: NaN or Inf, naming hookpoint and batch; a text without a single token.
    """

    size = 0  # a text is read in one order

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        hookpoints: Sequence[str],
        text: TextConfig,
        *,
        side: Split = "train",
        model_batch: int = 32,
        check_finite: bool = True,
    ):
        if not hookpoints:
            raise ValueError("hookpoints is empty; name at least one module, such as layers.2")
        for name in hookpoints:
            resolve_hookpoint(model, name)
        check_context(model, text.context)
        self.model, self.tokenizer, self.hookpoints = model, tokenizer, list(hookpoints)
        self.text, self.side = text, side
        self.model_batch, self.check_finite = model_batch, check_finite
        self.device: torch.device = model.device

    def widths(self) -> dict[str, int]:
        """Run the model on two tokens to see how many features each hookpoint passes on."""
        return widths(self.model, self.hookpoints)

    def rows(self, skip: int, before: int) -> Iterator[Rows]:
        """Read the text once, ``model_batch`` sequences at a time."""
        passed, batch = False, self.model_batch
        read = before + skip
        for part in sequences(self.tokenizer, self.text, self.side, batch=batch, skip=skip):
            found = record(self.model, self.hookpoints, part.ids, part.attention)
            values = {name: found[name][part.mask.to(found[name].device)].float() for name in found}
            if self.check_finite:
                for name, rows in values.items():
                    what = f"hookpoint {name!r}, batch {read // batch} of the model,"
                    checks.finite_rows(rows, what)
            lengths = part.mask.sum(1).tolist()
            read += len(lengths)
            passed = passed or any(lengths)
            yield Rows(lengths, values)
        if not passed and not skip:
            raise ValueError(f"no token of text on the {self.side} side of {self.text.dataset}")
