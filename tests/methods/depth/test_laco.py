"""laco, sliding_merge: the checkpoint equals merges in memory; size, threshold and bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from surgery_in_memory import keep_layers
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.errors import SparsityError
from streamline_bench.methods.base import parts_of
from streamline_bench.methods.depth.laco import mixtures
from streamline_bench.methods.depth.merge_search import LayerMerger, Merge

IDS = torch.tensor([[1, 5, 9, 40, 22, 7]])


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", num_hidden_layers=8, initializer_range=0.1, seed=9)


def _chosen(folder: Path) -> Any:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.chosen


@pytest.mark.parametrize("method", ["laco", "sliding_merge"])
def test_as_a_selection_it_gives_the_layers_that_are_merged_away(
    method: str,
    folder: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    own = make_recipe(method)
    merging = compress(folder, own, tmp_path / "merged", progress=False)
    selection = {"method": method, "parameters": own.parameters}
    changes = {"selection": selection, "iterative": False, "compensate": False}
    recipe = make_recipe(
        "prune_comp", **{f"parameters.{key}": value for key, value in changes.items()}
    )
    recipe = recipe.model_copy(update={"calibration": own.calibration})
    out = compress(folder, recipe, tmp_path / "removed", progress=False)
    removed = _chosen(out)["removed_layers"]
    assert removed == _chosen(merging)["removed_layers"]
    same_as_surgery(out, folder, removed)  # merged into none
    found, merged = parts_of(recipe), parts_of(own)
    assert found is not None and merged is not None and found.selection == merged.selection
    assert (found.patch, merged.patch) == ("none", "merged layers")


@pytest.mark.parametrize("recipe_name", ["laco", "laco_rdsc"])
def test_checkpoint_equals_merges_in_memory(
    recipe_name: str, folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {"parameters.layers_per_merge": 3, "parameters.interval": 1, "n_layers": 5}
    recipe = make_recipe(recipe_name, **changes, **{"parameters.threshold": -1})
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    chosen = _chosen(out)
    merges = chosen["merges"]
    assert [len(merge["others"]) for merge in merges] == [2, 2, 1]
    assert set(merges[1]["others"]) & {merge["base"] for merge in merges}  # merged once more
    written, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    merger = LayerMerger(model, chosen["merge"])
    for merge in merges:
        merger.merge(merge["base"], merge["others"])
    keep_layers(model, [i for i in range(8) if i not in chosen["removed_layers"]])
    with torch.no_grad():
        expected, found = model(IDS).logits, written.eval()(IDS).logits
    if chosen["merge"] == "reference":
        assert torch.equal(found, expected)
    else:
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.layers_after == 3
    tensors = load_file(out / "model.safetensors").values()
    assert manifest.parameters_after == sum(tensor.numel() for tensor in tensors)


def test_windows_are_written_and_nothing_else(
    folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """Of a window, the last layer's projections and the base's norms are left."""
    recipe = make_recipe("sliding_merge", n_layers=3, **{"parameters.bisections": 6})
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    takes = {merge["base"]: merge["others"][-1] for merge in _chosen(out)["merges"]}
    removed = _chosen(out)["removed_layers"]
    assert len(removed) == 3 and 7 not in removed and 7 not in takes.values()
    for place, layer in enumerate(i for i in range(8) if i not in removed):
        for name in before:
            if name.startswith(f"model.layers.{layer}."):
                part = name.removeprefix(f"model.layers.{layer}.")
                source = takes.get(layer, layer) if part.endswith("proj.weight") else layer
                expected = before[f"model.layers.{source}.{part}"]
                assert torch.equal(after[f"model.layers.{place}.{part}"], expected), part


def test_threshold_found_is_the_highest_that_reaches_the_size(
    folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    small = {"parameters.layers_per_merge": 2, "parameters.interval": 1}
    out = compress(folder, make_recipe("laco", **small), tmp_path / "found", progress=False)
    chosen = _chosen(out)
    threshold = chosen["threshold"]
    assert -1 < threshold < 1
    assert len(chosen["removed_layers"]) == 2
    assert min(merge["cosine"] for merge in chosen["merges"]) > threshold
    given = {**small, "parameters.threshold": threshold}
    again = compress(folder, make_recipe("laco", **given), tmp_path / "given", progress=False)
    assert _chosen(again)["merges"] == chosen["merges"]
    above = {**small, "parameters.threshold": threshold + 2 / 2**12}
    with pytest.raises(SparsityError, match=r"threshold.*lower"):
        compress(folder, make_recipe("laco", **above), tmp_path / "above", progress=False)


def test_dtype_of_the_source_is_kept(
    folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(half)
    for path in folder.glob("*tokenizer*"):
        (half / path.name).write_bytes(path.read_bytes())
    out = compress(half, make_recipe("laco_rdsc"), tmp_path / "out", progress=False)
    before, after = (load_file(f / "model.safetensors") for f in (half, out))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    (merge,) = _chosen(out)["merges"]
    name = f"model.layers.{merge['base']}.mlp.up_proj.weight"
    base, *others = (
        before[f"model.layers.{i}.mlp.up_proj.weight"].double()
        for i in (merge["base"], *merge["others"])
    )
    expected = base + sum(other - base for other in others)
    assert torch.equal(after[name], expected.bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters.lowest": 4, "n_layers": 5}, "can merge away 3 layers"),
        ({"parameters.lowest": 5}, "from lowest 5 to highest 8, holds 3 layers; give at most that"),
        ({"parameters.layers_per_merge": 50}, "layers_per_merge is 50 and .* holds 8 layers"),
        ({"parameters.highest": 9}, "highest is 9 and the model has 8"),
        ({"n_layers": 8}, "Cannot remove 8 of 8"),
        ({"name": "sliding_merge", "n_layers": 7}, "can merge away 6 layers"),
        ({"name": "sliding_merge", "parameters.protect_first": 6}, "no two of 8 layers"),
    ],
)
def test_sizes_out_of_reach(
    changes: dict[str, Any],
    message: str,
    folder: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    recipe = make_recipe(**{"name": "laco", **changes})
    with pytest.raises(SparsityError, match=message):
        compress(folder, recipe, tmp_path / "out", progress=False)


def test_nested_merges_leave_one_mixture_per_layer_that_stays() -> None:
    merges = [Merge(5, (6, 7), 0.9), Merge(3, (4, 5), 0.8)]
    assert mixtures(merges, "reference") == {3: {7: 1.0}}
    rdsc = mixtures(merges, "rdsc")
    assert rdsc == {3: {3: -1.0, 4: 1.0, 5: -1.0, 6: 1.0, 7: 1.0}}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", {}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": True}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
@pytest.mark.parametrize("recipe_name", ["laco", "laco_rdsc"])
def test_other_families(
    recipe_name: str,
    family: str,
    sizes: dict[str, Any],
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Transposed, tied and per-expert weights: names in files are not those in memory."""
    source = make_tiny_model(family, initializer_range=0.1, **sizes)
    recipe = make_recipe(recipe_name, n_layers=3, **{"parameters.interval": 1})
    out = compress(source, recipe, tmp_path / "out", progress=False)
    chosen = _chosen(out)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    merger = LayerMerger(model, chosen["merge"])
    for merge in chosen["merges"]:
        merger.merge(merge["base"], merge["others"])
    keep_layers(model, [i for i in range(6) if i not in chosen["removed_layers"]])
    written, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected, found = model(IDS).logits, written.eval()(IDS).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
