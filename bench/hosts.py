"""Time other packages' own training steps, as they are and with this package's encoder.

    python bench/hosts.py [--batch 512] [--d 384] [--n 6144] [--k 32]

Needs the packages; those that are not installed are left out. Writes results/<device>-hosts.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loops import sparsify_decode, sparsify_loop
from save import device_name, save

from mpsae.benchmark import interleave, peak_bytes

Step = Callable[[], object]


def saelens_steps(x: Tensor, n: int, k: int) -> dict[str, Step]:
    """Make steps of SAELens' trainer: forward, loss, counters, backward, clipping, Adam."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitTrainingSAEConfig
    from sae_lens.saes.sae import TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    from mpsae.integrations import saelens as fast

    def step(config_class: Any) -> Step:
        torch.manual_seed(0)
        config = config_class(
            d_in=x.shape[1], d_sae=n, max_iterations=k, residual_threshold=0.0,
            stop_on_duplicate_support=False, decoder_init_norm=1.0,
        )  # fmt: skip
        sae = TrainingSAE.get_sae_class_for_architecture(config.architecture())(config)
        settings = SAETrainerConfig(
            total_training_samples=10**9, train_batch_size_samples=len(x), lr=1e-6, lr_end=1e-6
        )
        trainer = SAETrainer(cfg=settings, sae=sae, data_provider=iter([]))
        return lambda: trainer._train_step(sae=sae, sae_in=x)

    own = step(MatchingPursuitTrainingSAEConfig)
    also = step(MatchingPursuitTrainingSAEConfig)

    def patched() -> object:
        with fast.patched():
            return also()

    sparse = step(fast.SparseTrainingConfig)
    return {"SAELens": own, "SAELens, patched": patched, "SAELens, sparse codes": sparse}


def overcomplete_steps(x: Tensor, n: int, k: int) -> dict[str, Step]:
    """Make steps of overcomplete's MpSAE with the loss of squares and Adam."""
    from mpsae.integrations import overcomplete as fast

    host = fast.import_host()

    def step() -> Step:
        torch.manual_seed(0)
        sae = host.MpSAE(x.shape[1], n, k=k)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-6)

        def run() -> object:
            _, _, reconstruction = sae(x)
            optimizer.zero_grad()
            (x - reconstruction).square().mean().backward()
            return optimizer.step()

        return run

    own, also = step(), step()

    def patched() -> object:
        with fast.patched():
            return also()

    return {"overcomplete": own, "overcomplete, patched": patched}


def sparsify_steps(x: Tensor, n: int, k: int) -> dict[str, Step]:
    """Make steps of sparsify's trainer: forward, FVU, backward, schedule-free signum.

    Its released coder is TopK; the loop is that of its branch, which was never released.
    """
    if x.device.type == "cpu":  # it takes Triton wherever that is installed
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.fused_encoder import EncoderOutput
    from sparsify.sign_sgd import SignSGD

    from mpsae.integrations import sparsify as fast

    class Loop(fast.SparseCoder):
        def encode(self, x: Tensor) -> Any:
            weights = self.encoder.weight, self.W_dec, self.cfg.k, self.encoder.bias, self.b_dec
            return EncoderOutput(*sparsify_loop(x, *weights), None)

        def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
            return sparsify_decode(top_indices, top_acts, self.W_dec)

    def step(coder: Any, config: Any) -> Step:
        torch.manual_seed(0)
        sae = coder(x.shape[1], config(num_latents=n, k=k), dtype=torch.float32)
        optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=1e-6), momentum=0.95)
        optimizer.train()

        def run() -> object:
            sae(x).fvu.backward()
            optimizer.step()
            return optimizer.zero_grad()

        return run

    return {
        "sparsify, its branch": step(Loop, fast.MatchingPursuitConfig),
        "sparsify, this coder": step(fast.SparseCoder, fast.MatchingPursuitConfig),
        "sparsify, TopK": step(SparseCoder, SparseCoderConfig),
    }


def main() -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--d", type=int, default=384)
    parser.add_argument("--n", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    x = torch.randn(options.batch, options.d, generator=torch.Generator().manual_seed(0))
    rows = []
    for make in (saelens_steps, overcomplete_steps, sparsify_steps):
        try:
            steps = make(x, options.n, options.k)
        except ImportError as error:
            print(f"left out: {error}")
            continue
        times = interleave(steps, options.repetitions)
        first = next(iter(times.values())).median
        for name, time in times.items():
            peak = peak_bytes(steps[name], x.device)
            rows.append(
                {"what": name, "B": options.batch, "d": options.d, "n": options.n, "k": options.k}
                | {"seconds": asdict(time), "ratio": first / time.median, "peak_bytes": peak}
            )
            memory = "not measured" if peak is None else f"{peak / 1e6:,.0f} MB"
            print(f"{name:<24}{1e3 * time.median:>9.0f} ms {first / time.median:>6.1f}x  {memory}")
    print(save(f"{device_name()}-hosts", {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
