"""The ridge map: the regression's closed form, hung behind the layer before the cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import load_calibration
from streamline_bench.errors import CalibrationError, SparsityError
from streamline_bench.modeling import register


def _states(folder: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    register()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = model.eval()(ids, output_hidden_states=True).hidden_states
    return [state.reshape(-1, state.shape[-1]) for state in found]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_the_map_is_ridge_regression_towards_the_identity(
    bias: bool, ridge: float, tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {"parameters.start": 2, "parameters.bias": bias, "parameters.ridge": ridge}
    recipe = make_recipe("ridge_map", **changes)
    out = compress(tiny_llama, recipe, tmp_path / "out", dtype="float64", progress=False)
    tokens = load_calibration(
        recipe.calibration, AutoTokenizer.from_pretrained(tiny_llama), progress=False
    )
    fit, held_out = tokens.split(0.05, recipe.seed)
    states = _states(tiny_llama, fit.input_ids)
    x, delta = states[2], states[4] - states[2]
    x_mean, delta_mean = (x.mean(0), delta.mean(0)) if bias else (0 * x[0], 0 * x[0])
    x, delta = x - x_mean, delta - delta_mean
    strength = (ridge * x.square().sum() / 32).sqrt() * torch.eye(32).double()
    change = torch.linalg.lstsq(torch.cat([x, strength]), torch.cat([delta, 0 * strength])).solution
    probe = _states(tiny_llama, held_out.input_ids)
    expected = probe[2] + (probe[2] - x_mean) @ change + delta_mean
    reached = _states(out, held_out.input_ids)[2]
    torch.testing.assert_close(reached, expected, rtol=1e-5, atol=1e-7)
    manifest = read_manifest(out)
    assert manifest is not None
    error = manifest.chosen["boundary_mse"]
    assert error["none"] == pytest.approx(float((probe[2] - probe[4]).square().mean()))
    assert error["mapped"] == pytest.approx(float((expected - probe[4]).square().mean()))
    assert manifest.layers_after == 4


def test_too_few_tokens_are_refused(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("ridge_map", calibration_samples=2)
    with pytest.raises(CalibrationError, match=r"\b32\b.*\b16\b.*samples"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    with pytest.raises(CalibrationError, match="too few to set some aside"):
        recipe = make_recipe("ridge_map", calibration_samples=1)
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)


def test_a_block_outside_the_model_is_refused(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("ridge_map", **{"parameters.start": 5})
    with pytest.raises(SparsityError, match=r"layer 5\b"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)


def test_every_cut_has_a_map_of_its_own(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Layers 1 and 3, each regressed by hand on states of the dense model; the size counts both."""
    given = {"method": "given_layers", "parameters": {"layers": [1, 3]}}
    recipe = make_recipe("ridge_map", **{"parameters.selection": given})
    out = compress(tiny_llama, recipe, tmp_path / "out", dtype="float64", progress=False)
    tokens = load_calibration(
        recipe.calibration, AutoTokenizer.from_pretrained(tiny_llama), progress=False
    )
    states = _states(tiny_llama, tokens.split(0.05, recipe.seed)[0].input_ids)
    reader = CheckpointReader(out)
    for cut, layer in ((1, 0), (3, 1)):
        x, delta = states[cut], states[cut + 1] - states[cut]
        strength = (1e-6 * x.square().sum() / 32).sqrt() * torch.eye(32).double()
        change = torch.linalg.lstsq(torch.cat([x, strength]), torch.cat([delta, 0 * strength]))
        stored = reader.tensor(f"model.layers.{layer}.attachment.proj.weight").double()
        expected = (torch.eye(32) + change.solution).T
        torch.testing.assert_close(stored, expected, rtol=1e-5, atol=1e-5)
    manifest = read_manifest(out)
    assert manifest is not None
    assert [cut["layers"] for cut in manifest.chosen["cuts"]] == [[1], [3]]
    assert manifest.chosen["size"]["added_parameters"] == 2 * (32 * 32 + 32)
    before = CheckpointReader(tiny_llama).num_parameters
    assert manifest.parameters_after == before - manifest.chosen["size"]["removed"]
