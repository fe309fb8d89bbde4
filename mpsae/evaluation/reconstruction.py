"""How well an SAE stands in for the activations: on the activations, and in the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpsae.activations import Sequences, TextConfig, is_causal, replace, run, sequences
from mpsae.activations.model import check_context
from mpsae.backends import record_pursuits
from mpsae.evaluation.coherence import babel_sizes, coherence
from mpsae.evaluation.downstream import LaterFVU, later_hookpoints, nats, put, targets
from mpsae.evaluation.tally import CodeTally, ErrorTally
from mpsae.sae import SparseAutoencoder, Transcoder

_TIMED = 5  # batches


@dataclass
class Evaluation:
    """Held-out measures of one SAE; no unit where none is named, None where not measurable."""

    tokens: int = 0
    """Tokens of text looked at."""
    fvu: float = float("nan")
    """Fraction of variance unexplained."""
    explained_variance: float = float("nan")
    """1 - FVU."""
    cosine: float = float("nan")
    """Of activation and reconstruction, mean over tokens; 0 for one that is zero."""
    l0: float = float("nan")
    """Mean number of latents other than zero."""
    l0_min: int = 0
    """The least of any token."""
    l0_max: int = 0
    """The most of any token."""
    dead_fraction: float = float("nan")
    """Latents that fired on none of the tokens."""
    dense_fraction: float = float("nan")
    """Latents that fired on more than 10 % of the tokens."""
    firing: dict[str, Any] = field(default_factory=dict)
    """Histogram of log10 of the latents' firing frequencies, `tally.firing_histogram`."""
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
    l0_at_k: list[float] = field(default_factory=list)
    """The same of the mean L0."""
    downstream_fvu: dict[str, float] = field(default_factory=dict)
    """FVU of later hookpoints' activations, the reconstruction in place, against the clean ones."""
    coherence: float = float("nan")
    """Largest absolute cosine of two atoms."""
    mean_coherence: float = float("nan")
    """Mean absolute cosine of two atoms."""
    babel: dict[int, float] = field(default_factory=dict)
    """Babel function of the dictionary at 1, 2, 4, ..., see `coherence.coherence`."""
    babel_selected: dict[int, float] = field(default_factory=dict)
    """That of the atoms which a token's code uses, mean over tokens."""
    reselection_rate: float | None = None
    """Share of a pursuit's steps that choose a latent which the token has already."""
    rescored_rate: float | None = None
    """Share of steps that the 16-bit Gram matrix left undecided; none where none is read."""
    encode_us: float | None = None
    """Microseconds to encode a token, in batches of these: median of a few batches."""


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
    downstream: Sequence[str] | None = None,
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
        downstream: hookpoints whose activations are compared with the clean ones; by default every
            layer of the model that ends after ``hookpoint``.
        progress: show a bar.

    Returns:
        Evaluation. Only tokens of text are encoded, replaced, averaged and compared; cross-entropy
        is over tokens of text that follow another token.

    Raises:
        ValueError: activations of another width than the SAE's; no text on the held-out side; a
            context that the model does not reach; a downstream hookpoint that is run earlier.

    Notes:
        Two runs of the model a batch, clean and with the reconstruction, and after the last batch
        one with the mean. In memory are the ids of the text, and of one batch the activations of
        all hookpoints. The atoms' coherence is 2 n^2 d FLOP more.
    """
    if max_tokens < 1 or batch < 1:
        raise ValueError(f"max_tokens={max_tokens} and batch={batch} must be at least 1")
    check_context(model, text.context)
    sae.eval()
    source = source_of(sae, hookpoint)
    later = later_hookpoints(model, hookpoint, downstream)
    watched = list(dict.fromkeys([source, hookpoint, *later]))
    causal, device = is_causal(model), sae.dictionary.device
    sizes = babel_sizes(len(sae.dictionary), sae.config.k)
    errors, codes, after = ErrorTally(sae), CodeTally(sae, sizes), LaterFVU(later)
    ce_clean = ce_sae = 0.0
    kept: list[Sequences] = []
    microseconds: list[float] = []
    held = sequences(tokenizer, text, "heldout", batch=batch)
    for part in tqdm(held, desc="reconstruction", disable=None if progress else True, leave=False):
        if not part.mask.any():
            continue
        clean, output = run(model, watched, part.ids, part.attention)
        x, y = (
            hidden[part.mask.to(hidden.device)].float().to(device)
            for hidden in (clean[source], clean[hookpoint])
        )
        with record_pursuits() as records:
            reconstruction, code, _ = sae(x)
        errors.update(y, reconstruction, code)
        codes.update(code, records)
        if len(kept) < _TIMED:
            microseconds.append(_microseconds(sae, x))
        if causal or later:
            with replace(model, {hookpoint: put(part.mask, reconstruction)}):
                changed, spliced = run(model, later, part.ids, part.attention)
            after.update(part.mask, clean, changed)
        if causal:
            ce_clean += nats(output.logits, part)
            ce_sae += nats(spliced.logits, part)
        kept.append(part)
        if codes.tokens >= max_tokens:
            break
    if not kept:
        raise ValueError(f"no token of text on the held-out side of {text.dataset}")
    atoms = coherence(sae.dictionary, sizes)
    result = Evaluation(
        **errors.values(),
        **codes.values(),
        downstream_fvu=after.values(),
        coherence=atoms.largest,
        mean_coherence=atoms.mean,
        babel=atoms.babel,
        encode_us=statistics.median(microseconds),
    )
    count = sum(int(targets(part).sum()) for part in kept)
    if causal and count:
        result.ce_clean, result.ce_sae = ce_clean / count, ce_sae / count
        result.ce_mean = _ablated(model, hookpoint, kept, errors.mean, progress) / count
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


def _ablated(
    model: Any, hookpoint: str, kept: list[Sequences], mean: Tensor, progress: bool
) -> float:
    """Sum the cross-entropy with the mean in place of the activations."""
    total = 0.0
    for part in tqdm(kept, desc="cross-entropy", disable=None if progress else True, leave=False):
        with replace(model, {hookpoint: put(part.mask, mean)}):
            total += nats(run(model, [], part.ids, part.attention)[1].logits, part)
    return total


def _microseconds(sae: SparseAutoencoder, x: Tensor) -> float:
    """Time one more encoding of rows, what is kept of the weights being at hand by now."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    started = time.perf_counter()
    sae.encode(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return 1e6 * (time.perf_counter() - started) / len(x)
