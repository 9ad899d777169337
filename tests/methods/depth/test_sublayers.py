"""sublayer_drop and block_pruner: scores, choices and losses by brute force; sizes; resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import Manifest, read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import ArchitectureError, SparsityError
from streamline_bench.harness.trunk.stack import legs_of, read_stack
from streamline_bench.methods.base import Compression
from streamline_bench.methods.depth import sublayers
from streamline_bench.modeling import register
from streamline_bench.modeling.loading import SourceModel
from streamline_bench.throughput.footprint import footprint

register()
Sublayer = tuple[int, str]


@pytest.fixture(scope="module")
def folder(make_tiny_model: Callable[..., Path]) -> Path:
    return make_tiny_model("llama", initializer_range=0.2, seed=7, num_hidden_layers=5)


def made(folder: Path, recipe: Any, output: Path) -> tuple[Path, Manifest]:
    out = compress(folder, recipe, output, progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    return out, manifest


def counted(make_recipe: Callable[..., Any], name: str, number: int, **changes: Any) -> Any:
    return make_recipe(name, sparsity=None, **{"parameters.sublayers": number}, **changes)


def order_of(manifest: Manifest) -> list[Sublayer]:
    return [(layer, kind) for layer, kind in manifest.chosen["order"]]


def silent(folder: Path, removed: list[Sublayer]) -> Any:
    """Return the dense model with sub-layers that give zeros."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for layer, kind in removed:
        name = {"attention": "self_attn", "mlp": "mlp"}[kind]
        getattr(model.model.layers[layer], name).register_forward_hook(
            lambda module, args, output: (
                (torch.zeros_like(output[0]), None)
                if isinstance(output, tuple)
                else torch.zeros_like(output)
            )
        )
    return model


def same_logits(out: Path, folder: Path, removed: list[Sublayer]) -> bool:
    ids = torch.tensor([[1, 5, 9, 40, 22, 7]])
    written, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return torch.equal(written.eval()(ids).logits, silent(folder, removed)(ids).logits)


