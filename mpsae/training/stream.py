"""Where a run's activations come from."""

from __future__ import annotations

from typing import Any

from mpsae.activations import CacheSource, ModelSource, ShuffledStream, Source, load_language_model
from mpsae.activations.model import DTYPES
from mpsae.seeds import mixed
from mpsae.training import memory
from mpsae.training.config import TrainConfig
from mpsae.training.distributed import ALONE, Processes


def open_stream(
    config: TrainConfig,
    device: str,
    processes: Processes = ALONE,
    model: Any = None,
    tokenizer: Any = None,
) -> ShuffledStream:
    """Open the cache that a run reads, or load its model.

    Args:
        config: of the run.
        device: where the rows are to be.
        processes: of the run, each of which has a share of the rows and of every batch.
        model, tokenizer: of transformers, in place of those that ``config.model`` names.

    Raises:
        OSError: model, dataset or cache cannot be read.
        ValueError: a hookpoint or text that cannot be used; a run that no memory holds.
    """
    source: Source
    share = processes.rank, processes.size
    if config.cache is not None:
        source = CacheSource(
            config.cache, config.recorded, seed=config.seed, device=device, share=share
        )
    else:
        if model is None:
            model, tokenizer = load_language_model(
                config.model,
                device=device,
                dtype=DTYPES[config.model_dtype],
                trust_remote_code=config.trust_remote_code,
            )
        source = ModelSource(
            model,
            tokenizer,
            config.recorded,
            config.text,
            model_batch=config.buffer.model_batch,
            check_finite=config.buffer.check_finite,
            share=share,
        )
    # before the buffer takes any
    shares = processes.size if config.dictionary_parallel else 1
    memory.check(config, source.widths(), source.device, shares=shares)
    return ShuffledStream(
        source,
        buffer_tokens=config.buffer.buffer_tokens,
        batch=(config.batch_tokens or 1) // processes.size,
        seed=mixed(config.seed, processes.rank) if processes.rank else config.seed,
        repeat=config.max_tokens is not None,
    )
