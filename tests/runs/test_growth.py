"""A finished run that is asked for more does what is new, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_jobs import Marking

from streamline_bench.errors import OutputError
from streamline_bench.runs.finish import Results
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.planned import plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import read_plan
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.run import compare_request

Ask = Callable[..., list[str]]


@pytest.fixture
def ask(make: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Return a function that runs a request in one folder and returns the jobs it started."""
    monkeypatch.setattr("streamline_bench.runs.run.LocalExecutor", Marking)

    def ask_it(**changes: Any) -> list[str]:
        Marking.started.clear()
        request = make(**{"recipes": ["last_layers", "random_layers"], **changes})
        result = compare_request(request, tmp_path / "run", until="evaluate", progress=False)
        assert result.exit_code == 0
        return sorted(Marking.started)

    return ask_it


FIRST = [
    *("compress-last_layers", "compress-random_layers"),
    *("score-dense", "score-last_layers", "score-random_layers"),
]


def test_the_same_again_does_nothing(ask: Ask) -> None:
    assert ask() == FIRST
    assert ask() == []


def test_a_row_more_is_one_compression_and_one_scoring(ask: Ask) -> None:
    ask()
    rows = ["last_layers", "random_layers", "first_layers"]
    assert ask(recipes=rows) == ["compress-first_layers", "score-first_layers"]
    assert ask(recipes=rows) == []
    assert ask(recipes=["first_layers"]) == []


def test_a_task_more_is_one_scoring_of_each_row(ask: Ask) -> None:
    ask()
    tasks = ["streamline_demo_pairs", "streamline_demo_order"]
    new = ask(tasks=tasks)
    assert [name[:-9] for name in new] == [name for name in FIRST if name.startswith("score")]
    assert ask(tasks=tasks) == []
    assert ask(tasks=tasks[1:]) == []
    # A new row is asked in the same sets, so that it can share layers with the others; of what is
    # no longer asked for, it is asked nothing.
    one, other = ask(tasks=tasks, recipes=["first_layers"])[1:]
    assert (one, other[:-9]) == ("score-first_layers", "score-first_layers")
    assert len(ask(tasks=tasks[:1], recipes=["magnitude_l1"])) == 2
    assert len(ask(tasks=tasks, recipes=["magnitude_l1"])) == 1


def test_answers_to_a_task_that_is_asked_in_another_way_now_are_not_read(
    ask: Ask, tmp_path: Path
) -> None:
    pairs, order = "streamline_demo_pairs", "streamline_demo_order"
    ask(tasks=[pairs, order])
    new = ask(tasks=[pairs, {"task": order, "samples": [0, 1]}])
    assert len(new) == 3, "the first set still answers for one of its tasks"
    run = RunPaths(tmp_path / "run")
    plan = read_plan(run.root)
    assert plan is not None
    results = Results(run, plan, {})
    found = {
        (job.label, job.question != ""): results._asked_again(job)
        for row in plan.rows
        for job in plan_jobs(plan, run)
        if isinstance(job, ScoreJob) and job.label == row.label
    }
    labels = ("dense", "last_layers", "random_layers")
    assert found == {
        (label, later): [] if later else [order] for label in labels for later in (False, True)
    }


def test_sizes_and_seeds_keep_what_they_have_in_common(ask: Ask, tmp_path: Path) -> None:
    ask()
    two = ask(set={"n_layers": [2, 3]})
    assert two == [
        *("compress-last_layers-3", "compress-random_layers-3"),
        *("score-last_layers-3", "score-random_layers-3"),
    ]
    seeds = ask(set={"n_layers": [2, 3], "seed": [0, 1]})
    assert seeds == [
        *("compress-random_layers-2-seed1", "compress-random_layers-3-seed1"),
        *("score-random_layers-2-seed1", "score-random_layers-3-seed1"),
    ]
    assert ask() == []
    job = json.loads((tmp_path / "run/jobs/score-last_layers/job.json").read_text("utf-8"))
    assert job["label"] == "last_layers"


def test_other_options_are_asked_beside_the_first_ones(ask: Ask) -> None:
    ask()
    limited = ask(limit=4)
    assert [name[:-9] for name in limited] == [n for n in FIRST if n.startswith("score")]
    assert ask(limit=4) == []
    assert ask() == []


def test_a_label_that_stands_for_something_else_now_gets_a_folder_of_its_own(ask: Ask) -> None:
    ask()
    new = ask(set={"n_layers": 3})
    assert [name.partition("_layers-")[0] for name in new] == [
        *("compress-last", "compress-random", "score-last", "score-random"),
    ]
    assert ask(set={"n_layers": 2}) == []


def test_speed_is_measured_for_new_rows_beside_the_dense_one(ask: Ask) -> None:
    assert ask(throughput="hf")[-1] == "throughput"
    assert ask(throughput="hf") == []
    more = ask(throughput="hf", recipes=["last_layers", "random_layers", "first_layers"])
    assert [name.partition("-")[0] for name in more] == ["compress", "score", "throughput"]
    assert ask(throughput="hf", recipes=["last_layers", "first_layers"]) == []


def test_changed_task_data_is_refused_by_name(ask: Ask, tasks: Path) -> None:
    own = {"tasks": ["words"], "include_path": str(tasks)}
    ask(**own)
    other = (tasks / "words.yaml").read_text("utf-8").replace("task: words", "task: more_words")
    (tasks / "more.yaml").write_text(other, "utf-8")
    assert len(ask(**{**own, "tasks": ["words", "more_words"]})) == 3
    lines = (tasks / "words.jsonl").read_text("utf-8")
    (tasks / "words.jsonl").write_text(lines.replace("w9 w4", "w9 w8"), "utf-8")
    with pytest.raises(OutputError, match=r"files of words, more_words, .*others now; .*--output"):
        ask(**{**own, "tasks": ["words", "more_words"]})


def test_a_run_of_an_earlier_version_is_continued(ask: Ask, tmp_path: Path) -> None:
    import yaml

    ask(throughput="hf")
    path = tmp_path / "run/plan.yaml"
    plan = yaml.safe_load(path.read_text("utf-8"))
    old = {"label", "dense", "recipe", "key"}
    plan["rows"] = [{k: v for k, v in row.items() if k in old} for row in plan["rows"]]
    for key in ("asked", "others", "task_data", "tokenizer_sha256", "nbytes"):
        del plan[key]
    path.write_text(yaml.safe_dump(plan), "utf-8")
    measured = tmp_path / "run/jobs/throughput/job.json"
    job = json.loads(measured.read_text("utf-8"))
    new = ("keys", "places", "models", "question", "row_folder")
    measured.write_text(json.dumps({k: v for k, v in job.items() if k not in new}), "utf-8")
    rows = ["last_layers", "random_layers", "first_layers"]
    assert ask(throughput="hf") == []
    assert [name.partition("-")[0] for name in ask(throughput="hf", recipes=rows)] == [
        *("compress", "score", "throughput"),
    ]
