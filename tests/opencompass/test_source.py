"""A model entry's keys: recipes are applied once, into the cache that the harness uses too."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest

from streamline_bench.errors import RecipeError
from streamline_bench.opencompass.source import entry_source

RECIPE = {"recipe": "last_layers", "n_layers": 2, "device": "cpu"}


def test_a_model_as_it_is(tiny_llama: Path) -> None:
    source = entry_source(str(tiny_llama), torch_dtype="torch.bfloat16", max_memory=None)
    assert source.prepared.pretrained == str(tiny_llama)
    assert (source.dtype, source.options) == ("bfloat16", {})


def test_the_harness_finds_what_was_compressed_here(tiny_llama: Path) -> None:
    from streamline_bench.harness.lm import StreamlineLM

    source = entry_source(str(tiny_llama), **RECIPE)
    assert source.prepared.manifest is not None
    assert source.prepared.manifest.layers_after == 4
    info = StreamlineLM(str(tiny_llama), dtype="float32", **RECIPE).get_model_info()["streamline"]
    assert info["path"] == source.prepared.pretrained
    assert info["content_key"] == source.prepared.key


def test_mappings_of_other_classes_and_dotted_keys(tiny_llama: Path) -> None:
    options = MappingProxyType(
        {**RECIPE, "recipe": "random_layers", "attn_implementation": "eager"}
    )
    source = entry_source(str(tiny_llama), **options, overrides=MappingProxyType({"seed": 3}))
    assert source.options == {"attn_implementation": "eager"}
    assert source.prepared.manifest is not None
    assert source.prepared.manifest.seed == 3


def test_unknown_and_stray_keys_are_errors(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"'sparisty=0.5'.*sparsity"):
        entry_source(str(tiny_llama), sparisty=0.5)
    with pytest.raises(RecipeError, match="add recipe="):
        entry_source(str(tiny_llama), sparsity=0.5)
