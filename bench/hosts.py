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

from loops import saelens_loop, sparsify_decode, sparsify_loop
from save import device_name, save

from mpsae import decompose
from mpsae.benchmark import interleave, peak_bytes

Step = Callable[[], object]
VECTORS, WIDTH, TOKENS = 16, 768, 50257  # GPT-2's unembedding


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


def overcomplete_steps(x: Tensor, n: int, k: int, name: str = "MpSAE") -> dict[str, Step]:
    """Make steps of one of overcomplete's SAEs with the loss of squares and Adam."""
    from mpsae.integrations import overcomplete as fast

    host = fast.import_host()

    def step() -> Step:
        torch.manual_seed(0)
        sae = getattr(host, name)(x.shape[1], n, k=k)
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

    return {f"overcomplete, {name}": own, f"overcomplete, {name}, patched": patched}


def overcomplete_omp_steps(x: Tensor, n: int, k: int) -> dict[str, Step]:
    """Make steps of overcomplete's OMPSAE."""
    return overcomplete_steps(x, n, k, "OMPSAE")


def dictionary_learning_steps(x: Tensor, n: int, k: int) -> dict[str, Step]:
    """Make steps of dictionary_learning's trainer (`update`), which has no pursuit of its own.

    The first has SAELens' loop as its encoder, with dense codes; the last is its own TopK.
    """
    from mpsae.integrations import dictionary_learning as fast

    top_k = fast.import_host().trainers.top_k

    class PlainTrainer(fast.MatchingPursuitTrainer):  # type: ignore[name-defined,misc]
        def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Tensor:
            ae = self.ae
            code = saelens_loop(x - ae.b_dec, ae.decoder.weight.T, 0.0, k, False)
            self.num_tokens_since_fired += len(x)
            self.num_tokens_since_fired[(code != 0).any(0)] = 0
            return (x - ae.decode(code)).pow(2).sum(-1).mean()

    def step(kind: Any) -> Step:
        trainer = kind(
            steps=10**9, activation_dim=x.shape[1], dict_size=n, k=k, layer=0, lm_name="none",
            lr=1e-6, seed=0, device=str(x.device),
        )  # fmt: skip
        return lambda: trainer.update(1, x)

    return {
        "dictionary_learning, loop": step(PlainTrainer),
        "dictionary_learning, pursuit": step(fast.MatchingPursuitTrainer),
        "dictionary_learning, its TopK": step(top_k.TopKTrainer),
    }


def grad_pursuit_steps(x: Tensor, n: int, k: int) -> dict[str, Step]:
    """Make calls of dictionary_learning's gradient pursuit."""
    from mpsae.integrations import dictionary_learning as fast

    host = fast.import_host().grad_pursuit
    atoms = torch.randn(n, x.shape[1], generator=torch.Generator().manual_seed(1))
    dictionary = torch.nn.functional.normalize(atoms, dim=1).to(x).T

    def own() -> object:
        return host.grad_pursuit(x, dictionary, k, str(x.device))

    def patched() -> object:
        with fast.patched():
            return own()

    return {"grad_pursuit": own, "grad_pursuit, patched": patched}


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


def vocabulary_steps(x: Tensor, n: int, k: int) -> dict[str, Step]:
    """Decompose some vectors over a whole unembedding, one at a time by hand and all at once."""
    g = torch.Generator().manual_seed(2)
    unembedding = torch.randn(TOKENS, WIDTH, generator=g).to(x.device)
    vectors = torch.randn(VECTORS, WIDTH, generator=g).to(x.device)
    unit = torch.nn.functional.normalize(unembedding, dim=1)

    def by_hand() -> object:
        codes = []
        for left in vectors:
            code = []
            for _ in range(k):
                value, token = (unit @ left).max(0)
                left = left - value.relu() * unit[token]
                code.append((token, value))
            codes.append(code)
        return codes

    return {
        "vocabulary, by hand": by_hand,
        "vocabulary, decompose": lambda: decompose(vectors, unembedding, k),
        "vocabulary, decompose with refit": lambda: decompose(vectors, unembedding, k, refit=True),
    }


HOSTS = (
    saelens_steps,
    overcomplete_steps,
    overcomplete_omp_steps,
    sparsify_steps,
    dictionary_learning_steps,
    grad_pursuit_steps,
    vocabulary_steps,
)


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
    for make in HOSTS:
        try:
            steps = make(x, options.n, options.k)
        except ImportError as error:
            print(f"left out: {error}")
            continue
        times = interleave(steps, options.repetitions)
        first = next(iter(times.values())).median
        shape = (len(x), options.d, options.n)
        B, d, n = (VECTORS, WIDTH, TOKENS) if make is vocabulary_steps else shape
        for name, time in times.items():
            peak = peak_bytes(steps[name], x.device)
            rows.append(
                {"what": name, "B": B, "d": d, "n": n, "k": options.k}
                | {"seconds": asdict(time), "ratio": first / time.median, "peak_bytes": peak}
            )
            memory = "not measured" if peak is None else f"{peak / 1e6:,.0f} MB"
            print(f"{name:<34}{1e3 * time.median:>9.0f} ms {first / time.median:>6.1f}x  {memory}")
    print(save(f"{device_name()}-hosts", {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
