"""A streamed compression gives the bytes of a resident one, and never loads the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.errors import RecipeError

EPOCHS = {"training.min_steps": 6, "training.data.samples": 24}
FEW = {"calibration.samples": 4, "parameters.bisections": 3}
STREAMED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("flap", "last_layers", "llm_pruner", "linear_patch", "magnitude_l1")),
    ("minitron", {"parameters.axes": ["stream", "heads", "channels"], "parameters.iterations": 2}),
    *((name, {}) for name in ("replaceme_lstsq", "ridge_map", "shortened_llama_ppl")),
    *((name, {}) for name in ("shortened_llama_taylor", "shortgpt", "sleb", "slicegpt", "uidl")),
    ("laco_rdsc", FEW),
    ("attention_drop", {}),
    ("block_pruner", {"calibration.samples": 4}),
    ("streamline_none", {}),
    ("streamline", {}),  # one epoch: batches in the order of the training
    ("streamline", {**EPOCHS, "training.epochs": 2}),  # states of all sequences in a file
    ("streamline", {**EPOCHS, "training.epochs": 2, "training.cache_gb": 0}),  # part by part
]
RESIDENT = ("last_layers_lora", "streamline_lm")


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name != "streamline.json" and "curve" not in path.name
    }


@pytest.mark.parametrize(("name", "changes"), STREAMED)
def test_the_same_bytes(
    name: str,
    changes: dict[str, Any],
    recipe_source: Path,
    small: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = small(name, **changes)
    options: dict[str, Any] = {"progress": False}
    own = tmp_path / "cache"  # so that the streamed one does not take the scan of this one
    resident = compress(
        recipe_source, recipe, tmp_path / "a", placement="resident", cache=own, **options
    )

    def refused(*arguments: object, **keywords: object) -> None:
        pytest.fail("the whole model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refused)
    streamed = compress(recipe_source, recipe, tmp_path / "b", placement="streamed", **options)
    assert _files(streamed) == _files(resident)
    before, after = read_manifest(resident), read_manifest(streamed)
    assert before is not None and after is not None
    assert (after.chosen, after.calibration) == (before.chosen, before.calibration)


@pytest.mark.parametrize("name", RESIDENT)
def test_what_needs_the_whole_model_is_refused_by_name(
    name: str, small: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = small(name)
    reason = "lora" if name == "last_layers_lora" else "method .streamline."
    with pytest.raises(RecipeError, match=rf"'{name}'.*streamed.*{reason}.*placement resident"):
        compress(tmp_path / "no model", recipe, tmp_path / "out", placement="streamed")


def test_an_unknown_placement(small: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"placement 'stream'.*'streamed'"):
        compress(tmp_path, small("shortgpt"), tmp_path / "out", placement="stream")  # type: ignore[arg-type]
