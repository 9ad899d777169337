"""Which checkpoint is loaded for given model arguments: computed in the dtype that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from streamline_bench.compression import load_recipe
from streamline_bench.compression.pipeline import content_key
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import RecipeError
from streamline_bench.harness.arguments import parameters_of, sort_arguments
from streamline_bench.harness.preparation import PreparedModel, prepare
from streamline_bench.modeling.loading import SourceModel


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{(7 * i) % 96}" for i in range(4000)))
    return str(path)


def _prepared(model: Path, text: str, **options: Any) -> PreparedModel:
    recipe = {"recipe": "streamline_none", "n_layers": 2, "calibration": text}
    given = {"pretrained": str(model), "sequence_length": 32, "device": "cpu", **recipe, **options}
    return prepare(sort_arguments(given, parameters_of(HFLM)))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "auto"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_a_recipe_is_carried_out_in_the_dtype_asked_for(
    tiny_llama: Path, text: str, options: dict[str, Any], dtype: str
) -> None:
    overrides = {"n_layers": 2, "calibration": text, "sequence_length": 32}
    key = content_key(
        SourceModel(tiny_llama), load_recipe("streamline_none", overrides), dtype=dtype
    )
    made = _prepared(tiny_llama, text, **options)
    assert made.key == key
    # Weights that are copied stay as they are stored, whatever the scan computed in.
    reader = CheckpointReader(Path(made.pretrained))
    assert {reader.entry(name).dtype for name in reader.names} == {"F32"}


def test_a_placement_is_that_of_the_compression(tiny_llama: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"placement 'stramed'.*streamed"):
        _prepared(tiny_llama, text, placement="stramed")


def test_a_dtype_that_there_is_not_is_refused(tiny_llama: Path, text: str) -> None:
    with pytest.raises(RecipeError, match=r"'floaty'.*dtype"):
        _prepared(tiny_llama, text, dtype="floaty")
