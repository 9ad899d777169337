"""The streamed scan: the same numbers, one layer's weights at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamline_bench.core.architecture import architecture_of, decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.core.scan import scan, scan_streamed, streamed_model
from streamline_bench.errors import CheckpointError


@pytest.fixture(scope="session")
def tokens() -> CalibrationTokens:
    ids = torch.randint(3, 100, (4, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(11)[None, :] < torch.tensor([11, 4, 11, 8])[:, None]
    return CalibrationTokens.from_tensors(ids, mask)


def nbytes(parameters: Any) -> int:
    return sum(p.nbytes for p in parameters if not p.is_meta)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("last_state", ["raw", "postnorm"])
def test_the_same_result_as_a_scan_in_memory(
    random_model: Any, variant: str, tokens: CalibrationTokens, tmp_path: Path, last_state: Any
) -> None:
    model = random_model(variant)
    model.save_pretrained(tmp_path)
    expected = scan(model, tokens, last_state=last_state, batch_size=2, progress=False)
    found = scan_streamed(tmp_path, tokens, last_state=last_state, batch_size=2, progress=False)
    np.testing.assert_allclose(found.cosine, expected.cosine, atol=1e-7)
    np.testing.assert_allclose(found.angular, expected.angular, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_never_more_than_one_layer_is_held(
    random_model: Any, name: str, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    largest = max(nbytes(layer.parameters()) for layer in decoder_layers(model))
    streamed = streamed_model(tmp_path)
    resident = nbytes(streamed.parameters())
    peaks = []
    for module in streamed.modules():
        module.register_forward_hook(lambda *_: peaks.append(nbytes(streamed.parameters())))
    base = streamed.get_submodule(architecture_of(streamed.config).base)
    with torch.no_grad():
        base(input_ids=tokens.input_ids, use_cache=False)
    assert max(peaks) == resident + largest
    assert nbytes(streamed.parameters()) == resident
    assert nbytes(decoder_layers(streamed).parameters()) == 0
    everything = nbytes(model.get_submodule(architecture_of(model.config).base).parameters())
    assert max(peaks) < everything - 4 * largest


def test_a_layer_that_fails_is_let_go(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    streamed = streamed_model(tmp_path)

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped here")

    streamed.model.layers[2].mlp.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="stopped here"):
        streamed.model(input_ids=tokens.input_ids, use_cache=False)
    assert nbytes(decoder_layers(streamed).parameters()) == 0


def test_sharded_checkpoints(random_model: Any, tokens: CalibrationTokens, tmp_path: Path) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    expected = scan(model, tokens, progress=False)
    found = scan_streamed(tmp_path, tokens, batch_size=1, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)


def test_another_dtype_than_the_stored_one(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    full = scan(model, tokens, progress=False)
    # Not model.to(bfloat16), which rounds the rotary frequencies too.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = scan(loaded, tokens, progress=False)
    found = scan_streamed(tmp_path, tokens, batch_size=1, dtype=torch.bfloat16, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)
    assert np.abs(found.cosine - full.cosine).max() > 1e-4


def test_stored_names_without_the_base_models_prefix(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path
) -> None:
    """As GPT-2 lies on the hub: ``h.0.ln_1.weight``, not ``transformer.h.0.ln_1.weight``."""
    model = random_model("gpt2")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    expected = scan(model, tokens, progress=False)
    found = scan_streamed(tmp_path, tokens, batch_size=1, progress=False)
    np.testing.assert_array_equal(found.cosine, expected.cosine)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_missing_weights_are_named(
    random_model: Any, tokens: CalibrationTokens, tmp_path: Path, name: str
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != name})
    short = name.rpartition("model.layers.3.")[2].removeprefix("model.")
    with pytest.raises(CheckpointError, match=f"holds no weights for '{short}'"):
        scan_streamed(tmp_path, tokens, progress=False)