def cosines(folder: Path, ids: torch.Tensor) -> dict[Sublayer, float]:
    """Token by token in float64, from the outputs of attention and MLP."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    seen: dict[Sublayer, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    inputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):

        def attention(module: Any, args: Any, output: Any, index: int = index) -> None:
            before = inputs[index]
            inputs[index] = before + output[0]
            seen.setdefault((index, "attention"), []).append((before, inputs[index]))

        def mlp(module: Any, args: Any, output: Any, index: int = index) -> None:
            seen.setdefault((index, "mlp"), []).append((inputs[index], inputs[index] + output))

        layer.register_forward_pre_hook(
            lambda module, args, index=index: inputs.__setitem__(index, args[0])
        )
        layer.self_attn.register_forward_hook(attention)
        layer.mlp.register_forward_hook(mlp)
    with torch.no_grad():
        for row in ids:
            model(row[None])
    return {
        each: sum(
            float(one[0, t] @ other[0, t] / one[0, t].norm() / other[0, t].norm())
            for one, other in pairs
            for t in range(one.shape[1])
        )
        / ids.numel()
        for each, pairs in seen.items()
    }


def test_joint_drop_takes_the_highest_cosines(
    folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("joint_drop", sparsity=0.3)
    ids = Compression(SourceModel(folder), recipe, tmp_path).tokens(recipe.calibration).input_ids
    expected = cosines(folder, ids)
    out, manifest = made(folder, recipe, tmp_path / "out")
    scores = {(int(i), k): v for k, of in manifest.chosen["scores"].items() for i, v in of.items()}
    assert scores == {each: pytest.approx(value, abs=1e-5) for each, value in expected.items()}
    ranking = sorted(expected, key=lambda each: -expected[each])
    order = order_of(manifest)
    assert order == ranking[: len(order)]
    assert same_logits(out, folder, order)

    total = CheckpointReader(folder).num_parameters
    sizes = {"attention": 3072 + 32, "mlp": 3 * 32 * 48 + 32}  # with their norms
    shares = [sum(sizes[kind] for _, kind in ranking[:n]) / total for n in range(len(ranking))]
    assert len(order) == min(range(len(shares)), key=lambda n: abs(shares[n] - 0.3))
    assert manifest.sparsity_reached == pytest.approx(shares[len(order)])
    assert manifest.chosen["size"]["reached"] == pytest.approx(shares[len(order)])

    # No keys and values are cached for the attentions that went, and models share what they can.
    attentions = sum(kind == "attention" for _, kind in order)
    each = footprint(folder).kv_values_per_token // 5  # type: ignore[operator]
    assert footprint(out).kv_values_per_token == (5 - attentions) * each
    lowest = min(layer for layer, _ in order)
    stacks = {"dense": read_stack(folder), "pruned": read_stack(out)}
    assert legs_of(["dense", "pruned"], stacks)[1].start == lowest


def test_attention_goes_from_a_mixture_that_gives_its_routing(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_tiny_model(
        "gpt_oss", num_hidden_layers=3, num_local_experts=2, num_experts_per_tok=1, head_dim=8
    )
    recipe = counted(make_recipe, "attention_drop", 1, **{"parameters.drop": "attention"})
    out, manifest = made(source, recipe, tmp_path / "out")
    assert same_logits(out, source, order_of(manifest))


def test_a_layer_that_loses_both_is_dropped(
    folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    out, manifest = made(folder, counted(make_recipe, "joint_drop", 8), tmp_path / "out")
    order = order_of(manifest)
    whole = {layer for layer, _ in order if {(layer, "attention"), (layer, "mlp")} <= set(order)}
    assert len(order) == 8 and manifest.chosen["removed_layers"] == sorted(whole)
    assert manifest.layers_after == 5 - len(whole) == CheckpointReader(out).depth
    assert same_logits(out, folder, order)


def without_model(folder: Path, removed: list[Sublayer], ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(silent(folder, removed)(ids, labels=ids).loss)


def test_block_pruner_searches_and_goes_on(
    folder: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = counted(make_recipe, "block_pruner", 3)
    ids = Compression(SourceModel(folder), recipe, tmp_path).tokens(recipe.calibration).input_ids
    removed: list[Sublayer] = []
    reached = []
    for _ in range(3):
        losses = {
            (layer, kind): without_model(folder, [*removed, (layer, kind)], ids)
            for layer in range(5)
            for kind in ("attention", "mlp")
            if (layer, kind) not in removed
        }
        removed.append(min(losses, key=losses.__getitem__))
        reached.append(losses[removed[-1]])

    calls: list[int] = []
    search = sublayers.skip_losses

    def interrupted(*given: Any, removed: Any, **rest: Any) -> Any:
        calls.append(len(removed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(*given, removed=removed, **rest)

    monkeypatch.setattr(sublayers, "skip_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(folder, recipe, tmp_path / "out")
    out, manifest = made(folder, recipe, tmp_path / "out")
    assert calls == [0, 1, 2, 2]
    assert order_of(manifest) == removed
    assert manifest.chosen["loss_after_step"] == pytest.approx(reached, rel=1e-5)
    assert same_logits(out, folder, removed)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "streamline"


def test_sizes_out_of_reach_name_what_is_possible(
    folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(SparsityError, match=r"0\.\d+ to 0\.\d+"):
        made(folder, make_recipe("attention_drop", sparsity=0.6), tmp_path / "out")
    with pytest.raises(SparsityError, match="from 1 to 4"):  # one counts the cache's tokens
        made(folder, counted(make_recipe, "attention_drop", 5), tmp_path / "out")


def test_other_families_are_refused_by_name(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_tiny_model("phi", num_key_value_heads=4)
    with pytest.raises(ArchitectureError, match=r"'phi'.*whole layers"):
        made(source, make_recipe("joint_drop", sparsity=0.3), tmp_path / "out")
