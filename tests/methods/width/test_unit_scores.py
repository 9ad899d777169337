"""Scores of heads and channels against a loop over weights and the loss's own gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from streamline_bench.core.architecture import ARCHITECTURES, decoder_layers
from streamline_bench.core.data.calibration import CalibrationTokens
from streamline_bench.errors import NumericsError
from streamline_bench.methods.tools.gradient_sums import sum_gradients
from streamline_bench.methods.width.unit_scores import salience, score_units
from streamline_bench.modeling.widths import LayerWidths, projection_parts

IDS = torch.tensor([[1, 5, 9, 40, 22, 7, 63, 88], [1, 71, 3, 3, 12, 90, 31, 4]])
WIDTHS = LayerWidths(8, 4, 64)
PARTS = projection_parts(ARCHITECTURES["llama"], WIDTHS, 4)
CRITERIA = ("param_first", "param_second", "param_mix", "vectorize", "l1", "l2")


@pytest.fixture(scope="module")
def gradient_case() -> tuple[Any, CalibrationTokens]:
    """A float64 model and two sequences, one of them shorter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=4, initializer_range=0.2,
    )  # fmt: skip
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    model = LlamaForCausalLM(config).double().eval()
    return model, CalibrationTokens(IDS, mask, "test", 13, "")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_equal_a_loop_over_weights(
    criterion: Any, gradient_case: tuple[Any, CalibrationTokens]
) -> None:
    model, tokens = gradient_case
    layer = decoder_layers(model)[2]
    paths = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    weights = {(2, path): layer.get_submodule(path).weight for path in paths}
    sums = sum_gradients(model, weights, tokens, squares=True, progress=False)
    scores = score_units(
        2,
        PARTS,
        lambda path: salience(weights[2, path], criterion, sums[2, path]),
        vectorize=criterion == "vectorize",
    )
    expected = loop_scores(model, criterion, {path: weights[2, path] for path in paths})
    for kind in ("query", "key_value", "channel"):
        torch.testing.assert_close(getattr(scores, kind), expected[kind], rtol=1e-5, atol=0)
    groups = [
        expected["key_value"][j] + sum(expected["query"][h] for h in range(8) if h // 2 == j)
        for j in range(4)
    ]
    torch.testing.assert_close(scores.groups(), torch.stack(groups), rtol=1e-5, atol=0)


def loop_scores(model: Any, criterion: str, weights: dict[str, Any]) -> dict[str, Tensor]:
    """Weight by weight, with gradients from the model's own loss."""
    sequences = [IDS[:1], IDS[1:, :5]]
    each = [dict(zip(weights, gradients(model, s, weights), strict=True)) for s in sequences]
    counts = [s.shape[1] - 1 for s in sequences]

    def line(path: str, unit: slice, axis: int) -> Tensor:
        w = weights[path].detach()
        g = sum(c * e[path] for c, e in zip(counts, each, strict=True)) / sum(counts)
        squared = sum(e[path] ** 2 for e in each) / len(each)
        counted = {
            "param_first": w * g, "param_second": w * squared * w,
            "param_mix": w * g - 0.5 * w * squared * w, "vectorize": w * g, "l1": w, "l2": w * w,
        }[criterion]  # fmt: skip
        own = (counted if axis == 0 else counted.T)[unit]
        if criterion == "vectorize":
            return torch.stack([row.sum().abs() for row in own]).sum()
        return own.abs().sum()

    def unit_sum(places: list[tuple[str, int]], count: int, size: int) -> Tensor:
        return torch.stack(
            [
                sum(
                    (line(p, slice(i * size, (i + 1) * size), axis) for p, axis in places),
                    torch.tensor(0.0, dtype=torch.float64),
                )
                for i in range(count)
            ]
        )

    attention = "self_attn."
    return {
        "query": unit_sum([(attention + "q_proj", 0), (attention + "o_proj", 1)], 8, 4),
        "key_value": unit_sum([(attention + "k_proj", 0), (attention + "v_proj", 0)], 4, 4),
        "channel": unit_sum(
            [("mlp.gate_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)], 64, 1
        ),
    }


def gradients(model: Any, ids: Tensor, weights: dict[str, Any]) -> Any:
    logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, list(weights.values()))


def test_fused_projections_score_like_separate_ones() -> None:
    torch.manual_seed(0)
    separate = {name: torch.randn(size, 32) for name, size in {"q": 32, "k": 16, "v": 16}.items()}
    gate, up, output, down = (torch.randn(*s) for s in ((64, 32), (64, 32), (32, 32), (32, 64)))
    fused = {
        "self_attn.qkv_proj": torch.cat(list(separate.values())),
        "mlp.gate_up_proj": torch.cat([gate, up]),
        "self_attn.o_proj": output,
        "mlp.down_proj": down,
    }
    parts = projection_parts(ARCHITECTURES["phi3"], WIDTHS, 4)
    of_fused = score_units(0, parts, fused.__getitem__)
    plain = {f"self_attn.{k}_proj": v for k, v in {**separate, "o": output}.items()}
    plain |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}
    of_plain = score_units(0, PARTS, plain.__getitem__)
    for kind in ("query", "key_value", "channel"):
        torch.testing.assert_close(getattr(of_fused, kind), getattr(of_plain, kind))


def test_scores_that_are_not_finite_name_the_layer() -> None:
    values = {part.module: torch.ones(64, 64) for part in PARTS}
    values["mlp.down_proj"][0, 0] = float("nan")
    with pytest.raises(NumericsError, match="channel score of layer 3 is NaN or infinite"):
        score_units(3, PARTS, values.__getitem__)
