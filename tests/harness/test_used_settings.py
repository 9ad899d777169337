"""What the harness used, read from its own results, and options that it did not follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.harness.used_settings import ignored_options, used_settings
from streamline_bench.runs.planning.plan import Evaluation


def _asked(**changes: Any) -> Evaluation:
    given = {"tasks": ("a", "b"), "tasks_sha256": "", "batch_size": "16", **changes}
    return Evaluation(**given)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of two tasks: ``a`` fixes its examples at 0, ``b`` was asked with 3."""
    payload = {
        "configs": {"a": {"num_fewshot": 0}, "b": {"num_fewshot": 3}},
        "n-shot": {"a": 3, "b": 3},
        "n-samples": {"a": {"original": 9, "effective": 5}, "b": {"original": 4, "effective": 4}},
        "chat_template": None,
        "system_instruction": None,
        "config": {
            "model_dtype": "torch.float32", "batch_size": "16", "device": "cpu", "limit": 5.0,
            "gen_kwargs": None, "random_seed": 0, "torch_seed": 1234,
        },
    }  # fmt: skip
    (tmp_path / "m").mkdir()
    path = tmp_path / "m" / "results_2026-01-02T00-00-00.000000.json"
    path.write_text(json.dumps(payload), encoding="utf-8")
    older = path.with_name("results_2026-01-01T00-00-00.000000.json")
    older.write_text("{}", encoding="utf-8")
    return tmp_path


def test_what_was_used_comes_from_the_results(results: Path) -> None:
    used = used_settings(results)
    assert used is not None
    assert (used.num_fewshot, used.documents) == ({"a": 0, "b": 3}, {"a": 5, "b": 4})
    assert (used.chat_template, used.dtype, used.batch_size) == (False, "float32", "16")
    assert used.seeds == {"random_seed": 0, "torch_seed": 1234}
    assert used_settings(results / "none") is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, []),
        ({"num_fewshot": 3}, ["--num-fewshot 3", "a 0"]),
        ({"limit": 4.0}, ["--limit 4", "a 5"]),
        ({"limit": 5.0}, []),
        ({"limit": 0.5}, []),
        ({"apply_chat_template": True}, ["--apply-chat-template"]),
        ({"batch_size": "8"}, ["--batch-size 8", "16"]),
        ({"batch_size": "auto"}, []),
        ({"dtype": "bfloat16"}, ["--dtype bfloat16", "float32"]),
        ({"dtype": "float"}, []),
    ],
)
def test_options_that_were_not_followed_are_named(
    results: Path, asked: dict[str, Any], words: list[str]
) -> None:
    used = used_settings(results)
    assert used is not None
    said = ignored_options(_asked(**asked), used)
    assert len(said) == bool(words)
    assert all(word in said[0] for word in words)


def test_real_results_are_read(lm_eval_outputs: Path) -> None:
    used = used_settings(lm_eval_outputs / "dense")
    assert used is not None
    assert used.documents
    assert used.device == "cpu"
    assert set(used.num_fewshot) >= set(used.documents)
