"""Prune&Comp: the stream that crosses a cut is multiplied by the ratio of magnitudes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.compression.cache import cache_root
from streamline_bench.compression.pipeline import content_key
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import ArchitectureError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.depth.shortgpt import ShortGPT
from streamline_bench.methods.maps import magnitude_compensation
from streamline_bench.modeling.loading import SourceModel

NO_EPSILON = {"rms_norm_eps": 1e-12, "initializer_range": 0.2}
IDS = torch.tensor([[1, 5, 9, 40, 22, 7]])


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", seed=7, tie_word_embeddings=True, **NO_EPSILON)


def _load(folder: Path) -> Any:
    # Products of grouped experts have no float64.
    mixture = "num_local_experts" in (folder / "config.json").read_text(encoding="utf-8")
    dtype = torch.float32 if mixture else torch.float64
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """States at every boundary before the final norm, ``[seq, hidden]``."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
        for layer in decoder_layers(model)
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _tokens(recipe: Recipe, folder: Path, tmp_path: Path) -> list[torch.Tensor]:
    work = Compression(SourceModel(folder), recipe, tmp_path)
    return [*work.tokens(recipe.calibration).input_ids.split(1)]


def _gap(model: Any, sequences: Sequence[torch.Tensor], start: int, stop: int) -> float:
    ratios = []
    for ids in sequences:
        states = _states(model, ids)
        ratios += [
            float(states[stop][:, channel].abs().mean() / states[start][:, channel].abs().mean())
            for channel in range(states[stop].shape[1])
        ]
    return math.fsum(ratios) / len(ratios)


