"""Recipes on quantised checkpoints give what they give on the plain model that these stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from quantised_models import LOADED, make_twins
from safetensors.torch import load_file, save_file

from streamline_bench.compression import compress, load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.surgery import model_sizes
from streamline_bench.errors import ArchitectureError
from streamline_bench.modeling import register
from streamline_bench.modeling.loading import load_config, load_model


@pytest.fixture(scope="module")
def twins(make_tiny_model: Callable[..., Path]) -> Callable[[str], tuple[Path, Path]]:
    """Return a function: method -> folder of codes, and of the plain weights they stand for."""
    return cache(partial(make_twins, make_tiny_model=make_tiny_model))


def _decoded_logits(folder: Path) -> torch.Tensor:
    """Of the model that codes stand for, which test_codes compares with each specification."""
    with torch.no_grad():
        model = load_model(folder, device="cpu", dtype="bfloat16")
        logits: torch.Tensor = model.eval()(torch.arange(4, 28)[None]).logits
    return logits


def _logits(folder: Path) -> torch.Tensor:
    """Of stock transformers."""
    from transformers import AutoModelForCausalLM

    register()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.arange(4, 28)[None]).logits
    return logits


@pytest.mark.parametrize(
    ("method", "recipe", "kept"),
    [
        ("fp8", "last_layers", 2), ("fp8", "laco_rdsc", 1), ("fp8", "linear_patch", 2),
        ("fp8", "llm_pruner", 1), ("fp8", "slicegpt", 0), ("mxfp4", "replaceme_lstsq", 2),
        ("gptq", "replaceme_lstsq", 0), ("awq", "laco_rdsc", 1),
        ("bitsandbytes", "linear_patch", 2),
        ("nvfp4", "last_layers", 3), ("deepseek", "linear_patch", 2),
    ],
)  # fmt: skip
def test_a_recipe_gives_the_model_it_gives_on_plain_weights(
    twins: Callable[[str], tuple[Path, Path]], text_file: Path, tmp_path: Path, method: str,
    recipe: str, kept: int,
) -> None:  # fmt: skip
    size = {"sparsity": 0.15} if recipe in ("llm_pruner", "slicegpt") else {"n_layers": 1}
    given = {**size, "calibration": str(text_file), "sequence_length": 32,
             "calibration_samples": 16}  # fmt: skip
    results = [
        compress(folder, load_recipe(recipe, given), tmp_path / str(number), progress=False)
        for number, folder in enumerate(twins(method))
    ]
    coded, plain = results
    reader = CheckpointReader(coded)
    logits = _logits if method in LOADED or not reader.coded else _decoded_logits
    assert torch.equal(logits(coded), logits(plain))
    numbers = [read_manifest(folder) for folder in results]
    assert numbers[0] is not None and numbers[1] is not None
    assert numbers[0].parameters_after == numbers[1].parameters_after
    assert numbers[0].sparsity_reached == numbers[1].sparsity_reached
    layers = {name.split(".")[2] for name in reader.coded}
    assert len(layers) >= kept if kept else not layers
    assert ("quantization_config" in reader.config) == bool(kept)
    assert reader.num_parameters == model_sizes(load_config(coded)).total


def test_what_a_mixture_refuses_it_refuses_coded_too(
    twins: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    for folder in twins("deepseek"):
        with pytest.raises(ArchitectureError, match=r"'deepseek_v3'.*mixtures of experts"):
            compress(folder, load_recipe("slicegpt", {"sparsity": 0.15}), tmp_path / "out")


def test_layers_of_a_config_are_checked_and_extra_ones_not_counted(
    make_tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from streamline_bench.errors import CheckpointError

    folder = make_tiny_model("llama", num_hidden_layers=4)
    config = json.loads((folder / "config.json").read_text())
    recipe = load_recipe("last_layers", {"n_layers": 1})
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=6.*layer 4"):
        compress(folder, recipe, tmp_path / "out", progress=False)
    weights = load_file(folder / "model.safetensors")
    weights["mtp.fc.weight"] = torch.zeros(8, 8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    assert "layers 3 to 3 beyond the 3" in caplog.text and "mtp.fc.weight" in caplog.text
    manifest, reader = read_manifest(out), CheckpointReader(out)
    assert manifest is not None
    assert manifest.parameters_before == model_sizes(load_config(folder)).total
    assert manifest.parameters_after == model_sizes(load_config(out)).total
    assert "mtp.fc.weight" in reader.names and not any(".layers.2." in n for n in reader.names)
