"""shortened_llama_ppl: the order of perplexities of separately pruned models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_in_memory import keep_layers
from torch import nn
from transformers import AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import CalibrationError, NumericsError, SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.depth.shortened_llama import taylor_scores
from streamline_bench.methods.tools import gradients
from streamline_bench.modeling.loading import SourceModel


def _perplexities(work: Compression) -> list[float]:
    ids = work.tokens(work.recipe.calibration).input_ids
    found = []
    for layer in range(6):
        model = AutoModelForCausalLM.from_pretrained(work.folder).eval()
        keep_layers(model, [i for i in range(6) if i != layer])
        with torch.no_grad():
            found.append(model(ids, labels=ids).loss.exp().item())
    return found


def test_order_equals_separate_models(
    make_tiny_model: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    folder = make_tiny_model("llama", initializer_range=0.2, seed=6)
    recipe = make_recipe("shortened_llama_ppl", n_layers=3)
    expected = _perplexities(Compression(SourceModel(folder), recipe, tmp_path))
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.chosen["order"] == sorted(range(6), key=expected.__getitem__)[:3]
    same_as_surgery(out, folder, manifest.chosen["removed_layers"])
    assert manifest.calibration["sequences"] == 10


def test_too_few_tokens(tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path) -> None:
    one_word = tmp_path / "one.txt"
    one_word.write_text("w1", encoding="utf-8")
    recipe = make_recipe("shortened_llama_ppl", calibration=str(one_word))
    with pytest.raises(CalibrationError, match="give more text"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_protected_layers_make_the_size_unreachable(
    tiny_llama: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe("shortened_llama_ppl", **{"parameters.protect_first": 5})
    with pytest.raises(SparsityError, match="protect_first=5"):
        compress(tiny_llama, recipe, tmp_path / "out", progress=False)


IDS = torch.randint(4, 100, (5, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS).bool()
MASK[1, 5:] = MASK[4, 2:] = False


def _in_one_piece(model: Any) -> list[float]:
    """All sequences in one padded batch, transformers' loss, pads labelled -100."""
    labels = IDS.masked_fill(~MASK, -100)
    model(IDS, attention_mask=MASK.long(), labels=labels).loss.backward()
    return [
        sum(
            (m.weight * m.weight.grad).abs().sum().item()
            for m in layer.modules()
            if isinstance(m, nn.Linear)
        )
        for layer in model.model.layers
    ]


@pytest.fixture
def model(make_tiny_model: Callable[..., Path]) -> Any:
    folder = make_tiny_model("llama", initializer_range=0.2, seed=1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_equals_gradients_in_one_piece(model: Any) -> None:
    scores = taylor_scores(model, CalibrationTokens.from_tensors(IDS, MASK), progress=False)
    assert scores == pytest.approx(_in_one_piece(model), rel=1e-6)
    assert len(set(scores)) == 6


def test_the_model_is_left_as_it_was(model: Any) -> None:
    model.train()
    model.lm_head.requires_grad_(False)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    taylor_scores(model, CalibrationTokens.from_tensors(IDS, MASK), progress=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_only_linear_weights_of_layers_get_gradients(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: set[str] = set()
    chosen: set[str] = set()
    weight = model.model.layers[0].self_attn.q_proj.weight

    def look(gradient: torch.Tensor) -> None:
        held.update(n for n, p in model.named_parameters() if p.grad is not None)

    weight.register_hook(look)
    collector = gradients._Collector
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def spied(weights: Any, squares: bool) -> Any:
        assert len(weights) == 7  # one layer's sums are held at a time
        chosen.update(names[id(weight)] for weight in weights.values())
        return collector(weights, squares)

    monkeypatch.setattr(gradients, "_Collector", spied)
    taylor_scores(model, CalibrationTokens.from_tensors(IDS, MASK), progress=False)
    assert len(chosen) == 6 * 7
    assert all(name.endswith("proj.weight") for name in chosen)
    # Added up and dropped one by one: by the time of the lowest layer those above are gone.
    assert not [name for name in held if not name.startswith("model.layers.0.")]


def test_bfloat16_gradients_add_up_in_float32(model: Any) -> None:
    """Many sequences: in bfloat16 the sum would stand still while each one adds a little."""
    ids = IDS[:1].repeat(600, 1)
    half = model.to(torch.bfloat16)
    one = taylor_scores(half, CalibrationTokens.from_tensors(IDS[:1]), progress=False)
    many = taylor_scores(half, CalibrationTokens.from_tensors(ids), progress=False)
    assert many == pytest.approx(one, rel=0.01)


def test_nan_gradients_name_the_layer(model: Any) -> None:
    weight = model.model.layers[4].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NumericsError, match=r"mlp\.up_proj.*layer 4\b.*NaN"):
        taylor_scores(model, CalibrationTokens.from_tensors(IDS, MASK), progress=False)


def test_the_lowest_go(
    tiny_llama: Path,
    make_recipe: Callable[..., Any],
    tmp_path: Path,
    same_as_surgery: Callable[..., None],
) -> None:
    recipe = make_recipe("shortened_llama_taylor", n_layers=3)
    out = compress(tiny_llama, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    scores = list(manifest.chosen["scores"].values())
    assert manifest.chosen["order"] == sorted(range(6), key=scores.__getitem__)[:3]
    same_as_surgery(out, tiny_llama, manifest.chosen["order"])


def test_plus_protects_the_ends(
    make_tiny_model: Callable[..., Path], make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """In proportion to the depth, so that the scores decide; the paper's numbers can be given."""
    deep = make_tiny_model("llama", num_hidden_layers=9)
    recipe = make_recipe("shortened_llama_taylor_plus", n_layers=3)
    out = compress(deep, recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    scores = list(manifest.chosen["scores"].values())
    assert manifest.chosen["order"] == sorted(range(2, 8), key=scores.__getitem__)[:3]
    assert manifest.chosen["protected"] == {"first": 2, "last": 1}
    ends = {"parameters.protect_first": 4, "parameters.protect_last": 2}
    papers = make_recipe("shortened_llama_taylor_plus", n_layers=4, **ends)
    with pytest.raises(SparsityError, match=r"protect_first=4\b.*protect_last=2\b.*\b3\b"):
        compress(deep, papers, tmp_path / "none", progress=False)
