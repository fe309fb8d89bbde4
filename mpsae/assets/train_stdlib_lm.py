"""Train the embedded model: a small causal language model of the Python standard library.

    python -m mpsae.assets.train_stdlib_lm --out mpsae/assets/stdlib_lm

Writes a transformers folder (Llama type, BPE vocabulary, safetensors) and its model card, with the
held-out bits per byte. Muon on the hidden matrices and AdamW on the rest: on two cores it needs
about half the steps of AdamW alone.
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from simple_parsing import ArgumentParser
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mpsae.activations.stdlib_text import stdlib_documents

END_OF_TEXT = "<|endoftext|>"


@dataclass
class LanguageModelConfig:
    """What the embedded model is and how it is trained."""

    out: Path = Path("mpsae/assets/stdlib_lm")
    """Folder to write."""
    vocab_size: int = 4096
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    d_mlp: int = 512
    context: int = 256
    """Tokens a sequence."""
    batch: int = 32
    """Sequences a step."""
    steps: int = 2400
    lr: float = 0.02
    """Of Muon; AdamW's is a fifth of it."""
    seed: int = 0


def train_tokenizer(texts: list[str], config: LanguageModelConfig) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE vocabulary to the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=config.context,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Tokenise the texts and join them, each behind an end-of-text token. ``[T]``."""
    ids = [torch.tensor([0, *e.ids]) for e in tokenizer.backend_tokenizer.encode_batch(texts)]
    return torch.cat(ids)


def windows(stream: Tensor, context: int, offset: int = 0) -> Tensor:
    """Cut a stream into ``[N, context + 1]`` windows, neighbours sharing one token."""
    count = (len(stream) - 1 - offset) // context
    return stream[offset : offset + count * context + 1].unfold(0, context + 1, context)


def build_model(config: LanguageModelConfig) -> LlamaForCausalLM:
    """Make the model, untrained."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_heads,
            max_position_embeddings=2 * config.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    return model.float()


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings and norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, lr=lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=lr / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token; bf16 autocast where the processor has it."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
        logits = model(input_ids=batch[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int
) -> float:
    """Held-out cost: total cross-entropy in bits over the UTF-8 bytes of the texts."""
    stream = token_stream(tokenizer, texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    model.eval()
    rows = windows(stream, context)
    nats = sum(loss_of(model, batch).item() * batch[:, 1:].numel() for batch in rows.split(64))
    scored = rows.shape[0] * context
    # the tail that fills no window is charged at the mean rate
    return nats / math.log(2) * (len(stream) - 1) / scored / n_bytes


def schedule(step: int, steps: int) -> float:
    """Warm up over 50 steps, hold, and fall linearly to zero over the last 60 %."""
    return min(1.0, (step + 1) / 50) * min(1.0, (steps - step) / (0.6 * steps))


def train(config: LanguageModelConfig) -> float:
    """Train, save and write the card; the held-out bits per byte."""
    started = time.monotonic()
    texts = [doc["text"] for doc in stdlib_documents("train", tests=True)]
    heldout = [doc["text"] for doc in stdlib_documents("heldout")]
    tokenizer = train_tokenizer(texts, config)
    stream = token_stream(tokenizer, texts)
    model = build_model(config)
    opts = optimizers(model, config.lr)
    rates = [[group["lr"] for group in opt.param_groups] for opt in opts]
    generator = torch.Generator().manual_seed(config.seed)
    batches: list[Tensor] = []
    bar = tqdm(range(config.steps), desc=f"{sum(p.numel() for p in model.parameters()):,} params")
    for step in bar:
        if not batches:
            offset = int(torch.randint(config.context, (1,), generator=generator))
            rows = windows(stream, config.context, offset)
            order = torch.randperm(len(rows), generator=generator)
            batches = list(rows[order].split(config.batch)[:-1])
        model.train()
        loss = loss_of(model, batches.pop())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, base in zip(opts, rates, strict=True):
            for group, rate in zip(opt.param_groups, base, strict=True):
                group["lr"] = rate * schedule(step, config.steps)
            opt.step()
            opt.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 400 == 0:
            bpb = bits_per_byte(model, tokenizer, heldout[:8], config.context)
            tqdm.write(f"step {step + 1}: {bpb:.4f} bits per byte on eight held-out files")
    bpb = bits_per_byte(model, tokenizer, heldout, config.context)
    save(model, tokenizer, config, bpb, len(stream), time.monotonic() - started)
    return bpb


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: LanguageModelConfig,
    bpb: float,
    n_tokens: int,
    seconds: float,
) -> None:
    """Write the model (16-bit weights, loaded as fp32), the tokenizer and the card."""
    config.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    path = config.out / "config.json"
    written = json.loads(path.read_text())
    written.pop("torch_dtype", None)
    written["dtype"] = "float32"
    path.write_text(json.dumps(written, indent=2) + "\n")
    n_params = sum(p.numel() for p in model.parameters())
    passes = config.steps * config.batch * config.context / n_tokens
    text = f"Python {platform.python_version()}, {n_tokens:,} tokens, {passes:.1f} passes"
    layers = (
        f"{config.n_layers} layers, d_model {config.d_model}, MLP {config.d_mlp}, "
        f"{config.n_heads} heads"
    )
    (config.out / "README.md").write_text(
        f"""# stdlib_lm

A causal language model of the Python standard library's source and docstrings. It is small enough
to ship, so that everything here runs without a download; it is good for nothing else.

| | |
|---|---|
| type | Llama: {layers} |
| parameters | {n_params:,} (tied embeddings), stored in fp16 |
| vocabulary | byte-level BPE, {config.vocab_size} |
| context in training | {config.context} tokens |
| training text | the library and its tests, {text} |
| held out | a tenth of the modules, by name (`mpsae.activations.stdlib_split`), and their tests |
| held-out bits per byte | {bpb:.3f} (without tests, windows of {config.context} tokens) |
| training time | {seconds / 60:.0f} minutes on {torch.get_num_threads()} CPU threads |

Made by `python -m mpsae.assets.train_stdlib_lm`. The text is under the Python Software Foundation
License.
"""
    )


def main() -> None:
    """Run from the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_arguments(LanguageModelConfig, dest="config")
    bpb = train(parser.parse_args().config)
    print(f"held-out bits per byte: {bpb:.4f}")


if __name__ == "__main__":
    main()
