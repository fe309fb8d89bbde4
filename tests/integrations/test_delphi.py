"""Delphi's own loader on an exported cache; it needs eai-delphi's sources, not what it depends on.

Run by hand with the unpacked wheel (`pip download --no-deps eai-delphi==0.1.3`), jaxtyping, asyncer
and orjson on the path.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from latents_problem import W, make_source

from mpsae.evaluation.autointerp import DelphiCache, collect

delphi = pytest.importorskip("delphi", reason="eai-delphi's sources are not on the path")


@pytest.fixture
def loader(monkeypatch):
    """delphi.latents.loader without the packages' other modules, which want a GPU's libraries."""
    for name in ("faiss", "sentence_transformers", "blobfile"):
        monkeypatch.setitem(sys.modules, name, MagicMock(__spec__=ModuleSpec(name, None)))
    package = ModuleType("delphi.latents")
    package.__path__ = [str(Path(delphi.__file__).parent / "latents")]
    monkeypatch.setitem(sys.modules, "delphi.latents", package)
    return importlib.import_module("delphi.latents.loader")


@pytest.mark.parametrize("selected", [False, True])
def test_delphi_finds_the_same_contexts(selected, loader, tiny_models, text_file, tmp_path):
    from delphi.config import ConstructorConfig, SamplerConfig

    source = make_source(tiny_models, text_file)
    cache = DelphiCache(source)
    ids = [2, 17, 33]
    ours = {c.id: c for c in collect(source, ids, top=1, watch=cache.watch).latents}
    records = loader.LatentDataset(
        cache.save(tmp_path),
        SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2, train_type="top"),
        ConstructorConfig(example_ctx_len=W, min_examples=4, n_non_activating=4),
        tokenizer=source.tokenizer,
        modules=["layers.1"],
        latents={"layers.1": torch.tensor(ids)} if selected else None,
    )
    found = {record.latent.latent_index: record for record in records}
    assert set(found) == {number for number, latent in ours.items() if latent.contexts >= 4}
    assert found
    for number, record in found.items():
        best = record.examples[0]
        assert best.max_activation == pytest.approx(ours[number].top[0].peak)
        assert len(record.train) == len(record.test) == len(record.not_active) == 4
