"""Tied or not: against what transformers loads, for every combination of config and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.architecture import ARCHITECTURES, config_entry
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.surgery import model_sizes
from streamline_bench.modeling.loading import load_config, load_model, stored_overrides

HEADS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "none": None,
    "copy": lambda table: table.clone(),
    "another": lambda table: table + 0.1 * torch.randn_like(table),
    "wide copy": lambda table: table.to(torch.float64),
    "instead": lambda table: table,  # as safetensors' save_model writes tied weights
}


def _written(folder: Path, said: bool | None, head: str) -> Path:
    """Rewrite a tied model: what config.json says (None: nothing), and which head is stored."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.pop("lm_head.weight", None)
    make = HEADS[head]
    if make is not None:
        torch.manual_seed(0)
        weights["lm_head.weight"] = make(weights["model.embed_tokens.weight"])
    if head == "instead":
        del weights["model.embed_tokens.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    if said is not None:
        config["tie_word_embeddings"] = said
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def written(make_tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    def make(family: str, said: bool | None, head: str) -> Path:
        sizes = {"head_dim": 8} if family == "gemma2" else {}
        folder = make_tiny_model(family, num_hidden_layers=4, tie_word_embeddings=True, **sizes)
        return _written(folder, said, head)

    return make


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_agrees_with_transformers(
    written: Callable[..., Path], family: str, said: bool | None, head: str
) -> None:
    folder = written(family, said, head)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if head in ("none", "instead") and not model.config.tie_word_embeddings:
        return  # transformers makes one of the two at random, which load_model refuses
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    reader = CheckpointReader(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert reader.tied == tied
    assert reader.num_parameters == count
    assert model_sizes(reader).total == count
    config = load_config(folder)
    assert bool(config.tie_word_embeddings) == tied
    assert model_sizes(config).total == count
    ours = load_model(folder, device="cpu")
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight.float())
    contradicts = bool(model.config.tie_word_embeddings) and not tied
    assert stored_overrides(str(folder)) == ({"tie_word_embeddings": False} if contradicts else {})


def test_where_the_file_is_silent_the_config_class_decides() -> None:
    """A raw config.json of every family, with nothing but its type."""
    for family, row in ARCHITECTURES.items():
        default = CONFIG_MAPPING[family]()
        raw = {"model_type": family}
        for key in ("tie_word_embeddings", row.depth_key, "vocab_size"):
            assert config_entry(raw, key) == getattr(default, key), (family, key)
    assert config_entry({"model_type": "unheard_of"}, "vocab_size", 7) == 7


@pytest.mark.parametrize("head", ["another", "instead"])
@pytest.mark.parametrize("recipe", ["last_layers", "last_layers_lora"])
def test_compression_keeps_the_head(
    written: Callable[..., Path], tmp_path: Path, recipe: str, text_file: Path, head: str
) -> None:
    """The rate is so small that the recovery leaves the weights as they are."""
    folder = written("llama", True, head)
    overrides: dict[str, Any] = {"n_layers": 1}
    if recipe.endswith("lora"):
        data = {"source": str(text_file), "form": "packed", "samples": 8, "sequence_length": 16}
        overrides |= {f"recovery.training.data.{key}": value for key, value in data.items()}
        overrides |= {f"recovery.training.{key}": 1 for key in ("min_steps", "epochs")}
        overrides["recovery.training.lr"] = 1e-12
    out = compress(folder, load_recipe(recipe, overrides), tmp_path / "out", progress=False)
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, out))
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert torch.equal(after.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert (after.lm_head.weight is after.model.embed_tokens.weight) == (head == "instead")
    assert CheckpointReader(out).num_parameters == sum(p.numel() for p in after.parameters())
