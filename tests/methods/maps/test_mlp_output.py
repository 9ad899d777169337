"""Which tensors take a map of the MLP's output; test_replaceme folds it in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from streamline_bench.core.architecture import architecture_of
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.maps.replaceme import mlp_output_tensors


def _reader(folder: Path, *, without: str = "", dtype: str = "") -> Any:
    """A reader whose checkpoint lacks some tensors, or stores them otherwise."""
    reader = CheckpointReader(folder)
    names = tuple(name for name in reader.names if not (without and without in name))
    return SimpleNamespace(
        folder=folder,
        names=names,
        entry=lambda name: SimpleNamespace(
            dtype=dtype or reader.entry(name).dtype, shape=reader.entry(name).shape
        ),
    )


@pytest.fixture(scope="module")
def mixtral(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("mixtral", num_local_experts=4, num_hidden_layers=2)


def test_every_expert_takes_it(mixtral: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    found = mlp_output_tensors(_reader(mixtral), architecture_of(model.config), model, 1)
    prefix = "model.layers.1.block_sparse_moe.experts"
    assert found == {f"{prefix}.{expert}.w2.weight": -2 for expert in range(4)}


def test_attention_with_a_projection_of_the_same_name_does_not(
    make_tiny_model: Callable[..., Path],
) -> None:
    folder = make_tiny_model("gpt2", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = mlp_output_tensors(_reader(folder), architecture_of(model.config), model, 1)
    prefix = "transformer.h.1.mlp.c_proj"
    assert found == {f"{prefix}.weight": -1, f"{prefix}.bias": -1}


def test_a_missing_expert_and_quantised_weights_are_refused(mixtral: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixtral)
    row = architecture_of(model.config)
    with pytest.raises(ArchitectureError, match=r"MLP output.*ridge_map"):
        damaged = _reader(mixtral, without="layers.1.block_sparse_moe.experts.2.")
        mlp_output_tensors(damaged, row, model, 1)
    with pytest.raises(ArchitectureError, match=r"U8.*unquantised"):
        mlp_output_tensors(_reader(mixtral, dtype="U8"), row, model, 1)
