"""What a folder says twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from streamline_bench.modeling.loading import load_tokenizer


def test_the_chat_template_that_is_used_and_those_left_out_are_named(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages }} a")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": "{{ messages }} a"}))
    assert load_tokenizer(folder).chat_template == "{{ messages }} a"
    assert not caplog.records  # the same twice
    path.write_text(json.dumps({**settings, "chat_template": "{{ messages }} b"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "c"}))
    assert load_tokenizer(folder).chat_template == "{{ messages }} a"
    (said,) = [record.getMessage() for record in caplog.records]
    used, _, left_out = said.partition("is used")
    assert "chat_template.jinja" in used
    assert "tokenizer_config.json, chat_template.json" in left_out
