"""A sample of the support matrix, and that its checks can fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import matrix
from families.tiny_models import CAUSAL_TYPES, VARIANTS
from transformers import AutoModelForCausalLM

SAMPLE = "bloom cohere2 jamba lfm2 mamba2 nemotron_h phimoe qwen3_next".split()
"""One of each kind: position biases, parallel layers, a hybrid mixture, convolutions, a state-space
model, a depth that is the length of a list, a mixture, linear attention."""


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(matrix.COMMITTED.read_text(encoding="utf-8"))
    return payload


@pytest.mark.parametrize(
    ("model_type", "recipes"),
    [
        *((model_type, ("last_layers", "streamline")) for model_type in SAMPLE),
        ("kimi_linear", ("last_layers_lora",)),  # stored under other names than the model's
    ],
)
def test_no_cell_is_worse_than_the_committed_one(
    model_type: str, recipes: tuple[str, ...], committed: dict[str, Any]
) -> None:
    found = {model_type: matrix.family_cells(model_type, recipes)}
    assert matrix.worse(committed["cells"], found) == []
    assert set(found[model_type]) <= set(committed["cells"][model_type])


def test_every_cell_is_sound_or_refused(committed: dict[str, Any]) -> None:
    counts: dict[str, int] = dict.fromkeys(matrix.ORDER, 0)
    rows = committed["cells"].values()
    assert sum(set(cells) == set(matrix.RECIPES) for cells in rows) >= 209
    for cells in rows:
        assert {*matrix.RECIPES} - {*committed["partly"]} <= set(cells) <= set(matrix.RECIPES)
        for cell in cells.values():
            kind, _, reason = cell.partition(":")
            counts[kind] += 1
            assert bool(reason) == (kind not in ("exact", "runs"))
    assert counts["wrong"] == counts["crash"] == 0
    wanted = {
        **dict.fromkeys(("streamline_none", "shortgpt", "last_layers"), "exact"),
        "streamline": "runs",
    }
    exact = [name for name, cells in committed["cells"].items() if wanted.items() <= cells.items()]
    assert len(set(exact) - set(VARIANTS)) >= 120
    assert {*CAUSAL_TYPES, *VARIANTS} == set(committed["cells"])


def test_vllm_serves_the_pruned_model_wherever_it_serves_the_dense_one(
    committed: dict[str, Any],
) -> None:
    """``served.py`` filled the column."""
    cells = [cell.partition(":")[0] for cell in committed["served"]["cells"].values()]
    assert set(cells) <= {"same", "other", "not served", "not tried"}
    assert cells.count("same") >= 55


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


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Path:
        raise ImportError("Needs PIL:\n`pip install pillow`, and timm:\n`pip install timm`. Then")

    monkeypatch.setattr(matrix, "tiny_folder", missing)
    cells = matrix.family_cells("gemma3n", ["last_layers"])
    assert cells == {"last_layers": "refused: it needs pillow and timm, not installed here"}


@pytest.mark.parametrize(
    ("model_type", "cell"),
    [("gemma4_assistant", "refused: .*drafts"), ("llama", r"crash: .*\(no such layer\)")],
)
def test_a_type_that_cannot_be_built_is_refused_or_a_crash(
    model_type: str, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unbuilt(*_: object) -> Path:
        raise ValueError("no such layer")

    monkeypatch.setattr(matrix, "tiny_folder", unbuilt)
    (found,) = matrix.family_cells(model_type, ["last_layers"]).values()
    assert re.match(cell, found), found


def test_what_is_worse() -> None:
    old = {"a": {"x": "exact", "y": "refused: why"}, "b": {"x": "runs"}}
    new = {"a": {"x": "runs", "y": "exact"}, "b": {"x": "crash: no"}, "c": {"x": "crash: new"}}
    assert matrix.worse(old, new) == ["a x: exact -> runs", "b x: runs -> crash: no"]
