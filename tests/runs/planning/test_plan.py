"""A run folder grows from plan to plan; refused is what would make its results untrue."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.errors import MissingDependencyError, OutputError, RecipeError
from streamline_bench.runs.folder import RunPaths, claim, locked
from streamline_bench.runs.jobs.job import read_done
from streamline_bench.runs.jobs.planned import measure_jobs, plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.growth import conflicts
from streamline_bench.runs.planning.plan import Plan, read_plan, write_plan
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan


def test_written_and_read_it_is_the_same(plan: Plan, tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert conflicts(plan, plan) == []


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 8},
        {"tasks": ["streamline_demo_order"]},
        {"set": {"n_layers": 3}},
        {"recipes": ["first_layers"]},
        {"batch_size": "4"},
        {"dtype": "bfloat16"},
        {"noise_floor": True},
    ],
)
def test_other_options_leave_what_is_there_true(
    make: Callable[..., Request], plan: Plan, tmp_path: Path, change: dict[str, object]
) -> None:
    claim(tmp_path, plan)
    other = claim(tmp_path, resolve_plan(make(**change)))
    assert read_plan(tmp_path) == other
    # Back again: every row has its folder and its jobs as before.
    again = claim(tmp_path, plan)
    assert [row.place for row in again.rows] == [row.label for row in plan.rows]
    run = RunPaths(tmp_path)
    assert [job.key for job in plan_jobs(again, run)] == [job.key for job in plan_jobs(plan)]
    assert [job.name for job in plan_jobs(again, run)] == [job.name for job in plan_jobs(plan)]


def test_the_same_weights_elsewhere_are_the_same_model(
    make: Callable[..., Request], plan: Plan, tiny_llama: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tiny_llama, tmp_path / "moved"))
    other = resolve_plan(make(model=str(moved), title="Another heading"))
    assert conflicts(plan, other) == []
    assert [job.key for job in plan_jobs(plan)] == [job.key for job in plan_jobs(other)]


def test_other_weights_are_another_model(
    make: Callable[..., Request],
    plan: Plan,
    make_tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    other = resolve_plan(make(model=str(make_tiny_model("llama", seed=7))))
    claim(tmp_path, plan)
    with pytest.raises(OutputError, match=rf"{plan.model}.*{other.model}.*--output"):
        claim(tmp_path, other)
    retrained = other.model_copy(update={"model": plan.model})
    with pytest.raises(OutputError, match=f"the weights of {plan.model} are others now"):
        claim(tmp_path, retrained)
    assert read_plan(tmp_path) == claim(tmp_path, plan)
    keys = {job.key for job in plan_jobs(plan)}
    assert keys.isdisjoint(job.key for job in plan_jobs(other))


def test_a_run_of_another_version_is_refused_in_words(plan: Plan, tmp_path: Path) -> None:
    rows = tuple(row.model_copy(update={"key": row.key[::-1]}) for row in plan.rows)
    claim(tmp_path, plan.model_copy(update={"rows": rows}))
    with pytest.raises(OutputError, match=r"row dense: .*version of streamline-bench.*--output"):
        claim(tmp_path, plan)


def test_a_marker_of_the_previous_version_is_continued(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    facts = {"layers_before": 6, "together": [], "alone": "why", "not_compared": {}}
    marker = {"key": "k", "seconds": 1.0, "attempts": 1, "files": {}, "facts": facts}
    (run.make_job("j") / "done.json").write_text(json.dumps(marker), encoding="utf-8")
    done = read_done(run, "j", "k")
    assert done is not None
    assert done.facts.alone == "why"


def test_keys_name_what_decides_a_result_and_nothing_else(
    make: Callable[..., Request], plan: Plan
) -> None:
    def keys(request: Request) -> dict[str, str]:
        return {job.name: job.key for job in plan_jobs(resolve_plan(request))}

    first = keys(make())
    longer = keys(make(limit=8))
    assert first["compress-first_layers"] == longer["compress-first_layers"]
    assert first["score-first_layers"] != longer["score-first_layers"]
    alone = {job.name: job.key for job in plan_jobs(plan, trunk=False)}
    assert alone == first
    deeper = keys(make(set={"n_layers": 3}))
    assert first["score-dense"] == deeper["score-dense"]
    assert first["score-first_layers"] != deeper["score-first_layers"]


def test_a_changed_task_file_is_a_difference(make: Callable[..., Request], tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("task: t\n", encoding="utf-8")
    before = resolve_plan(make(include_path=str(tmp_path)))
    (tmp_path / "t.yaml").write_text("task: t\nnum_fewshot: 1\n", encoding="utf-8")
    after = resolve_plan(make(include_path=str(tmp_path)))
    assert before.evaluation.tasks_sha256 != after.evaluation.tasks_sha256
    # The tasks that were asked read nothing of that file; an earlier version could not tell.
    assert conflicts(before, after) == []
    (said,) = conflicts(before.model_copy(update={"task_data": {}}), after)
    assert "streamline_demo_pairs" in said


@pytest.mark.parametrize(
    "text", ["", "just text", "schema_version: 1\n", "a: [", "schema_version: 99\n"]
)
def test_a_damaged_plan_is_refused(tmp_path: Path, plan: Plan, text: str) -> None:
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=r"plan\.yaml is damaged"):
        claim(tmp_path, plan)
    assert (tmp_path / "plan.yaml").read_text(encoding="utf-8") == text


def test_a_truncated_plan_is_refused(tmp_path: Path, plan: Plan) -> None:
    write_plan(tmp_path, plan)
    text = (tmp_path / "plan.yaml").read_text(encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(OutputError, match=r"plan\.yaml is damaged"):
        claim(tmp_path, plan)


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="run folder"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputError, match="not a folder"), locked(tmp_path / "mine.txt"):
        pass


def test_what_a_kill_before_the_plan_left_is_no_obstacle(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".plan.yaml.partial-999999-0a0a0a0a").write_text("half", encoding="utf-8")
    with locked(tmp_path):
        claimed = claim(tmp_path, plan)
    assert read_plan(tmp_path) == claimed
    assert claimed.rows == plan.rows


def test_the_same_files_elsewhere_are_the_same_plan(
    make: Callable[..., Request], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "t.yaml").write_text("task: t\n", encoding="utf-8")
    (tmp_path / "a" / "text.txt").write_text("w1 w2\n", encoding="utf-8")
    plans = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        if not folder.exists():
            (tmp_path / "a").rename(folder)
        request = make(include_path=str(folder), text=str(folder / "text.txt"))
        plans.append(resolve_plan(request))
    assert conflicts(*plans) == []
    first, second = ([job.key for job in plan_jobs(plan)] for plan in plans)
    assert first == second
    assert plans[0].evaluation.include_path != plans[1].evaluation.include_path


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, []),
        ({"noise_floor": True}, [("batch size 4", "4", None)]),
        ({"noise_floor": True, "batch_size": "1"}, [("batch size 4", "4", None)]),
        ({"noise_batch_size": "2"}, [("batch size 2", "2", None)]),
        ({"noise_dtype": "bfloat16"}, [("bfloat16", "16", "bfloat16")]),
        (
            {"noise_floor": True, "noise_dtype": "bfloat16", "dtype": "float32"},
            [("batch size 4", "4", "float32"), ("bfloat16", "16", "bfloat16")],
        ),
    ],
)
def test_every_repetition_of_the_dense_model_changes_one_thing(
    make: Callable[..., Request], asked: dict[str, Any], found: list[tuple[str, str, str | None]]
) -> None:
    plan = resolve_plan(make(**asked))
    assert [(each.label, each.batch_size, each.dtype) for each in plan.noise] == found
    jobs = [job for job in plan_jobs(plan) if job.name.startswith("noise-")]
    assert len({job.key for job in plan_jobs(plan)}) == len(plan_jobs(plan))
    assert [job.products(RunPaths(Path("run"))) for job in jobs] == [
        [Path(f"run/noise/{label.replace(' ', '-')}/eval")] for label, *_ in found
    ]


def test_repetitions_that_would_change_nothing(make: Callable[..., Request]) -> None:
    with pytest.raises(RecipeError, match="--noise-batch-size is 16"):
        resolve_plan(make(noise_batch_size="16"))
    with pytest.raises(RecipeError, match="--noise-dtype is bfloat16"):
        resolve_plan(make(noise_dtype="bfloat16", dtype="bfloat16"))


def test_another_engine_is_asked_through_its_own_model_of_the_harness(
    make: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streamline_bench.modeling.vllm.package.require_vllm", lambda _: None)
    plan = resolve_plan(make(noise_engine="vllm"))
    assert [(each.label, each.engine) for each in plan.noise] == [("vllm", "vllm")]
    (job,) = [job for job in plan_jobs(plan) if job.name == "noise-vllm"]
    assert job.key != next(job.key for job in plan_jobs(plan) if job.name == "score-dense")
    assert isinstance(job, ScoreJob)
    assert " --model streamline-vllm " in job.reader_command(RunPaths(tmp_path))


def test_an_engine_that_is_not_installed_is_refused_before_anything_runs(
    make: Callable[..., Request],
) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    with pytest.raises(MissingDependencyError, match="vllm"):
        resolve_plan(make(noise_engine="vllm"))


def test_an_older_plan_without_noise_is_continued(plan: Plan, tmp_path: Path) -> None:
    payload = {**plan.model_dump(mode="json"), "noise": None}
    assert Plan.model_validate(payload) == plan


def test_overwriting_removes_what_a_run_made_and_nothing_else(
    make: Callable[..., Request], plan: Plan, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    outside = tmp_path / "outside"
    made = [
        "first_layers/checkpoint/config.json", "first_layers/eval/results.json", "run.json",
        "first_layers/divergence.json", "jobs/report/done.json", "leaderboard.html",
        "noise/bfloat16/eval/results.json", "throughput/throughput.json",
    ]  # fmt: skip
    kept = ["first_layers/notes.txt", "report/mine.html", "train.py", "model-cards/a.md"]
    for name in [*made, *kept, "../outside/checkpoint/config.json"]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("?", encoding="utf-8")
    (run / "last_layers").symlink_to(outside)
    claim(run, plan)
    other = resolve_plan(make(recipes=["last_layers"], limit=3))
    claim(run, other, overwrite=True)
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert left == {*kept, "plan.yaml"}
    assert (outside / "checkpoint" / "config.json").exists()
    assert read_plan(run) == claim(run, other)
    (tmp_path / "new").mkdir()
    claim(tmp_path / "new", other, overwrite=True)
    assert read_plan(tmp_path / "new") == claim(tmp_path / "new", other)


def test_a_run_of_another_model_or_a_foreign_plan_is_not_overwritten(
    plan: Plan, tmp_path: Path
) -> None:
    write_plan(tmp_path, plan.model_copy(update={"weights_sha256": "0" * 64}))
    (tmp_path / "run.json").touch()
    with pytest.raises(OutputError, match="of another model"):
        claim(tmp_path, plan, overwrite=True)
    (tmp_path / "plan.yaml").write_text("steps: [deploy]\n", encoding="utf-8")
    with pytest.raises(OutputError, match=r"plan\.yaml is damaged"):
        claim(tmp_path, plan, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "run.json"}


def test_speed_is_measured_with_as_many_threads_as_the_key_says(plan: Plan) -> None:
    jobs = [job for threads in (1, 4) for job in measure_jobs(plan, ["dense"], threads)]
    assert jobs[0].key != jobs[1].key
    assert [job.environment["OMP_NUM_THREADS"] for job in jobs] == ["1", "4"]
    assert [job.threads for job in jobs] == [1, 4]
    fixed = plan.model_copy(update={"threads": 2})
    assert measure_jobs(fixed, ["dense"], 1) == measure_jobs(fixed, ["dense"], 4)


def test_a_workload_is_checked_before_anything_runs(make: Callable[..., Request]) -> None:
    with pytest.raises(RecipeError, match="rounds"):
        resolve_plan(make(throughput="hf", workload={"rounds": 0}))
