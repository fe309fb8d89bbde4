"""What commands that look at trained SAEs share: which SAEs, and what each was trained on."""

# no postponed annotations: a command whose config inherits from the one here reads its types

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simple_parsing import field as option

from mpsae.activations import TextConfig, load_language_model
from mpsae.sae import SparseAutoencoder
from mpsae.training import pick_device
from mpsae.training.state import checkpoints


@dataclass(kw_only=True)
class SAEsConfig:
    """Trained SAEs, and what to measure them on."""

    runs: list[Path] = option(positional=True, nargs="+", metavar="RUN")
    """Folders of runs, or of single SAEs."""
    batch: int = 16
    """Sequences at a time."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    model: str | None = None
    """Model in place of the one that an SAE was trained on."""
    dataset: str | None = None
    """Dataset in place of the one that an SAE was trained on."""
    hookpoint: str | None = None
    """Hookpoint in place of the one that an SAE was trained on."""
    trust_remote_code: bool = False
    """Run the code that a model's own repository brings."""

    def folders(self) -> list[Path]:
        """Folders of all SAEs that are meant, each once."""
        return list(dict.fromkeys(folder for run in self.runs for folder in find_saes(run)))

    def saes(self) -> Iterator[tuple[Path, SparseAutoencoder]]:
        """Read them all, folder and SAE."""
        device = pick_device(self.device)
        for folder in self.folders():
            yield folder, SparseAutoencoder.from_pretrained(folder, device)

    def origin(self, folder: Path, sae: SparseAutoencoder) -> tuple[str, str, TextConfig]:
        """Model, hookpoint and text to measure an SAE on.

        Raises:
            ValueError: neither its cfg.json nor the command line says model and hookpoint.
        """
        known = sae.metadata
        model = self.model or known.get("model_name")
        hookpoint = self.hookpoint or known.get("hook_name")
        if model is None or hookpoint is None:
            raise ValueError(
                f"{folder} does not say on which model and hookpoint it was trained (metadata of "
                "cfg.json)"
            )
        text = TextConfig(**known.get("text", {"context": known.get("context_size", 256)}))
        text.dataset = self.dataset or text.dataset
        return str(model), hookpoint, text


class Models:
    """Language models with their tokenizers by name, each loaded once."""

    def __init__(self, config: SAEsConfig):
        self.device, self._trust = pick_device(config.device), config.trust_remote_code
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self._loaded:
            self._loaded[name] = load_language_model(
                name, device=self.device, trust_remote_code=self._trust
            )
        return self._loaded[name]


def find_saes(folder: Path) -> list[Path]:
    """Folders of finished SAEs below a folder, or those of its newest checkpoint.

    Raises:
        OSError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob("cfg.json"))
    kept = [p for p in found if not _passing(p.relative_to(folder))]
    if not kept and (newest := checkpoints(folder)):
        kept = [p for p in found if p.is_relative_to(newest[-1])]
    if not kept:
        raise OSError(f"no SAE (cfg.json) in {folder}; is it the folder of a run?")
    return kept


def _passing(path: Path) -> bool:
    """Whether it lies in a checkpoint, or in one that was never finished."""
    return any(part.startswith(("checkpoint-", ".")) for part in path.parts)
