"""Texts that a model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.compression.pipeline import content_key
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.data.corpora import open_documents
from streamline_bench.core.data.own_texts import write_texts
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.errors import CalibrationError, RecipeError
from streamline_bench.modeling.loading import SourceModel


def test_tokens_follow_the_models_distribution(tiny_llama: Path, word_tokenizer: Any) -> None:
    """The second token's frequencies against the model's probabilities behind the first one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    spec = CalibrationSpec(source="self", samples=2000, seed=3)
    ids = write_texts(model, word_tokenizer, spec, length=2, progress=False)
    assert ids.shape == (2000, 2)
    assert set(ids[:, 0].tolist()) == {word_tokenizer.bos_token_id}
    with torch.no_grad():
        expected = model(ids[:1, :1]).logits[0, -1].softmax(-1)
    found = torch.bincount(ids[:, 1], minlength=100) / 2000
    assert float((found - expected).abs().sum()) < 0.3
    assert float((found - expected.flip(0)).abs().sum()) > 0.3


def test_the_same_seed_writes_the_same_texts(tiny_llama: Path, word_tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    one, two, other = (
        write_texts(
            model, word_tokenizer, CalibrationSpec(source="self", samples=18, seed=seed),
            length=6, progress=False,
        )
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_a_recipe_with_the_models_own_texts(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"calibration": "self", "sequence_length": 12, "calibration.tokens": 40}
    recipe = make_recipe("streamline_none", **settings)
    folders = [compress(tiny_llama, recipe, tmp_path / name, progress=False) for name in "ab"]
    manifests = [read_manifest(folder) for folder in folders]
    facts = [manifest.calibration for manifest in manifests if manifest is not None]
    assert facts[0]["source"] == "self"
    assert facts[0]["tokens"] == 40
    assert facts[0]["sha256"] == facts[1]["sha256"]
    source = SourceModel.find(tiny_llama, progress=False)
    other = make_recipe("streamline_none", **settings, **{"calibration.seed": 1})
    assert content_key(source, recipe) != content_key(source, other)


def test_what_cannot_be_written_is_refused(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("streamline_none", calibration="self", sequence_length=12)
    recipe = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"samples": None})}
    )
    with pytest.raises(CalibrationError, match=r"samples.*tokens"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    with pytest.raises(CalibrationError, match=r"self.*give a file"):
        next(open_documents(recipe.calibration, tiny_llama))
    with pytest.raises(RecipeError, match=r"own texts.*resident"):
        compress(tiny_llama, recipe, tmp_path / "out", placement="streamed", progress=False)