def _scaled_by_hand(source: Path, removed: Sequence[int], gaps: dict[int, float]) -> Any:
    """A dense model without layers, in which the stream is multiplied behind each gap."""
    model = _load(source)
    keep = [i for i in range(len(decoder_layers(model))) if i not in removed]
    keep_layers(model, keep)
    for last, ratio in gaps.items():
        layer = decoder_layers(model)[sum(i < last for i in keep)]
        layer.register_forward_pre_hook(lambda _, args, ratio=ratio: (args[0] * ratio, *args[1:]))
    return model


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS, use_cache=False).logits
    return found


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, **NO_EPSILON},
    "mistral": {"tie_word_embeddings": True, **NO_EPSILON},
    "granite": {"residual_multiplier": 0.7, "embedding_multiplier": 2.0, **NO_EPSILON},
    "gpt2": {"n_inner": 48, "layer_norm_epsilon": 1e-12, "initializer_range": 0.2},
    "gpt_neox": {"layer_norm_eps": 1e-12, "initializer_range": 0.2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **NO_EPSILON},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_computes_as_a_stream_that_is_multiplied_at_every_cut(
    family: str,
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The layers are 1, 2 and 4: two cuts, measured on the dense model."""
    source = make_tiny_model(family, **FAMILIES[family])
    given = {"method": "given_layers", "parameters": {"layers": [1, 2, 4]}}
    changes = {"parameters.selection": given, "parameters.iterative": False, "n_layers": 3}
    recipe = make_recipe("prune_comp", calibration_samples=3, **changes)
    dtype = "float32" if family == "mixtral" else "float64"
    out = compress(source, recipe, tmp_path / "out", dtype=dtype, progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    found = {gap["layer"]: gap["ratio"] for gap in manifest.chosen["gaps"]}
    dense, sequences = _load(source), _tokens(recipe, source, tmp_path)
    expected = {2: _gap(dense, sequences, 1, 3), 4: _gap(dense, sequences, 4, 5)}
    assert found == pytest.approx(expected, rel=1e-9 if dtype == "float64" else 1e-5)
    reference = _logits(_scaled_by_hand(source, [1, 2, 4], expected))
    torch.testing.assert_close(_logits(_load(out)), reference, rtol=1e-4, atol=1e-4)
    left = _scaled_by_hand(source, [1, 2, 4], {})
    assert (_logits(left) - reference).abs().max() > 1e-2


def test_the_papers_way_gives_the_same_function(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Embeddings and output projections before the cut, multiplied by the ratio."""
    source = make_tiny_model("llama", seed=3, **NO_EPSILON)
    given = {"method": "given_layers", "parameters": {"layers": [3, 4]}}
    changes = {"parameters.selection": given, "parameters.iterative": False}
    recipe = make_recipe("prune_comp", **changes)
    out = compress(source, recipe, tmp_path / "out", dtype="float64", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    (gap,) = manifest.chosen["gaps"]
    model = _load(source)
    keep_layers(model, [0, 1, 2, 5])
    with torch.no_grad():
        model.model.embed_tokens.weight *= gap["ratio"]
        for layer in decoder_layers(model)[:3]:
            layer.self_attn.o_proj.weight *= gap["ratio"]
            layer.mlp.down_proj.weight *= gap["ratio"]
    torch.testing.assert_close(_logits(_load(out)), _logits(model), rtol=1e-4, atol=1e-4)


def _by_hand(folder: Path, sequences: Sequence[torch.Tensor], n: int) -> list[tuple[int, float]]:
    """Remove the layer of lowest block influence n times, and scale the weights each time."""
    model, left, steps = _load(folder), list(range(6)), []
    for _ in range(n):
        influence = [0.0] * (len(left) - 1)
        for ids in sequences:
            states = _states(model, ids)
            for layer in range(len(left) - 1):
                cosine = torch.cosine_similarity(states[layer], states[layer + 1], dim=-1)
                influence[layer] += float((1 - cosine).sum())
        layer = influence.index(min(influence))
        ratio = _gap(model, sequences, layer, layer + 1)
        steps.append((left.pop(layer), ratio))
        keep_layers(model, [i for i in range(len(left) + 1) if i != layer])
        with torch.no_grad():
            for behind in decoder_layers(model)[layer:]:
                behind.self_attn.o_proj.weight /= ratio
                behind.mlp.down_proj.weight /= ratio
    return steps


@pytest.fixture(scope="module")
def iterated(
    folder: Path, make_recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    protected = {"method": "shortgpt", "parameters": {"protect_last": 1}}
    recipe = make_recipe("prune_comp", n_layers=3, **{"parameters.selection": protected})
    out = tmp_path_factory.mktemp("iterated") / "out"
    return recipe, compress(folder, recipe, out, dtype="float64", progress=False)


def test_every_step_looks_at_the_model_that_the_steps_before_left(
    folder: Path, iterated: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, out = iterated
    manifest = read_manifest(out)
    assert manifest is not None
    steps = _by_hand(folder, _tokens(recipe, folder, tmp_path), 3)
    assert manifest.chosen["order"] == [layer for layer, _ in steps]
    ratios = [gap["ratio"] for gap in manifest.chosen["gaps"]]
    assert ratios == pytest.approx([ratio for _, ratio in steps], rel=1e-5)  # float32 in files


def test_embeddings_stay_as_they_are(folder: Path, iterated: tuple[Recipe, Path]) -> None:
    name = "model.embed_tokens.weight"
    before, after = (CheckpointReader(each).tensor(name) for each in (folder, iterated[1]))
    assert torch.equal(before, after)


def test_an_interrupted_iteration_goes_on(
    folder: Path,
    iterated: tuple[Recipe, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, whole = iterated
    changed = recipe.model_copy(update={"seed": 1})  # another key: nothing of it is in the cache
    measured, calls = magnitude_compensation.gap_ratios, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return measured(*given)

    monkeypatch.setattr(magnitude_compensation, "gap_ratios", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(folder, changed, tmp_path / "out", dtype="float64", progress=False)
    key = content_key(SourceModel(folder), changed, dtype="float64")
    steps = cache_root() / "work" / key / "steps.json"
    assert len(json.loads(steps.read_text(encoding="utf-8"))) == 2
    out = compress(folder, changed, tmp_path / "out", dtype="float64", progress=False)
    assert calls == 4
    manifests = [read_manifest(each) for each in (whole, out)]
    assert manifests[0] is not None and manifests[1] is not None
    assert manifests[0].chosen == manifests[1].chosen
    assert manifests[0].files["model.safetensors"] == manifests[1].files["model.safetensors"]


def test_without_compensation_it_is_plain_iterative_removal(
    folder: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    recipe = make_recipe("prune_comp", **{"parameters.compensate": False})
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    same_as_surgery(out, folder, manifest.chosen["order"])


def test_families_with_norms_behind_their_sub_layers_are_refused(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_tiny_model("gemma2", head_dim=8)
    with pytest.raises(ArchitectureError, match=r"gemma2.*norms.*linear_patch"):
        compress(source, make_recipe("prune_comp"), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_writes_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    model, ids = copy.deepcopy(_load(folder)), torch.arange(2, 12).reshape(1, -1)
    from streamline_bench.core.data.calibration import CalibrationTokens

    tokens = CalibrationTokens.from_tensors(ids, torch.ones_like(ids))
    magnitude_compensation.require_two_writers(model, tokens)
    decoder_layers(model)[2].register_forward_hook(lambda _, args, output: output * 1.5)
    with pytest.raises(ArchitectureError, match="Layer 2"):
        magnitude_compensation.require_two_writers(model, tokens)


def test_the_key_changes_with_the_method_that_chooses(
    folder: Path, iterated: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = iterated
    manifest = read_manifest(out)
    assert manifest is not None
    assert [used["name"] for used in manifest.method["uses"]] == ["shortgpt"]
    before = content_key(SourceModel(folder), recipe)
    monkeypatch.setattr(ShortGPT, "version", 99)
    assert content_key(SourceModel(folder), recipe) != before
