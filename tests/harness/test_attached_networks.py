"""Checkpoints of the ``streamline`` model type are scored like any other model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from streamline_bench.compression import compress, load_recipe
from streamline_bench.harness.lm import StreamlineLM


@pytest.fixture(scope="module")
def compressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attached")
    text = folder / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{(i * j) % 96}" for j in range(30)) for i in range(40)))
    changes = {
        "replacement": "swiglu_res",
        "n_layers": 2,
        "calibration": str(text),
        "sequence_length": 16,
        "training.min_steps": 4,
    }
    return compress(tiny_llama, load_recipe("streamline", changes), folder / "out", progress=False)


def _by_hand(model: Any, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    rows = range(len(context) - 1, ids.shape[1] - 1)
    return float(sum(logprobs[i, t] for i, t in zip(rows, continuation, strict=True)))


def test_loglikelihoods_equal_one_plain_forward_each(compressed: Path) -> None:
    lm = StreamlineLM(str(compressed), device="cpu", dtype="float32")
    assert type(lm.model.config).model_type == "streamline"
    contexts = ["w1 w2 w3", "w9 w8 w7 w6 w5"]
    choices = [" w4", " w11 w12", " w13 w14 w15"]
    pairs = [(context, choice) for context in contexts for choice in choices]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    for (context, choice), (score, _) in zip(pairs, answers, strict=True):
        expected = _by_hand(lm.model, lm.tok_encode(context), lm.tok_encode(choice.strip()))
        assert score == pytest.approx(expected, abs=1e-4)


def test_generation_equals_repeated_full_forwards(compressed: Path) -> None:
    lm = StreamlineLM(str(compressed), device="cpu", dtype="float32")
    options = {"until": ["never"], "max_gen_toks": 6, "do_sample": False}
    (text,) = lm.generate_until([Instance("generate_until", {}, ("w1 w2 w3", options), 0)])
    ids = lm.tok_encode("w1 w2 w3")
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == lm.eot_token_id:
            break
    assert text.strip() == lm.tok_decode(ids[3:], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "name", ["streamline_ffn", "slicegpt", "llm_pruner", "attention_drop", "flap"]
)
def test_layers_on_the_disk_are_scored_as_those_in_memory(
    name: str, recipe_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = recipe_checkpoint(name)
    pairs = [("w1 w2", " w3"), ("w1 w2", " w4 w5")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    resident = StreamlineLM(str(folder), device="cpu", dtype="float32")
    depth = len(resident.model.model.layers)
    places = {f"model.layers.{i}": ("disk", "cpu")[i % 2] for i in range(depth)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    spread = StreamlineLM(
        str(folder), device="cpu", dtype="float32", parallelize=True, device_map=places | rest,
        offload_folder=str(tmp_path),
    )  # fmt: skip
    assert spread.model.hf_device_map["model.layers.0"] == "disk"
    assert spread.loglikelihood(asked) == resident.loglikelihood(asked)
