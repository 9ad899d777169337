"""A run folder belongs to one plan; another plan is refused, naming what differs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.errors import OutputError, RecipeError
from streamline_bench.runs.folder import claim, locked
from streamline_bench.runs.jobs import plan_jobs
from streamline_bench.runs.plan import Plan, differences, read_plan, write_plan
from streamline_bench.runs.request import Request
from streamline_bench.runs.resolve import resolve_plan


def test_written_and_read_it_is_the_same(plan: Plan, tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert differences(plan, plan) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit": 8}, "evaluation.limit: None there, 8.0 now"),
        ({"tasks": ["piqa"]}, "evaluation.tasks: "),
        ({"set": {"n_layers": 3}}, "rows.first_layers.recipe.n_layers: 2 there, 3 now"),
        ({"recipes": ["first_layers"]}, "rows: "),
        ({"batch_size": "4"}, "evaluation.batch_size: '16' there, '4' now"),
        ({"dtype": "bfloat16"}, "dtype: None there, 'bfloat16' now"),
        ({"noise_floor": True}, "noise.label: 'not set' there, 'batch size 4' now"),
    ],
)
def test_another_plan_is_refused_by_name(
    make: Callable[..., Request], plan: Plan, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    claim(tmp_path, plan)
    other = resolve_plan(make(**change))
    assert any(each.startswith(said) for each in differences(plan, other)), differences(plan, other)
    with pytest.raises(OutputError, match="other options"):
        claim(tmp_path, other)
    assert read_plan(tmp_path) == plan


def test_the_same_weights_elsewhere_are_the_same_model(
    make: Callable[..., Request], plan: Plan, tiny_llama: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tiny_llama, tmp_path / "moved"))
    other = resolve_plan(make(model=str(moved), title="Another heading"))
    assert differences(plan, other) == []
    assert [job.key for job in plan_jobs(plan)] == [job.key for job in plan_jobs(other)]


def test_other_weights_are_another_model(
    make: Callable[..., Request], plan: Plan, make_tiny_model: Callable[..., Path]
) -> None:
    other = resolve_plan(make(model=str(make_tiny_model("llama", seed=7))))
    assert differences(plan, other)[0].startswith("weights_sha256")
    keys = {job.key for job in plan_jobs(plan)}
    assert keys.isdisjoint(job.key for job in plan_jobs(other))


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
    assert [each.split(":")[0] for each in differences(before, after)] == [
        "evaluation.tasks_sha256"
    ]


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
    with pytest.raises(OutputError, match="no run folder"), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(OutputError, match="not a folder"), locked(tmp_path / "mine.txt"):
        pass


def test_what_a_kill_before_the_plan_left_is_no_obstacle(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".plan.yaml.partial-999999-0a0a0a0a").write_text("half", encoding="utf-8")
    with locked(tmp_path):
        claim(tmp_path, plan)
    assert read_plan(tmp_path) == plan


def test_the_noise_floor_needs_another_setting(make: Callable[..., Request]) -> None:
    with pytest.raises(RecipeError, match="another batch size than 16"):
        resolve_plan(make(noise_floor=True, noise_batch_size="16"))
    plan = resolve_plan(make(noise_floor=True, batch_size="1"))
    assert plan.noise is not None
    assert plan.noise.batch_size == "4"


def test_a_workload_is_checked_before_anything_runs(make: Callable[..., Request]) -> None:
    with pytest.raises(RecipeError, match="rounds"):
        resolve_plan(make(throughput="hf", workload={"rounds": 0}))
