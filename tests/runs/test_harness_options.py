"""Whole comparisons with options of the harness for single tasks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.run import compare_request

pytestmark = pytest.mark.usefixtures("warm")

TEMPLATE = "{% for m in messages %}<NAME {{ m['role'] }}>{{ m['content'] }}{% endfor %}"

GENERATES = """
task: says
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["w1"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def _samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_tasks_are_asked_with_their_own_options(
    make: Callable[..., Request], tasks: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    named = [
        {"name": name, "template": TEMPLATE.replace("NAME", name)} for name in ("default", "short")
    ]
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    other = tmp_path / "other"
    other.mkdir()
    file = str(tasks / "words.jsonl")
    (other / "says.yaml").write_text(GENERATES.replace("FILE", file), encoding="utf-8")
    says = {
        "task": "says", "limit": 2, "apply_chat_template": "short", "system_instruction": "Do.",
        "gen_kwargs": {"max_gen_toks": 2},
    }  # fmt: skip
    request = make(
        model=str(model), recipes=["last_layers"], include_path=[str(tasks), str(other)],
        tasks=[{"task": "words", "samples": [6, 2]}, says], title="Options",
    )  # fmt: skip
    result = compare_request(request, tmp_path / "run", progress=False)
    assert (result.exit_code, dict(result.failures), list(result.ignored_options)) == (0, {}, [])
    for row in ("dense", "last_layers"):
        folder = tmp_path / "run" / row
        chosen = {each["doc_id"]: each["doc"]["question"] for each in _samples(folder, "words")}
        assert chosen == {2: "w2 w3", 6: "w6 w7"}
        first, second = _samples(folder, "says")
        context, settings = first["arguments"]["gen_args_0"].values()
        assert context == "<short system>Do.<short user>w0 w1"
        assert settings == {"until": ["w1"], "max_gen_toks": 2}
        assert second["doc_id"] == 1
    again = compare_request(request, tmp_path / "run", progress=False)
    assert set(again.jobs.values()) == {"kept"}
    board = json.loads((tmp_path / "run" / "leaderboard.json").read_text(encoding="utf-8"))
    (row,) = [row for row in board["rows"] if row["label"] == "last_layers"]
    assert {task["task"]: task["n"] for task in row["tasks"]} == {"words": 2, "says": 2}
