"""How well an SAE stands in for the activations: on the activations, and in the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mpsae.activations import TextConfig, is_causal, record, replace, sequences
from mpsae.activations.model import check_context
from mpsae.activations.text import Sequences
from mpsae.evaluation.steps import errors_of_steps, is_stepwise
from mpsae.metrics import RunningFVU
from mpsae.sae import SparseAutoencoder, Transcoder
from mpsae.sparse import l0


@dataclass
class Evaluation:
    """Held-out measures of one SAE; no unit where none is named."""

    tokens: int = 0
    """Tokens of text looked at."""
    fvu: float = float("nan")
    """Fraction of variance unexplained."""
    l0: float = float("nan")
    """Mean number of latents other than zero."""
    dead_fraction: float = float("nan")
    """Latents that fired on none of the tokens."""
    ce_clean: float | None = None
    """Cross-entropy of the model in nats a token; none for a model that predicts nothing."""
    ce_sae: float | None = None
    """The same with the reconstruction in place of the activations."""
    ce_mean: float | None = None
    """The same with the mean activation in their place."""
    ce_recovered: float | None = None
    """(ce_mean - ce_sae) / (ce_mean - ce_clean)."""
    fvu_at_k: list[float] = field(default_factory=list)
    """For a pursuit, FVU when it is stopped after 1, 2, ... steps."""


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder,
    model: Any,
    tokenizer: Any,
    hookpoint: str,
    text: TextConfig,
    *,
    max_tokens: int = 100_000,
    batch: int = 16,
    progress: bool = False,
) -> Evaluation:
    """Measure an SAE on held-out text.

    Args:
        sae: of any architecture; put into evaluation mode.
        model, tokenizer: of transformers.
        hookpoint: whose activations the SAE encodes; of a transcoder the module whose output it
            makes of its input, and that output is what is measured and replaced.
        text: the dataset; its held-out side is read.
        max_tokens: where to stop, to the next batch.
        batch: sequences at a time.
        progress: show a bar.

    Returns:
        Evaluation. Only tokens of text are encoded, replaced and averaged; cross-entropy is over
        tokens of text that follow another token.

    Raises:
        ValueError: activations of another width than the SAE's; no text on the held-out side; a
            context that the model does not reach.
    """
    if max_tokens < 1 or batch < 1:
        raise ValueError(f"max_tokens={max_tokens} and batch={batch} must be at least 1")
    check_context(model, text.context)
    sae.eval()
    result = Evaluation()
    device = sae.dictionary.device
    width = len(sae.b_dec)
    total = RunningFVU(width)
    prefixes: list[RunningFVU] = []
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=device)
    used = 0
    mean = torch.zeros(width, dtype=torch.float64)
    source = source_of(sae, hookpoint)
    kept: list[Sequences] = []
    held = sequences(tokenizer, text, "heldout", batch=batch)
    for part in tqdm(held, desc="reconstruction", disable=None if progress else True, leave=False):
        hidden = record(model, [source, hookpoint], part.ids, part.attention)
        both = (hidden[source], hidden[hookpoint])
        x, y = (h[part.mask.to(h.device)].float().to(device) for h in both)
        if not len(x):
            continue
        output = sae(x)
        error = y - output.reconstruction
        total.update(y, error)
        code = output.code
        used += int(l0(code.indices, code.values).sum())
        fired.index_fill_(0, code.indices[code.values != 0], True)
        mean += y.double().sum(0).cpu()
        if is_stepwise(code, sae):
            prefixes = prefixes or [RunningFVU(width) for _ in code.indices[0]]
            for running, residual in zip(
                reversed(prefixes), errors_of_steps(sae, code, error), strict=True
            ):
                running.update(y, residual)
        kept.append(part)
        result.tokens += len(x)
        if result.tokens >= max_tokens:
            break
    if not result.tokens:
        raise ValueError(f"no token of text on the held-out side of {text.dataset}")
    result.fvu, result.l0 = total.value(), used / result.tokens
    result.dead_fraction = 1 - fired.float().mean().item()
    result.fvu_at_k = [running.value() for running in prefixes]
    if is_causal(model):
        average = (mean / result.tokens).float().to(device)
        result.ce_clean, result.ce_sae, result.ce_mean = _cross_entropies(
            model, hookpoint, kept, sae, average, progress
        )
        gap = result.ce_mean - result.ce_clean
        result.ce_recovered = (result.ce_mean - result.ce_sae) / gap if gap else float("nan")
    return result


def source_of(sae: SparseAutoencoder, hookpoint: str) -> str:
    """Hookpoint that an SAE reads: the module's input for a transcoder.

    Raises:
        ValueError: a transcoder of what is an input.
    """
    if not isinstance(sae, Transcoder):
        return hookpoint
    if hookpoint.endswith(":input"):
        raise ValueError(
            f"hookpoint {hookpoint!r} is an input; a transcoder makes a module's output"
        )
    return f"{hookpoint}:input"


def _cross_entropies(
    model: Any,
    hookpoint: str,
    kept: list[Sequences],
    sae: SparseAutoencoder,
    mean: Tensor,
    progress: bool,
) -> tuple[float, float, float]:
    """Mean cross-entropy clean, with the SAE's reconstruction, and with the mean activation."""
    functions: list[Callable[[Tensor], Tensor] | None] = [
        None,
        lambda x: sae(x.to(mean.device)).reconstruction.to(x.device),
        lambda x: mean.to(x.device).expand(len(x), -1),
    ]
    source = source_of(sae, hookpoint)
    sums, count = [0.0, 0.0, 0.0], 0
    for part in tqdm(kept, desc="cross-entropy", disable=None if progress else True, leave=False):
        targets = part.mask[:, 1:] & part.attention[:, :-1]
        count += int(targets.sum())
        for number, function in enumerate(functions):
            sums[number] += _cross_entropy(model, source, hookpoint, part, targets, function)
    clean, spliced, ablated = (total / count for total in sums)
    return clean, spliced, ablated


def _cross_entropy(
    model: Any,
    source: str,
    hookpoint: str,
    part: Sequences,
    targets: Tensor,
    function: Callable[[Tensor], Tensor] | None,
) -> float:
    """Sum the cross-entropy in nats, the text's activations replaced by the function of source."""
    mask = part.mask.to(model.device)
    read: list[Tensor] = []

    def look(hidden: Tensor) -> Tensor:
        read[:] = [hidden]
        return hidden

    def spliced(hidden: Tensor) -> Tensor:
        new = hidden.clone()
        seen = read[0] if source != hookpoint else hidden
        new[mask] = function(seen[mask].float()).to(hidden.dtype)  # type: ignore[misc]
        return new

    hooks = {source: look, hookpoint: spliced}  # where both are one, the latter counts
    with replace(model, {} if function is None else hooks):
        ids = part.ids.to(model.device)
        attention = part.attention.to(model.device)
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    chosen = targets.to(model.device)
    return F.cross_entropy(
        logits[:, :-1][chosen].float(), ids[:, 1:][chosen], reduction="sum"
    ).item()
