"""Minitron against loops over hooked activations in float64, and against models with dead units."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from streamline_bench.compression import compress
from streamline_bench.core.architecture import decoder_layers
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import ArchitectureError, NumericsError, SparsityError
from streamline_bench.methods.base import Compression
from streamline_bench.methods.width.minitron import Magnitude, importance
from streamline_bench.methods.width.minitron_sizes import (
    MinitronParameters,
    plan_sizes,
    widths_of,
)
from streamline_bench.methods.width.narrowing import UNITS_FILE
from streamline_bench.methods.width.stream_width import NarrowShapes, stream_axes
from streamline_bench.methods.width.width_plan import prunable
from streamline_bench.modeling import LayerWidths
from streamline_bench.modeling.loading import SourceModel

IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])
ALL = {"axes": ["stream", "heads", "channels"], "stream_multiple": 4, "channel_multiple": 4}


def loaded(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=dtype
    )
    assert not any(report.values()), report
    return model.eval()


def test_the_published_model_of_llama_3_1() -> None:
    """nvidia/Llama-3.1-Minitron-4B-Width-Base: 3072 channels, 32 heads of 128, 9216 of the MLP."""
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    shapes, options = NarrowShapes(config), MinitronParameters()
    layer = 2 * 3072 * 4096 + 2 * 3072 * 1024 + 3 * 3072 * 9216 + 2 * 3072
    published = 2 * 128256 * 3072 + 32 * layer + 3072
    assert shapes.parameters(3072, LayerWidths(32, 8, 9216)) == published == 4_512_746_496
    sizes, plan = plan_sizes(shapes, prunable(config), options, 1 - published / 8_030_261_248)
    assert plan.reached == pytest.approx(plan.requested, abs=2e-4)
    assert sizes.head_units == 0 and sizes.hidden % 8 == sizes.channels % 8 == 0
    assert sizes.hidden / 4096 == pytest.approx(sizes.channels / 14336, abs=0.005)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
        ("phi3", {}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_without_channels_and_heads_that_are_always_zero_the_logits_are_the_same(
    family: str,
    changes: dict[str, Any],
    wide: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = wide(family, num_hidden_layers=3, rms_norm_eps=1e-12, **changes)
    parameters = {**ALL, "head_unit": "kv_group"}
    config = AutoConfig.from_pretrained(folder)
    units, options = prunable(config, "kv_group"), MinitronParameters(**parameters)
    goal, _ = plan_sizes(NarrowShapes(config), units, options, 0.4)
    widths = widths_of(units, goal)
    lost = 0 if family == "qwen3" else 1
    assert goal.hidden < 32 and widths.num_key_value_heads == 2 - lost
    model = loaded(folder)
    draw = torch.Generator().manual_seed(1)
    stream = torch.randperm(32, generator=draw)[goal.hidden :].sort().values
    channels = torch.randperm(48, generator=draw)[goal.channels :].sort().values
    size = getattr(config, "head_dim", None) or 8
    with torch.no_grad():
        model.model.embed_tokens.weight[:, stream] = 0
        for layer in decoder_layers(model):
            attention, mlp = layer.self_attn, layer.mlp
            for name, parameter in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                    parameter.index_fill_(-2, stream, 0)
            if family == "phi3":  # 4 queries, 2 keys and 2 values of 8; gates, then the rest
                attention.qkv_proj.weight[6 * size : 7 * size] = 0
                mlp.gate_up_proj.weight[48 + channels] = 0
            elif lost:
                attention.v_proj.weight[:size] = 0
            if family in ("llama", "qwen3"):
                mlp.up_proj.weight[channels] = 0
    model.float().save_pretrained(folder)
    recipe = make_recipe(
        "minitron", calibration_samples=6, sparsity=0.4,
        **{f"parameters.{key}": value for key, value in parameters.items()},
    )  # fmt: skip
    out = compress(folder, recipe, tmp_path / "out", progress=False)
    removed = json.loads((out / UNITS_FILE).read_text())
    assert removed.pop("stream") == stream.tolist()
    gone = [] if family == "mixtral" else channels.tolist()
    assert all(each["channels"] == gone for each in removed.values())
    assert all(each["key_value_heads"] == [0] * lost for each in removed.values())
    dense, pruned = (loaded(each, torch.float32) for each in (folder, out))
    manifest = read_manifest(out)
    assert manifest is not None
    assert sum(p.numel() for p in pruned.parameters()) == manifest.parameters_after
    assert pruned.config.model_type in (family, "mistral")
    assert pruned.config.hidden_size == goal.hidden
    # Norms divide by the root of the mean over what is left, as those of the reference do.
    with torch.no_grad():
        for name, parameter in pruned.named_parameters():
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                parameter *= (32 / goal.hidden) ** 0.5
        torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sequence", "batch"), [("mean", "l2"), ("l2", "mean")])
def test_scores_equal_a_loop_in_float64(
    sequence: Any,
    batch: Any,
    wide: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = wide("llama", num_hidden_layers=3)
    model = loaded(folder)
    work = Compression(SourceModel(folder), make_recipe("minitron", sparsity=0.3), tmp_path)
    work.__dict__["model"] = model
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    tokens = CalibrationTokens(IDS, mask, "test", 13, "")
    options = MinitronParameters(sequence=sequence, batch=batch, batch_size=2, **ALL)
    found = importance(work, range(3), LayerWidths(4, 2, 48), options, tokens)
    rows: dict[tuple[int, str], list[Any]] = defaultdict(list)
    paths = ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj")
    for index, layer in enumerate(decoder_layers(model)):
        for path in paths:

            def hook(m: Any, args: Any, out: Any, key: tuple[int, str] = (index, path)) -> None:
                rows[key].append((out if "norm" in key[1] else args[0])[0].tolist())

            layer.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        model(IDS[:1])
        model(IDS[1:, :5])

    def size(layer: int, path: str, column: int) -> float:
        sizes = []
        for lines in rows[layer, path]:
            values = [abs(line[column]) for line in lines]
            squares = sum(v * v for v in values) ** 0.5
            sizes.append(sum(values) / len(values) if sequence == "mean" else squares)
        return sum(s * s for s in sizes) ** 0.5 if batch == "l2" else sum(sizes) / len(sizes)

    assert found.stream is not None
    for column in range(32):
        expected = sum(size(layer, path, column) for layer in range(3) for path in paths[:2])
        assert float(found.stream[column]) == pytest.approx(expected, rel=1e-9)
    for layer, units in found.units.items():
        for head in range(4):
            columns = [size(layer, paths[2], 8 * head + i) for i in range(8)]
            expected = sum(c * c for c in columns) ** 0.5
            assert float(units.query[head]) == pytest.approx(expected, rel=1e-9)
        expected_channels = [size(layer, paths[3], channel) for channel in range(48)]
        assert units.channel.tolist() == pytest.approx(expected_channels, rel=1e-9)


@pytest.mark.parametrize(("axis", "sizes"), [("stream", (24, 16)), ("channels", (36, 24))])
def test_a_second_look_is_at_what_the_first_left(
    axis: str,
    sizes: tuple[int, int],
    wide: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = wide("llama", num_hidden_layers=3)
    shapes = NarrowShapes(AutoConfig.from_pretrained(folder))
    totals = [shapes.parameters(32, shapes.widths)]
    for size in sizes:
        narrow = shapes.widths if axis == "stream" else LayerWidths(4, 2, size)
        totals.append(shapes.parameters(size if axis == "stream" else 32, narrow))

    def made(source: Path, name: str, sparsity: float, iterations: int = 1) -> Path:
        parameters = {**ALL, "axes": axis, "iterations": iterations}
        recipe = make_recipe(
            "minitron", calibration_samples=6, sparsity=sparsity,
            **{f"parameters.{key}": value for key, value in parameters.items()},
        )  # fmt: skip
        return compress(source, recipe, tmp_path / name, progress=False)

    at_once = CheckpointReader(made(folder, "at-once", 1 - totals[2] / totals[0]))
    twice = CheckpointReader(made(folder, "twice", 1 - totals[2] / totals[0], 2))
    first = made(folder, "first", 1 - totals[1] / totals[0])
    (first / "streamline.json").unlink()  # which would have it refused as compressed already
    by_hand = CheckpointReader(made(first, "second", 1 - totals[2] / totals[1]))
    assert set(twice.names) == set(by_hand.names)
    assert all(torch.equal(twice.tensor(name), by_hand.tensor(name)) for name in twice.names)
    assert not all(torch.equal(twice.tensor(name), at_once.tensor(name)) for name in twice.names)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "hidden size"),
        ("gpt2", {"n_inner": 48}, "follow"),
        ("gemma2", {"head_dim": 8}, "embed_scale' follows from the hidden size"),
    ],
)
def test_a_stream_that_other_parts_follow_from_is_left_alone(
    family: str,
    changes: dict[str, Any],
    reason: str,
    wide: Callable[..., Path],
    make_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = wide(family, num_hidden_layers=3, num_key_value_heads=4, **changes)
    with pytest.raises(ArchitectureError, match=reason) as refused:
        stream_axes(AutoConfig.from_pretrained(folder))
    assert "parameters.axes=[heads,channels]" in str(refused.value)
    if family == "gemma2":
        axes = {"parameters.axes": "channels", "parameters.channel_multiple": 4}
        recipe = make_recipe("minitron", calibration_samples=4, sparsity=0.2, **axes)
        pruned = loaded(compress(folder, recipe, tmp_path / "out", progress=False))
        assert pruned.config.hidden_size == 32 and pruned.config.intermediate_size < 48


def test_what_cannot_be_reached_or_scored_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    shapes, units = NarrowShapes(config), prunable(config, "q_within")
    with pytest.raises(SparsityError, match=r"0\.95 is out of reach: .*channels reaches .* to 0\."):
        plan_sizes(shapes, units, MinitronParameters(axes=["channels"]), 0.95)
    with pytest.raises(SparsityError, match=r"1\.5 is not a share"):
        plan_sizes(shapes, units, MinitronParameters(), 1.5)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    fixed = prunable(AutoConfig.for_model("mixtral", num_local_experts=2, **tiny), "q_within")
    with pytest.raises(SparsityError, match="Nothing of this model"):
        plan_sizes(shapes, fixed, MinitronParameters(axes="channels"), 0.2)
    assert MinitronParameters(axes="stream,heads").axes == ("stream", "heads")
    sizes = Magnitude("mean", "l2")
    sizes.add(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(NumericsError, match=r"layer 3\b"):
        sizes.of(3)
