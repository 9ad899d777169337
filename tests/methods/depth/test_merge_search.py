"""LaCo's search against one that copies the model for every trial and runs it from the bottom."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import ArchitectureError, CalibrationError, NumericsError
from streamline_bench.methods.depth.merge_search import (
    LaCoRange,
    LaCoSearch,
    LayerMerger,
    MergeRange,
    SlidingSearch,
    merged_mixture,
)

DEPTH = 8
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", num_hidden_layers=DEPTH, initializer_range=0.12, seed=8)


@pytest.fixture(scope="module")
def tokens() -> CalibrationTokens:
    """Nine sequences (two batches), some padded."""
    ids = torch.randint(4, 100, (9, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(9, 10, dtype=torch.bool)
    mask[1, 6:] = mask[7, 3:] = False
    return CalibrationTokens.from_tensors(ids, mask)


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def _merged_copy(model: Any, base: int, count: int, rule: str) -> Any:
    """Copy the model and merge ``count`` layers into ``base``, by the authors' loop or the sum."""
    merged = copy.deepcopy(model)
    layers = merged.model.layers
    start = copy.deepcopy(layers[base])
    for k in range(1, count + 1):
        for name, parameter in layers[base].named_parameters():
            if name.split(".")[-2] in PROJECTIONS:
                other = layers[base + k].get_parameter(name).data
                own = parameter.data if rule == "reference" else start.get_parameter(name).data
                parameter.data = parameter.data + (other - own)
    depth = len(layers)
    keep_layers(merged, [*range(base + 1), *range(base + 1 + count, depth)])
    return merged


def _similarity(dense: Any, model: Any, tokens: CalibrationTokens) -> float:
    total = 0.0
    for row, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True):
        ids = row[mask][None]
        with torch.no_grad():
            a, b = (m(ids, output_hidden_states=True).hidden_states[-1] for m in (dense, model))
        total += torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    return total / len(tokens)


def merge_range(layers: int, lowest: int, highest: int, interval: int) -> LaCoRange:
    return LaCoRange(layers_per_merge=layers, lowest=lowest, highest=highest, interval=interval)


def _straightforward(
    dense: Any, tokens: CalibrationTokens, span: LaCoRange, rule: str, threshold: float, most: int
) -> tuple[list[tuple[int, int, float]], Any]:
    model, accepted = dense, []
    assert span.highest is not None
    base = span.highest - span.layers_per_merge
    while base >= span.lowest and DEPTH - len(model.model.layers) < most:
        depth = len(model.model.layers)
        count = min(span.layers_per_merge - 1, depth - 1 - base, most - (DEPTH - depth))
        trial = _merged_copy(model, base, count, rule)
        similarity = _similarity(dense, trial, tokens)
        if similarity > threshold:
            model = trial
            accepted.append((base, count, similarity))
            base = min(base - span.interval, depth - count - span.layers_per_merge)
        else:
            base -= 1
    return accepted, model


@pytest.mark.parametrize("rule", ["reference", "rdsc"])
@pytest.mark.parametrize(
    ("span", "threshold", "most"),
    [
        (merge_range(3, 0, DEPTH, 1), 0.5, 4),
        (merge_range(3, 0, DEPTH, 1), -1.0, 5),
        (merge_range(2, 1, DEPTH, 2), 0.3, 3),
        (merge_range(4, 0, DEPTH - 1, 1), 0.0, 6),
    ],
)
def test_equals_a_search_over_copies(
    folder: Path,
    tokens: CalibrationTokens,
    span: LaCoRange,
    threshold: float,
    most: int,
    rule: Any,
) -> None:
    model = _load(folder)
    expected, _ = _straightforward(_load(folder), tokens, span, rule, threshold, most)
    with LaCoSearch(model, tokens, span, rule) as search:
        merges = search.run(threshold, most)
    assert [(m.base, len(m.others)) for m in merges] == [(b, c) for b, c, _ in expected]
    assert [m.cosine for m in merges] == pytest.approx([s for *_, s in expected], rel=1e-9)


def test_runs_do_not_see_each_other_and_leave_the_model(
    folder: Path, tokens: CalibrationTokens
) -> None:
    model = _load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    span = merge_range(3, 0, DEPTH, 1)
    with LaCoSearch(model, tokens, span, "rdsc") as search:
        first = search.run(0.4, 4)
        trials = search.trials
        search.run(-1.0, 5)
        more = search.trials
        assert search.run(0.4, 4) == first
        assert search.trials == more
    assert 0 < trials <= more
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_states_beyond_the_memory_are_refused(folder: Path, tokens: CalibrationTokens) -> None:
    with pytest.raises(CalibrationError, match="9 calibration sequences"):
        LaCoSearch(_load(folder), tokens, merge_range(3, 0, DEPTH, 1), "rdsc", 1e-6)


def test_a_model_that_is_no_numbers_itself(folder: Path, tokens: CalibrationTokens) -> None:
    model = _load(folder)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.nan
    with (
        pytest.raises(NumericsError, match=r"NaN.*layer 2\b"),
        LaCoSearch(model, tokens, merge_range(3, 0, DEPTH, 1), "reference"),
    ):
        pass
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_a_merge_that_leaves_no_numbers(folder: Path, tokens: CalibrationTokens) -> None:
    """Weights that nothing reaches, as the gate is shut, overflow when they are added up."""
    model = _load(folder)
    for layer, value in ((5, -1e308), (6, 1e308), (7, 1e308)):
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight.data.zero_()
        mlp.down_proj.weight.data.fill_(value)
    with (
        LaCoSearch(model, tokens, merge_range(3, 0, DEPTH, 1), "rdsc") as search,
        pytest.raises(NumericsError, match=r"not finite.*layer 5\b"),
    ):
        search.run(0.5, 2)


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> Any:
    folder = make_tiny_model("qwen3", initializer_range=0.2, attention_bias=True, head_dim=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms start as ones and biases as zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
                assert "layers" in name or "norm" in name
    return model


def _layer(model: Any, index: int) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.model.layers[index].named_parameters()}


