"""Token divergence against scipy, one document at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.special import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamline_bench.divergence import (
    MeasuredDivergence,
    Other,
    _result,
    token_divergence,
    token_divergences,
)
from streamline_bench.errors import (
    CalibrationError,
    CheckpointError,
    ComparisonError,
    NumericsError,
    ResourceError,
)

SOURCE = np.random.default_rng(0)
TEXTS = [
    " ".join(f"w{word}" for word in SOURCE.integers(96, size=size)) for size in (12, 3, 40, 25, 1)
]


@pytest.fixture(scope="module")
def models(
    tiny_llama: Path, make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model, and the same with fewer layers and sharper distributions than random ones have."""
    folders = []
    for name, layers in (("dense", 6), ("pruned", 4)):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        model.config.layer_types = None
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def by_hand(models: tuple[Path, Path], window: int) -> dict[str, np.ndarray]:
    """Sums per document, float64, one window at a time."""
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    loaded = [AutoModelForCausalLM.from_pretrained(folder).double() for folder in models]
    sums = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        row = np.zeros(5)
        for begin in range(0, len(ids), window):
            part = ids[begin : begin + window]
            if len(part) < 2:
                continue
            with torch.no_grad():
                p, q = (
                    log_softmax(model(torch.tensor([part])).logits[0, :-1].numpy(), axis=1)
                    for model in loaded
                )
            at = np.arange(len(part) - 1), np.array(part[1:])
            row += [
                len(part) - 1,
                (np.exp(p) * (p - q)).sum(),
                (p.argmax(axis=1) == q.argmax(axis=1)).sum(),
                p[at].sum(),
                q[at].sum(),
            ]
        sums.append(row)
    table = np.array([row for row in sums if row[0]])
    return dict(zip(("tokens", "kl", "same", "dense", "pruned"), table.T, strict=True))


@pytest.mark.parametrize(("window", "batch_size"), [(2048, 1), (2048, 3), (10, 4)])
def test_values_are_those_of_float64(
    models: tuple[Path, Path], window: int, batch_size: int
) -> None:
    found = token_divergence(*models, TEXTS, window=window, batch_size=batch_size, progress=False)
    sums = by_hand(models, window)
    n = sums["tokens"].sum()
    assert found.tokens == n
    assert found.kl.value == pytest.approx(sums["kl"].sum() / n, rel=1e-4) and found.kl.value > 0.1
    assert found.same_top.value == pytest.approx(sums["same"].sum() / n)
    assert found.dense_perplexity == pytest.approx(math.exp(-sums["dense"].sum() / n), rel=1e-4)
    assert found.pruned_perplexity == pytest.approx(math.exp(-sums["pruned"].sum() / n), rel=1e-4)
    assert found.nats_per_token.value == pytest.approx(
        (sums["dense"] - sums["pruned"]).sum() / n, rel=1e-3
    )
    residual = sums["kl"] - sums["kl"].sum() / n * sums["tokens"]
    count = len(residual)
    error = math.sqrt(count / (count - 1) * np.square(residual).sum()) / n
    assert found.kl.standard_error == pytest.approx(error, rel=1e-3)
    assert found.documents == count and found.window == min(window, 128)
    tokens, kl = np.array(found.by_document).T
    assert tokens.tolist() == sums["tokens"].tolist()
    assert kl == pytest.approx(sums["kl"], rel=1e-3, abs=1e-4)


def test_a_model_against_itself(models: tuple[Path, Path]) -> None:
    found = token_divergence(models[0], models[0], TEXTS, progress=False)
    assert found.kl.value == 0.0 and found.same_top.value == 1.0
    assert found.nats_per_token.value == 0.0
    assert MeasuredDivergence.model_validate_json(found.model_dump_json()) == found


def test_one_document_is_taken_by_windows(models: tuple[Path, Path]) -> None:
    found = token_divergence(*models, TEXTS[2:3], window=10, progress=False)
    assert found.documents == 1 and found.windows > 1
    assert found.kl.method == f"Student over {found.windows} windows"
    alone = token_divergence(*models, TEXTS[:1], progress=False)
    assert alone.windows == 1 and alone.kl.low is None


