"""The card of a hub repo: which SAEs it holds, and how to load one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpsae.sae.base import ARCHITECTURES

MARK = "<!-- Written by mpsae at every push; without this line it is left as it is. -->"
_COLUMNS = (
    "subfolder", "architecture", "model", "hookpoint", "d_in", "d_sae", "k", "tokens"
)  # fmt: skip


def model_card(
    repo_id: str, configs: Mapping[str, Mapping[str, Any]], first: str, revision: str | None = None
) -> str:
    """Write the README.md of a repo, with the metadata that the hub reads from its head.

    Args:
        repo_id: ``user/repo``.
        configs: what the cfg.json of each SAE says, by subfolder.
        first: subfolder of the one that the example loads.
        revision: of the repo, if not its main branch.

    Returns:
        Markdown.
    """
    rows = {name: _row(name, configs[name]) for name in sorted(configs)}
    kinds = {row["architecture"] for row in rows.values()} & ARCHITECTURES.keys()
    tags = ["sparse-autoencoder", *sorted(kind.replace("_", "-") for kind in kinds)]
    shown = [name for name in _COLUMNS if any(row[name] for row in rows.values())]
    table = [shown, ["---"] * len(shown), *([row[c] for c in shown] for row in rows.values())]
    where = "".join(
        f", {name}={value!r}"
        for name, value in (("revision", revision), ("subfolder", first))
        if value
    )
    place = rows[first]["hookpoint"] or "a model"
    return "\n".join([
        "---", "library_name: mpsae", "tags:", *(f"- {tag}" for tag in tags), "---", MARK, "",
        f"# {repo_id}", "", "Sparse autoencoders of a language model's activations.", "",
        *("| " + " | ".join(cells) + " |" for cells in table), "",
        "```python",
        "import torch",
        "from mpsae import SparseAutoencoder",
        "",
        f"sae = SparseAutoencoder.from_pretrained({repo_id!r}{where})",
        f"# in place of activations of {place}",
        "x = torch.randn(4, sae.config.d_in, dtype=sae.dictionary.dtype)",
        "code = sae.encode(x)",
        "print(code.indices, code.values)",
        "```", "",
    ])  # fmt: skip


def _row(name: str, config: Mapping[str, Any]) -> dict[str, str]:
    metadata = _object(config, "metadata")
    own = _object(metadata, "mpsae")
    k = _object(own, "config").get("k", config.get("k", config.get("max_iterations")))
    values = (
        name, own.get("architecture", config.get("architecture")), metadata.get("model_name"),
        metadata.get("hook_name"), config.get("d_in"), config.get("d_sae"), k,
        metadata.get("training_tokens"),
    )  # fmt: skip
    return {column: _cell(value) for column, value in zip(_COLUMNS, values, strict=True)}


def _object(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Look up an object in a cfg.json, which may be of another package; empty if it is none."""
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}


def _cell(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")
