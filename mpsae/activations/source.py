"""Where rows of activations come from: what a stream asks of a source, and the model as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mpsae import checks
from mpsae.activations.model import check_context, record, resolve_hookpoint, widths
from mpsae.activations.stdlib_text import Split
from mpsae.activations.text import TextConfig, sequences

Told = Callable[[str, str | None], None]
"""Called for each hookpoint of a pass of the model, with what is wrong with its rows, or none."""


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
        told: where it is set, rows with NaN or Inf are left out, and it is told of them.
    """

    hookpoints: list[str]
    device: torch.device
    size: int
    told: Told | None

    def widths(self) -> dict[str, int]:
        """Give the number of features of each hookpoint."""

    def rows(self, skip: int, before: int) -> Iterator[Rows]:
        """Read one pass, in an order that depends on the arguments alone.

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
        share: rank and number of the processes that share the text.

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
        share: tuple[int, int] = (0, 1),
    ):
        if not hookpoints:
            raise ValueError("hookpoints is empty; name at least one module, such as layers.2")
        for name in hookpoints:
            resolve_hookpoint(model, name)
        check_context(model, text.context)
        self.model, self.tokenizer, self.hookpoints = model, tokenizer, list(hookpoints)
        self.text, self.side = text, side
        self.model_batch, self.check_finite = model_batch, check_finite
        self.share = share
        self._widths: dict[str, int] = {}
        self.device: torch.device = model.device
        self.told: Told | None = None

    def widths(self) -> dict[str, int]:
        """Run the model on two tokens to see how many features each hookpoint passes on."""
        if not self._widths:
            self._widths = widths(self.model, self.hookpoints)
        return self._widths

    def rows(self, skip: int, before: int) -> Iterator[Rows]:
        """Read the text once, ``model_batch`` sequences at a time."""
        passed, batch = False, self.model_batch
        read = before + skip
        for part in sequences(
            self.tokenizer, self.text, self.side, batch=batch, skip=skip, share=self.share
        ):
            found = record(self.model, self.hookpoints, part.ids, part.attention)
            values = {name: found[name][part.mask.to(found[name].device)].float() for name in found}
            given = Rows(part.mask.sum(1).tolist(), values)
            passed = passed or any(given.lengths)
            if self.check_finite:
                given = finite_rows(given, read // batch, self.told)
            read += len(part.ids)
            yield given
        if not passed and not skip:
            raise ValueError(f"no token of text on the {self.side} side of {self.text.dataset}")


def finite_rows(rows: Rows, number: int, told: Told | None) -> Rows:
    """Give the rows of a pass of the model that are finite at every hookpoint.

    Args:
        rows: of the pass.
        number: of the pass.
        told: is called for every hookpoint with what is wrong with its rows, or none.

    Raises:
        ValueError: a row is not finite, and nobody is told.
    """
    wrong: dict[str, str | None] = dict.fromkeys(rows.values)
    for name, values in rows.values.items():
        try:
            checks.finite_rows(values, f"hookpoint {name!r}, batch {number} of the model,")
        except ValueError as error:
            if told is None:
                raise
            wrong[name] = str(error)
    if told is not None:
        for name, said in wrong.items():
            told(name, said)
    if not any(wrong.values()):
        return rows
    finite = torch.stack([torch.isfinite(values).all(1) for values in rows.values.values()]).all(0)
    lengths = [int(part.sum()) for part in finite.split(rows.lengths)]
    return Rows(lengths, {name: values[finite] for name, values in rows.values.items()})
