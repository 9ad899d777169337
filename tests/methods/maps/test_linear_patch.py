"""LinearPatch: magnitudes match across the cut in the rotated basis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard as sylvester
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import load_calibration
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.maps.linear_patch import hadamard
from streamline_bench.modeling import register


def _load(folder: Path) -> Any:
    register()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def _tokens(folder: Path, recipe: Any) -> Any:
    tokens = load_calibration(
        recipe.calibration, AutoTokenizer.from_pretrained(folder), progress=False
    )
    return tokens.split(0.05, recipe.seed)


def _states(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = _load(folder)(ids, output_hidden_states=True).hidden_states
    return [state.reshape(-1, state.shape[-1]) for state in found]


def test_the_patch_is_the_papers_formula(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("linear_patch", **{"parameters.start": 2})
    out = compress(tiny_llama, recipe, tmp_path / "out", dtype="float64", progress=False)
    fit, held_out = _tokens(tiny_llama, recipe)
    states = _states(tiny_llama, fit.input_ids)
    h = torch.tensor(sylvester(32)).double() / 32**0.5
    d = (states[4] @ h).abs().mean(0) / (states[2] @ h).abs().mean(0)
    p = h @ torch.diag(d) @ h.T
    probe = _states(tiny_llama, held_out.input_ids)
    reached = _states(out, held_out.input_ids)[2]
    torch.testing.assert_close(reached, probe[2] @ p, rtol=1e-5, atol=1e-7)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["removed_layers"] == [2, 3]
    assert manifest.chosen["scale"]["max"] == pytest.approx(float(d.max()))
    error = manifest.chosen["boundary_mse"]
    assert error["none"] == pytest.approx(float((probe[2] - probe[4]).square().mean()))
    assert error["mapped"] == pytest.approx(float((probe[2] @ p - probe[4]).square().mean()))


def test_the_block_is_the_most_similar_one_and_the_size_counts_the_patch(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("linear_patch", calibration_samples=40)
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    recipe = make_recipe("streamline_none", calibration_samples=40)
    plain = compress(tiny_llama, recipe, tmp_path / "plain", progress=False)
    other = read_manifest(plain)
    assert other is not None
    assert manifest.chosen["removed_layers"] == other.chosen["removed_layers"]
    assert manifest.chosen["score"] == other.chosen["score"]
    assert manifest.parameters_after == other.parameters_after + 32 * 32 + 32
    assert manifest.chosen["size"]["added_parameters"] == 32 * 32 + 32
    assert CheckpointReader(out).config["attachments"] == [
        {"after_layer": manifest.chosen["start"] - 1, "kind": "linear", "intermediate_size": 32}
    ]


def test_generation_with_and_without_a_cache_agrees(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    out = compress(tiny_llama, make_recipe("linear_patch"), tmp_path / "out", progress=False)
    model = _load(out)
    ids = torch.tensor([[1, 5, 9, 40]])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    cached, plain = (
        model.generate(ids, attention_mask=mask, use_cache=use, **settings) for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_a_block_at_layer_0_puts_the_patch_before_the_model(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("linear_patch", **{"parameters.start": 0})
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert any(name.startswith("model.layers.0.prelude.") for name in CheckpointReader(out).names)
    assert _states(out, torch.tensor([[1, 5, 9]]))[-1].isfinite().all()


def test_families_that_replaceme_refuses_take_a_patch(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_tiny_model("gemma2", head_dim=8)
    out = compress(source, make_recipe("linear_patch"), tmp_path / "out", progress=False)
    assert _states(out, torch.tensor([[1, 5, 9]]))[-1].isfinite().all()


def test_a_width_without_a_hadamard_matrix_is_refused(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_tiny_model(hidden_size=100, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(ArchitectureError, match=r"\b100\b.*ridge_map"):
        compress(source, make_recipe("linear_patch"), tmp_path / "out", progress=False)


ORDERS = [1, 2, 4, 12, 20, 24, 28, 32, 36, 40, 44, 60, 64, 76, 84, 104, 180, 288, 448, 1600]


@pytest.mark.parametrize("order", ORDERS)
def test_entries_and_orthogonality(order: int) -> None:
    h = hadamard(order)
    assert h.shape == (order, order)
    assert h.abs().allclose(torch.full_like(h, order**-0.5), rtol=1e-14)
    torch.testing.assert_close(h @ h.T, torch.eye(order).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [3, 6, 30, 100])
def test_orders_without_a_construction_are_refused(order: int) -> None:
    with pytest.raises(ArchitectureError, match=f"order {order} .*ridge_map"):
        hadamard(order)
