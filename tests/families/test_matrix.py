"""The support matrix: types without a row of the table, and that its checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import matrix
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("model_type", ["mamba", "olmo_hybrid"])
def test_depth_recipes_are_exact_and_a_trained_layer_runs(model_type: str) -> None:
    cells = matrix.family_cells(model_type, ["last_layers", "streamline"])
    assert cells == {"last_layers": "exact", "streamline": "runs"}


def test_a_wrong_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with the bypassed model is not made from it."""
    source = matrix.tiny_folder("llama", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    matrix._compress(source, "last_layers", tmp_path / "pruned")
    assert matrix._checked(tmp_path / "pruned", dense, "last_layers", True) == "exact"
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight[0, 0] += 0.01
    assert matrix._checked(tmp_path / "pruned", dense, "last_layers", True).startswith(
        "wrong: logits"
    )
    ids = matrix._ids()
    with torch.no_grad(), matrix.bypassed(dense, range(1, 6)):
        shallow = dense(ids).logits
    assert not torch.equal(shallow, dense(ids).logits)


def test_what_is_worse() -> None:
    old = {"a": {"x": "exact", "y": "refused: why"}, "b": {"x": "runs"}}
    new = {"a": {"x": "runs", "y": "exact"}, "b": {"x": "crash: no"}, "c": {"x": "crash: new"}}
    assert matrix.worse(old, new) == ["a x: exact -> runs", "b x: runs -> crash: no"]