def test_texts_may_be_a_stream(models: tuple[Path, Path]) -> None:
    found = token_divergence(*models, iter(TEXTS), progress=False)
    assert found == token_divergence(*models, TEXTS, progress=False)


def test_nothing_to_predict(models: tuple[Path, Path]) -> None:
    with pytest.raises(CalibrationError, match="None of the texts has two tokens"):
        token_divergence(*models, [""], progress=False)
    with pytest.raises(CalibrationError, match="A window of 1 token"):
        token_divergence(*models, TEXTS, window=1, progress=False)


def test_weights_beyond_the_free_memory_are_refused(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(folder / "model.safetensors").stat().st_size for folder in models]
    monkeypatch.setattr("streamline_bench.divergence.free_memory", lambda device: sizes[0] // 2)
    with pytest.raises(ResourceError, match=rf"{models[0]} need \S+ GB in float32.*bfloat16"):
        token_divergence(*models, TEXTS, progress=False)


def test_vocabularies_must_be_the_same(
    models: tuple[Path, Path], make_tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(ComparisonError, match=r"has 100 tokens in its vocabulary .* one 120"):
        token_divergence(models[0], make_tiny_model("llama", vocab_size=120), TEXTS, progress=False)


def test_nan_names_the_model_and_the_document(models: tuple[Path, Path], tmp_path: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(models[1])
    with torch.no_grad():
        broken.model.embed_tokens.weight[
            AutoTokenizer.from_pretrained(models[0])(TEXTS[2])["input_ids"][1]
        ] = math.nan
    broken.save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match="The pruned model's logits are not finite on document"):
        token_divergence(models[0], tmp_path, TEXTS[2:], progress=False)


def test_several_share_the_dense_pass_and_their_lower_layers(
    models: tuple[Path, Path],
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit as each by itself; one that fails, or reads other windows, leaves the others."""
    for name, layers in (("middle", [0, 1, 5]), ("broken", [0, 1])):
        model = AutoModelForCausalLM.from_pretrained(models[0])
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
        model.config.num_hidden_layers, model.config.layer_types = len(layers), None
        if name == "broken":
            model.model.norm.weight.data[0] = math.nan
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path / name)
    folders = {
        "prefix": models[1],
        "broken": tmp_path / "broken",
        "short": make_tiny_model("llama", max_position_embeddings=16),
        "middle": tmp_path / "middle",
        "absent": tmp_path / "absent",
        "wider": make_tiny_model("llama", vocab_size=120),
    }
    run = []
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: run.append(1) or forward(*a, **k))

    def compared(*names: str) -> dict[str, Any]:
        run.clear()
        others = {name: Other(folders[name]) for name in names}
        return token_divergences(
            models[0], others, lambda: TEXTS, batch_size=len(TEXTS), progress=False
        )

    together = compared("prefix", "middle")
    # Six of the dense model, none of its first four, and what is left of the third model.
    assert len(run) == 6 + 0 + 1
    together = compared(*folders)
    for name in ("prefix", "middle", "short"):
        alone = token_divergence(models[0], folders[name], TEXTS, batch_size=9, progress=False)
        assert together[name] == alone, name
    assert together["short"].window == 16 != together["prefix"].window
    kinds = {"broken": NumericsError, "absent": CheckpointError, "wider": ComparisonError}
    for name, kind in kinds.items():
        assert isinstance(together[name], kind), name


def test_intervals_stay_where_the_numbers_can_be() -> None:
    """Two documents give Student's interval with one degree of freedom: 13 errors wide."""
    rows = [(0.0, 10.0, 0.02, 9.0, -30.0, -31.0), (1.0, 10.0, 0.9, 4.0, -28.0, -33.0)]
    found = _result(list(rows), 2048, 0.95)
    assert found.kl.low == 0.0 < found.kl.value < found.kl.high
    assert (found.same_top.low, found.same_top.high) == (0.0, 1.0)
    assert found.nats_per_token.low < 0 < found.nats_per_token.high
    alike = _result([(*row[:3], 10.0, *row[4:]) for row in rows], 2048, 0.95)
    assert alike.same_top.value == alike.same_top.high == 1.0