def test_reference_rule_is_the_running_sum_it_telescopes_from(model: Any) -> None:
    """The authors' loop adds ``θ_{l+k}`` minus the running ``θ_l``, k = 1 .. m."""
    before = [_layer(model, index) for index in range(6)]
    LayerMerger(model, "reference").merge(1, [2, 3, 4])
    for name, merged in _layer(model, 1).items():
        if name.endswith("proj.weight"):
            running = before[1][name].clone()
            for k in (2, 3, 4):
                running += before[k][name] - running
            assert torch.allclose(merged, running, rtol=1e-12, atol=1e-12), name
            assert torch.equal(merged, before[4][name])
        else:
            assert torch.equal(merged, before[1][name]), name


def test_rdsc_is_the_sum_of_differences(model: Any) -> None:
    before = [_layer(model, index) for index in range(6)]
    LayerMerger(model, "rdsc").merge(1, [2, 3, 4])
    for name, merged in _layer(model, 1).items():
        expected = before[1][name].clone()
        if name.endswith("proj.weight"):
            for k in (2, 3, 4):
                expected += before[k][name] - before[1][name]
        assert torch.allclose(merged, expected, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("rule", ["reference", "rdsc"])
def test_undone_without_a_trace(model: Any, rule: Any) -> None:
    before = [_layer(model, index) for index in range(6)]
    merger = LayerMerger(model, rule)
    merger.merge(3, [4, 5])
    one_merge = [_layer(model, index) for index in range(6)]
    merger.merge(1, [2, 3])
    merger.undo(1)
    for index in range(6):
        for name, tensor in _layer(model, index).items():
            assert torch.equal(tensor, one_merge[index][name])
    merger.undo()
    for index in range(6):
        for name, tensor in _layer(model, index).items():
            assert torch.equal(tensor, before[index][name])


def test_reference_rule_copies_nothing(model: Any) -> None:
    merger = LayerMerger(model, "reference")
    weights = [layer.mlp.up_proj.weight for layer in model.model.layers]
    merger.merge(1, [2, 3])
    assert weights[1].data_ptr() == weights[3].data_ptr()


def test_mixtures_follow_the_rule() -> None:
    single = [{layer: 1.0} for layer in range(6)]
    assert merged_mixture(single[1], single[2:5], "reference") == {4: 1.0}
    first = merged_mixture(single[3], single[4:6], "rdsc")
    assert first == {3: -1.0, 4: 1.0, 5: 1.0}
    nested = merged_mixture(single[1], [single[2], first], "rdsc")
    assert nested == {1: -1.0, 2: 1.0, 3: -1.0, 4: 1.0, 5: 1.0}


def test_layers_of_different_shapes_are_refused(make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[2],
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ArchitectureError, match=r"(?i)layer 2\b.*drops layers"):
        LayerMerger(model, "reference")


def _windows(
    dense: Any, tokens: CalibrationTokens, span: MergeRange, rule: str, threshold: float, most: int
) -> list[tuple[int, int, float]]:
    """The authors' loop over copies of the model; a window that reaches the range's end counts."""
    model, found = dense, []
    assert span.highest is not None
    high, low = span.highest - 1, span.highest - 2
    last, left = 0.0, most
    while left:
        fits = low >= span.lowest and high - low <= left
        if fits:
            trial = _merged_copy(model, low, high - low, rule)
            similarity = _similarity(dense, trial, tokens)
        if fits and similarity > threshold:
            low, last = low - 1, similarity
        elif low + 1 != high:
            model = _merged_copy(model, low + 1, high - low - 1, rule)
            found.append((low + 1, high - low - 1, last))
            left -= high - low - 1
            high, low = low, low - 1
        else:
            high, low = high - 1, low - 1
        if high <= span.lowest:
            break
    return found


@pytest.mark.parametrize(
    ("lowest", "highest", "threshold", "most", "rule"),
    [
        (0, DEPTH - 1, 0.6, 6, "reference"),
        (0, DEPTH - 1, 0.4, 3, "rdsc"),
        (1, DEPTH, -1.0, 6, "rdsc"),
    ],
)
def test_windows_equal_those_of_a_search_over_copies(
    folder: Path,
    tokens: CalibrationTokens,
    lowest: int,
    highest: int,
    threshold: float,
    most: int,
    rule: Any,
) -> None:
    few = CalibrationTokens.from_tensors(tokens.input_ids[:3], tokens.attention_mask[:3])
    span = MergeRange(lowest=lowest, highest=highest)
    expected = _windows(_load(folder), few, span, rule, threshold, most)
    with SlidingSearch(_load(folder), few, span, rule) as search:
        merges = search.run(threshold, most)
    assert [(m.base, len(m.others)) for m in merges] == [(b, c) for b, c, _ in expected]
    assert [m.cosine for m in merges] == pytest.approx([s for *_, s in expected], rel=1e-9)


def test_layers_that_do_nothing_are_merged_away_and_nothing_changes(
    folder: Path, tokens: CalibrationTokens
) -> None:
    model = _load(folder)
    for layer in (3, 4, 5):
        for name, parameter in model.model.layers[layer].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data.zero_()
    with SlidingSearch(model, tokens, MergeRange(highest=DEPTH - 1), "reference") as search:
        (merge,) = search.run(1 - 1e-9, 5)
    assert (merge.base, merge.others) == (3, (4, 5, 6))
    assert merge.cosine == pytest.approx(1, abs=1e-12)
