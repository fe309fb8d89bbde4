"""Settings of a training run: what the command line takes and the run's folder keeps."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from simple_parsing import field as option

from mpsae import checks
from mpsae.activations import BufferConfig, TextConfig, read_index
from mpsae.activations.model import DTYPES, EMBEDDED
from mpsae.sae import (
    ARCHITECTURES,
    MatchingPursuitSAE,
    SAEConfig,
    SparseAutoencoder,
    Transcoder,
)
from mpsae.sae.all_at_once import BeforePursuit
from mpsae.sae.checkpoint import read_json, renamed
from mpsae.training import optimizers
from mpsae.training.optimizers import OptimizerName

HOOKPOINT = "layers.2"
Logger = Literal["wandb", "trackio", "tensorboard"]
OnNonfinite = Literal["stop", "skip"]
OnDivergence = Literal["warn", "stop"]

# what may change when a run is resumed
_FREE = {
    "max_tokens", "accumulate", "device", "autocast", "out", "resume", "checkpoint_every",
    "log_every", "logger", "dry_run", "config", "push_to_hub", "keep_checkpoints", "on_nonfinite",
    "on_divergence", "trust_remote_code", "distribute_modules",
    "dictionary_parallel",
}  # fmt: skip


@dataclass(kw_only=True)
class TrainConfig:
    """Train sparse autoencoders on a language model's activations."""

    model: str = option(default=EMBEDDED, positional=True, nargs="?", metavar="MODEL")
    """Hub id or local folder of a transformers model; the embedded one by default."""
    dataset: str = option(default="stdlib", positional=True, nargs="?", metavar="DATASET")
    """Hub id, local file or folder, or stdlib: the source of Python's own library."""
    hookpoints: list[str] = field(default_factory=lambda: [HOOKPOINT])
    """Modules whose outputs are encoded (layers.2, layers.2.mlp; with :input their inputs)."""
    architecture: list[str] = field(default_factory=lambda: ["matching_pursuit"])
    """matching_pursuit, topk, batch_topk, matryoshka; transcoder, skip_transcoder, mp_transcoder
    (from a module's input to its output); several are trained on the same batches."""
    k: int = 32
    """Latents a token."""
    expansion_factor: int = 32
    """Latents over features of the activations."""
    d_sae: int | None = None
    """Latents, in place of expansion_factor."""
    sae: list[str] = field(default_factory=list)
    """Further settings of the SAE as name=value, such as residual_threshold=2.5 or tied=false."""

    cache: Path | None = None
    """Folder of `mpsae cache` to read activations from, so that no model is run; model, dataset and
    text are the cache's, and so are hookpoints by default where it has no layers.2."""
    max_tokens: int | None = None
    """Tokens to train on, the text being read again as needed; one pass by default."""
    batch_tokens: int | None = None
    """Tokens a step; 65536 by default, 2048 with the embedded model."""
    accumulate: int = 1
    """Parts in which a step's tokens go through the SAE, to save memory."""
    k_decay_steps: int = 0
    """Steps in which k falls in equal parts from k_start to k."""
    k_start: int | None = None
    """First k of that decay; by default 10 times the features, at most the number of latents."""
    turn_on_mp_step: int = 0
    """Steps in which matching_pursuit chooses its latents all at once, with the same weights."""
    before_mp: BeforePursuit = "topk"
    """How it does: topk, or groupmax, the largest of each of k groups of latents."""
    optimizer: OptimizerName = "adam"
    """adam; muon, with Adam for b_dec and b_enc; signum, which wants a lower rate."""
    lr: float = 1e-3
    """Rate at its highest."""
    warmup_steps: int = 100
    """Steps in which the rate rises from zero."""
    decay_fraction: float = 0.2
    """Last part of the run, in which the rate falls to zero (only where max_tokens is given)."""
    clip_grad_norm: float = 1.0
    """Largest norm of a step's gradient; 0 turns it off."""
    autocast: bool | None = None
    """bf16 autocast; on a GPU by default."""
    device: str = "auto"
    """cuda, cpu, or auto: a GPU where there is one."""
    model_dtype: str = "fp32"
    """Of the language model's weights and products: fp32, bf16 or fp16. Its activations are trained
    on in fp32 all the same."""
    dictionary_parallel: bool = False
    """Under torchrun, spread the latents of each matching_pursuit SAE over the processes, which all
    see the whole batch: for dictionaries that one device does not hold."""
    distribute_modules: bool = False
    """Under torchrun, share the hookpoints out over the processes, each trained by one of them on
    the rows of all, in place of training every SAE in all of them."""
    trust_remote_code: bool = False
    """Run the code that a model's own repository brings."""
    seed: int = 0
    """Of dictionary and shuffling."""

    out: Path = Path("runs/default")
    """The run's folder: config.json, metrics.jsonl, checkpoints and the finished SAEs."""
    resume: bool = False
    """Go on from the newest checkpoint in the run's folder."""
    dry_run: bool = False
    """Say what memory and time the run takes at least, and stop before it starts."""
    config: Path | None = None
    """JSON file of settings, such as a run's config.json; those on the command line win."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones."""
    on_nonfinite: OnNonfinite = "stop"
    """At NaN or Inf: stop, or skip what has it (rows of activations, an SAE's step) and go on."""
    on_divergence: OnDivergence = "warn"
    """When atoms explode or nine tenths of the latents are dead: warn, or stop."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    logger: Logger | None = None
    """wandb, trackio or tensorboard, if installed, beside metrics.jsonl."""
    push_to_hub: str | None = None
    """Hub repo (user/repo) for the finished SAEs, made before training where it does not exist;
    mpsae push uploads them later, and makes private ones."""

    text: TextConfig = field(default_factory=TextConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if self.dataset == "stdlib":
            self.dataset = self.text.dataset
        self.text.dataset = self.dataset
        checks.choice("model_dtype", self.model_dtype, list(DTYPES))
        if self.cache is not None:
            self._take_from_cache(Path(self.cache))
        if self.batch_tokens is None:
            self.batch_tokens = 2**11 if self.model == EMBEDDED else 2**16
        for name in ("k", "expansion_factor", "batch_tokens", "accumulate", "checkpoint_every",
                     "log_every", "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < self.batch_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} is less than one step (batch_tokens="
                f"{self.batch_tokens})"
            )
        if self.batch_tokens < 2 * self.accumulate:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} gives fewer than two rows to each of "
                f"accumulate={self.accumulate} parts"
            )
        for name in ("hookpoints", "architecture"):
            named = getattr(self, name)
            if not named or len(set(named)) < len(named):
                raise ValueError(f"{name} must name at least one, and none twice, not {named}")
        if not self.clip_grad_norm >= 0:
            raise ValueError(f"clip_grad_norm must be at least 0, not {self.clip_grad_norm}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0 and finite, not {self.lr}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in [0, 1], not {self.decay_fraction}")
        checks.choice("on_nonfinite", self.on_nonfinite, get_args(OnNonfinite))
        checks.choice("on_divergence", self.on_divergence, get_args(OnDivergence))
        if self.logger not in (None, *get_args(Logger)):
            raise ValueError(f"logger must be one of {', '.join(get_args(Logger))}")
        for name in self.architecture:
            if name not in ARCHITECTURES:
                raise ValueError(
                    f"no architecture {name!r}; there are {', '.join(sorted(ARCHITECTURES))}"
                )
        for hookpoint in self.hookpoints:
            if hookpoint.endswith(":input") and any(map(is_transcoder, self.architecture)):
                raise ValueError(
                    f"hookpoint {hookpoint!r} is an input; a transcoder reads input and output of "
                    f"{hookpoint.removesuffix(':input')!r}"
                )
        optimizers.check(self.optimizer)
        self._check_dictionary_parallel()
        self._check_schedules()
        # twice the batch at least, or the stream could not mix
        self.buffer.buffer_tokens = max(self.buffer.buffer_tokens, 2 * self.batch_tokens)
        for name in self.architecture:
            self.sae_config(name, d_in=max(self.k, 1))

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Read settings from a JSON file; those that it does not have keep their defaults.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no object, or has settings that are unknown.
        """
        written = read_json(path)
        parts = {"text": TextConfig, "buffer": BufferConfig}
        known = {"": cls} | parts
        for name, kind in known.items():
            given = written.get(name, {}) if name else written
            if not isinstance(given, dict):
                raise ValueError(f"{path} must hold an object of settings {name}, not {given!r}")
            unknown = set(given) - {f.name for f in fields(kind)}
            if unknown:
                raise ValueError(f"{path} has unknown settings: {', '.join(sorted(unknown))}")
            checks.types(kind, {n: v for n, v in given.items() if n not in parts}, str(path))
        for name, kind in parts.items():
            if name in written:
                written[name] = kind(**written[name])
        return cls(**written)

    def _take_from_cache(self, folder: Path) -> None:
        """Take what the cache was made with, where it is left at the default here."""
        self.cache, index = folder, read_index(folder)
        own = {"model": self.model, "model_dtype": self.model_dtype} | asdict(self.text)
        theirs = {"model": index.model, "model_dtype": index.model_dtype} | index.text
        defaults = {"model": EMBEDDED, "model_dtype": "fp32"} | asdict(TextConfig())
        for name, value in own.items():
            if value not in (defaults[name], theirs[name]):
                raise ValueError(
                    f"{name}={value!r} is not that of the cache {folder}, which was made with "
                    f"{theirs[name]!r}; it can be left out"
                )
        self.model_dtype = index.model_dtype
        self.model, self.dataset, self.text = index.model, theirs["dataset"], index.text_config()
        if self.hookpoints == [HOOKPOINT] and HOOKPOINT not in index.hookpoints:
            self.hookpoints = list(index.hookpoints)
            if any(is_transcoder(name) for name in self.architecture if name in ARCHITECTURES):
                paired = [name for name in self.hookpoints if input_of(name) in index.hookpoints]
                self.hookpoints = paired or self.hookpoints

    def _check_dictionary_parallel(self) -> None:
        if not self.dictionary_parallel:
            return
        if self.distribute_modules:
            raise ValueError("dictionary_parallel and distribute_modules do not go together")
        if self.architecture != ["matching_pursuit"]:
            raise ValueError(
                "dictionary_parallel is for architecture matching_pursuit alone, not "
                f"{', '.join(self.architecture)}"
            )
        if self.optimizer == "muon":
            raise ValueError(
                "dictionary_parallel needs an optimizer other than muon, which takes matrices whole"
            )
        if self.turn_on_mp_step:
            raise ValueError(
                f"turn_on_mp_step={self.turn_on_mp_step} does not go with dictionary_parallel"
            )

    def _check_schedules(self) -> None:
        for name in ("k_decay_steps", "turn_on_mp_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.k_start is not None and (self.k_decay_steps == 0 or self.k_start < self.k):
            raise ValueError(
                f"k_start={self.k_start} must be at least k={self.k}, and k_decay_steps above 0"
            )
        if self.k_decay_steps and "batch_matching_pursuit" in self.architecture:
            raise ValueError(
                f"k_decay_steps={self.k_decay_steps} is not for batch_matching_pursuit, which "
                "learns a threshold for one k"
            )
        checks.choice("before_mp", self.before_mp, get_args(BeforePursuit))
        if self.turn_on_mp_step == 0:
            return
        if "matching_pursuit" not in self.architecture:
            raise ValueError(
                f"turn_on_mp_step={self.turn_on_mp_step} is for architecture matching_pursuit, not "
                f"{', '.join(self.architecture)}"
            )
        if self.before_mp == "groupmax" and self.k_decay_steps:
            raise ValueError("before_mp='groupmax' has one k, so it does not go with k_decay_steps")

    def current_k(self, step: int, config: SAEConfig) -> int:
        """Latents a row in a step, counted from 0."""
        if step >= self.k_decay_steps:
            return config.k
        start = 10 * config.d_in if self.k_start is None else self.k_start
        share = step / self.k_decay_steps
        return round(min(start, config.d_sae) * (1 - share) + config.k * share)

    def schedule(self, sae: SparseAutoencoder, step: int) -> None:
        """Set what depends on the step, counted from 0; nothing else has to be remembered."""
        sae.training_k = self.current_k(step, sae.config)
        if isinstance(sae, MatchingPursuitSAE):
            early = step < self.turn_on_mp_step and sae.architecture == "matching_pursuit"
            sae.before_pursuit = self.before_mp if early else None

    @property
    def recorded(self) -> list[str]:
        """Hookpoints whose activations are needed: transcoders read their inputs too."""
        if not any(map(is_transcoder, self.architecture)):
            return self.hookpoints
        return [*self.hookpoints, *map(input_of, self.hookpoints)]

    def sae_config(self, architecture: str, d_in: int, d_out: int | None = None) -> SAEConfig:
        """Make the config of one SAE; ``d_out`` is of transcoders.

        Raises:
            ValueError: ``sae`` names a setting that the architecture does not have, or a value that
                it does not take.
        """
        cls = ARCHITECTURES[architecture].config_class
        options = _parse_options(cls, self.sae)
        d_sae = d_in * self.expansion_factor if self.d_sae is None else self.d_sae
        sizes: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "k": self.k, "seed": self.seed}
        if is_transcoder(architecture):
            sizes["d_out"] = d_out
        config = cls(**sizes | options)
        if self.turn_on_mp_step and architecture == "matching_pursuit":
            self._check_all_at_once(config)
        return config

    def _check_all_at_once(self, config: Any) -> None:
        if config.select != "relu":
            raise ValueError(
                f"turn_on_mp_step={self.turn_on_mp_step} goes with select='relu', not with "
                f"{config.select!r}"
            )
        if config.k > config.d_sae:
            raise ValueError(f"turn_on_mp_step needs k={config.k} of d_sae={config.d_sae} latents")
        if self.before_mp == "groupmax" and config.d_sae % config.k:
            raise ValueError(
                f"before_mp='groupmax' needs groups of one size, but d_sae={config.d_sae} is no "
                f"multiple of k={config.k}"
            )

    def make_sae(self, architecture: str, d_in: int, d_out: int | None = None) -> SparseAutoencoder:
        """Make one SAE, untrained."""
        return ARCHITECTURES[architecture](self.sae_config(architecture, d_in, d_out))

    def metadata(self, hookpoint: str) -> dict[str, Any]:
        """Say what an SAE of a hookpoint is trained on, as its cfg.json keeps it."""
        return {
            "model_name": self.model,
            "hook_name": hookpoint,
            "dataset_path": self.dataset,
            "context_size": self.text.context,
            "prepend_bos": self.text.prepend_bos,
            "text": asdict(self.text),
        }

    def as_json(self) -> dict[str, Any]:
        """Give the settings as JSON has them."""
        return json.loads(json.dumps(asdict(self), default=str))

    def save(self, path: Path) -> None:
        """Write the settings as JSON."""
        with renamed(path) as temporary:
            temporary.write_text(json.dumps(self.as_json(), indent=2) + "\n")

    def check_resumed(self, path: Path) -> None:
        """Compare with the settings that a run was started with.

        Raises:
            OSError: the file cannot be read.
            ValueError: a setting differs that a run cannot change on its way.
        """
        before = read_json(path)
        now = self.as_json()
        before = {f.name: f.default for f in fields(self)} | before  # settings newer than the run
        for name in now.keys() - _FREE:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"the run in {path.parent} has {name}={before.get(name)!r}, but now asked for "
                    f"is {now[name]!r}; give it as it was, or another --out"
                )


def is_transcoder(architecture: str) -> bool:
    """Say whether it maps a module's input to its output."""
    return issubclass(ARCHITECTURES[architecture], Transcoder)


def input_of(hookpoint: str) -> str:
    """Hookpoint of a module's input."""
    return f"{hookpoint}:input"


def _parse_options(cls: type[SAEConfig], pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value`` pairs as the types of the config's fields."""
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls) if f.name not in ("d_in", "d_out", "d_sae", "k", "seed")]
    options = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or name not in names:
            raise ValueError(
                f"sae={pair!r} is no setting of {cls.__name__}; as name=value it has "
                f"{', '.join(names)}"
            )
        options[name] = _parse_value(name, text, hints[name])
    return options


def _parse_value(name: str, text: str, hint: Any) -> Any:
    """Read text as what the field's type takes."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    kind = next(k for k in kinds if k is not type(None))
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if get_args(kind) and kind.__class__.__name__ == "_LiteralGenericAlias":
            return {choice: choice for choice in get_args(kind)}[text]
        return tuple(float(part) for part in text.split(","))
    except (KeyError, ValueError):
        wanted = ", ".join(map(str, get_args(kind))) or kind.__name__
        raise ValueError(f"{name}={text!r} is not {wanted}") from None
