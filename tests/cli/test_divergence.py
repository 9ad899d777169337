"""``streamline-bench divergence``: two models on a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_model_does_not_diverge_from_itself(
    call: Callable, tiny_llama: Path, text_file: str
) -> None:
    ended = call("divergence", tiny_llama, tiny_llama, text_file, "--documents", 5, "--json", "-q")
    found = json.loads(ended.out)
    assert (ended.code, found["documents"]) == (0, 5)
    assert found["kl"]["value"] == pytest.approx(0.0, abs=1e-7)
    assert found["same_top"]["value"] == 1.0


def test_two_models_are_compared_as_by_hand(
    call: Callable, tiny_llama: Path, make_tiny_model: Callable[..., Path], text_file: str
) -> None:
    other = make_tiny_model("llama", num_hidden_layers=4, seed=3)
    ended = call("divergence", tiny_llama, other, text_file, "--documents", 3, "--json", "-q")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_llama, other)]
    total, count = 0.0, 0
    for text in Path(text_file).read_text(encoding="utf-8").split("\n\n")[:3]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in models)
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    found = json.loads(ended.out)
    assert found["tokens"] == count
    assert found["kl"]["value"] == pytest.approx(total / count, rel=1e-4)


def test_the_table_names_what_it_shows(call: Callable, tiny_llama: Path, text_file: str) -> None:
    ended = call("divergence", tiny_llama, tiny_llama, text_file, "--documents", 2, "-q")
    assert ended.code == 0
    assert "KL(dense || pruned)" in ended.out and "perplexity, pruned" in ended.out


@pytest.mark.parametrize("name", ["absent.txt", "table.pdf"])
def test_what_is_no_text_is_refused_before_a_model_is_loaded(
    call: Callable, tiny_llama: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("streamline_bench.divergence.load_model")
    (tmp_path / "table.pdf").write_text("a,b\n")
    ended = call("divergence", tiny_llama, tiny_llama, tmp_path / name, "-q")
    assert ended.code == 2
    assert name in ended.err and ".jsonl" in ended.err


def test_a_missing_field_is_named(call: Callable, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"story": "w1 w2"}\n')
    ended = call("divergence", tiny_llama, tiny_llama, path, "-q")
    assert ended.code == 2
    assert "--text-field" in ended.err
