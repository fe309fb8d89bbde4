"""A run that no memory could hold is refused before it takes any."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mpsae.plan import free_bytes
from mpsae.training.config import TrainConfig, input_of, is_transcoder


def check(
    config: TrainConfig, widths: Mapping[str, int], device: torch.device, *, shares: int = 1
) -> None:
    """Raise ValueError where a run needs more memory than is free.

    Counted is what cannot be avoided: the buffer (4 bytes a feature and 8 a row), weights and
    gradients of the SAEs (8 bytes a parameter) and the code of one part of a batch (12 bytes a
    latent). The SAEs are made on the meta device for that, which takes no memory.

    Args:
        config: of the run.
        widths: features by hookpoint.
        device: of the run.
        shares: processes over which each SAE is spread.
    """
    free = free_bytes(device)
    rows = config.buffer.buffer_tokens
    needs = {
        f"buffer_tokens={rows}": rows * (8 + 4 * sum(widths.values())),
        f"k={config.k} for batch_tokens={config.batch_tokens}": (
            12 * config.k * ((config.batch_tokens or 1) // config.accumulate)
        ),
    }
    for architecture in config.architecture:
        for hookpoint in config.hookpoints:
            source = input_of(hookpoint) if is_transcoder(architecture) else hookpoint
            d_in, d_out = widths[source], widths[hookpoint]
            d_sae = config.sae_config(architecture, d_in, d_out).d_sae
            what = f"d_sae={d_sae} of {architecture} at {hookpoint}"
            try:
                with torch.device("meta"):
                    sae = config.make_sae(architecture, d_in, d_out)
            except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
                raise ValueError(f"{what} is more than any memory holds") from error
            needs[what] = 8 * sum(p.numel() for p in sae.parameters()) // shares
    for what, need in needs.items():
        if need > free:
            raise ValueError(
                f"{what} needs {need / 2**30:,.1f} GiB at least, and {free / 2**30:,.1f} GiB are "
                f"free on {device.type}"
            )
