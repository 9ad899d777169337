"""Next-token distributions on a text, from the options of ``compare`` to the leaderboard."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_jobs import InProcess

from streamline_bench.cli.stability import by_text as command
from streamline_bench.divergence import token_divergence
from streamline_bench.errors import StreamlineBenchError
from streamline_bench.runs.execution.scheduler import Scheduler
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.kinds import TextJob
from streamline_bench.runs.jobs.planned import plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import Plan, TextPlan
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan
from streamline_bench.runs.run import compare_request

pytestmark = pytest.mark.usefixtures("warm")


def _stories() -> list[str]:
    return [" ".join(f"w{(i * 7 + j * 13) % 96}" for j in range(12 + i)) for i in range(6)]


@pytest.fixture
def story_file(tmp_path: Path) -> Path:
    """Six documents of 12 to 17 known words, under the key ``story``."""
    path = tmp_path / "stories.jsonl"
    lines = [json.dumps({"story": story}) + "\n" for story in _stories()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def asking(make: Callable[..., Request], tasks: Path, story_file: Path) -> Callable[..., Request]:
    """Return a function that gives the request for one row, a task and that text."""

    def ask(**changes: Any) -> Request:
        return make(
            **{
                "recipes": ["last_layers"],
                "tasks": ["words"],
                "include_path": str(tasks),
                "text": str(story_file),
                "text_field": "story",
                "text_documents": 5,
                "text_window": 8,
                **changes,
            }
        )

    return ask


@pytest.mark.parametrize("template", [True, False])
def test_conversations_are_written_by_the_chat_template(
    make: Callable[..., Request], tasks: Path, tiny_llama: Path, tmp_path: Path, template: bool
) -> None:
    """As ``divergence`` and calibration do."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "chat"))
    if template:
        (model / "chat_template.jinja").write_text(
            "{% for turn in messages %}w1 {{ turn.content }} w2 {% endfor %}"
        )
    talks = [[{"role": "user", "content": f"w{i} w4 w5"}] for i in range(5, 9)]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    request = make(
        model=str(model), recipes=["last_layers"], tasks=["words"], include_path=str(tasks),
        text=str(path), text_window=8,
    )  # fmt: skip
    if not template:
        with pytest.raises(StreamlineBenchError, match="chat template"):
            resolve_plan(request)
        return
    job = _text_job(resolve_plan(request))
    run = RunPaths(tmp_path / "run")
    run.checkpoint(job.label).parent.mkdir(parents=True)
    shutil.copytree(model, run.checkpoint(job.label))
    job.work(run)
    found = json.loads(run.divergence(job.label).read_text(encoding="utf-8"))
    plain = [f"w1 {talk[0]['content']} w2 " for talk in talks]
    expected = token_divergence(model, model, plain, window=8, progress=False)
    assert (found["documents"], found["tokens"]) == (4, expected.tokens)
    assert found["dense_perplexity"] == pytest.approx(expected.dense_perplexity)


def _text_job(plan: Plan) -> TextJob:
    (job,) = [job for job in plan_jobs(plan) if isinstance(job, TextJob)]
    return job


def test_the_plan_names_the_text_and_its_content(
    asking: Callable[..., Request], story_file: Path
) -> None:
    plan = resolve_plan(asking())
    assert plan.text == TextPlan(
        file=str(story_file),
        sha256=hashlib.sha256(story_file.read_bytes()).hexdigest(),
        field="story",
        documents=5,
        window=8,
    )
    job = _text_job(plan)
    assert (job.name, job.labels, job.needs) == (
        "text-last_layers", ("last_layers",), ("compress-last_layers",)
    )  # fmt: skip
    assert [job for job in plan_jobs(plan, until="compress") if job.kind == "text"] == []


def test_only_what_decides_the_result_is_in_the_key(
    asking: Callable[..., Request], story_file: Path
) -> None:
    key = _text_job(resolve_plan(asking())).key
    moved = story_file.rename(story_file.with_name("moved.jsonl"))
    assert _text_job(resolve_plan(asking(text=str(moved)))).key == key
    assert _text_job(resolve_plan(asking(text=str(moved), batch_size="3"))).key == key
    changed: list[dict[str, Any]] = [
        {"text_documents": 4}, {"text_window": 9}, {"dtype": "bfloat16"}, {"set": {"n_layers": 1}}
    ]  # fmt: skip
    keys = [_text_job(resolve_plan(asking(text=str(moved), **each))).key for each in changed]
    moved.write_text(moved.read_text(encoding="utf-8").replace("w1", "w2"), encoding="utf-8")
    keys.append(_text_job(resolve_plan(asking(text=str(moved)))).key)
    assert len({key, *keys}) == 6


def test_the_command_repeats_what_was_compared(
    asking: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result:
        def model_dump_json(self, **_: object) -> str:
            return "{}"

    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "streamline_bench.divergence.token_divergence",
        lambda *folders, **options: asked.update(options) or Result(),
    )
    monkeypatch.setattr(
        "streamline_bench.core.checkpoint.folder.resolve_pretrained",
        lambda name, revision: Path(name),
    )
    plan = resolve_plan(asking(trust_remote_code=True))
    monkeypatch.setattr("streamline_bench.modeling.loading.load_tokenizer", lambda *_, **__: None)
    plan = Plan(**{**plan.model_dump(), "model": "owner/model", "revision": "v2"})
    (tmp_path / "last_layers").mkdir()
    typed = _text_job(plan).work(RunPaths(tmp_path)).command
    assert typed is not None
    words = shlex.split(typed)
    assert words[:2] == ["streamline-bench", "divergence"]
    given = command.make_context("divergence", words[2:]).params
    assert (given["dense"], given["revision"]) == ("owner/model", "v2")
    assert given["pruned"] == str(tmp_path / "last_layers" / "checkpoint")
    for key in ("window", "batch_size", "device", "dtype", "trust_remote_code"):
        assert given[key] == asked[key], key


@pytest.mark.slow
def test_every_row_is_compared_on_the_text_once(
    asking: Callable[..., Request], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    result = compare_request(asking(), run, progress=False)
    assert (result.exit_code, dict(result.reasons)) == (0, {})
    assert result.jobs["text-last_layers"] == "done"
    described = json.loads((run / "run.json").read_text(encoding="utf-8"))
    rows = {row["label"]: row["divergence"] for row in described["rows"]}
    assert rows == {"dense": None, "last_layers": "last_layers/divergence.json"}
    (command,) = [line for line in described["commands"] if " divergence " in line]
    assert "--text-field story --documents 5 --window 8" in command
    expected = token_divergence(
        tiny_llama, run / "last_layers" / "checkpoint", _stories()[:5], window=8, progress=False
    )
    board = json.loads((run / "leaderboard.json").read_text(encoding="utf-8"))
    shown = {row["label"]: row["divergence"] for row in board["rows"]}
    assert shown["dense"] is None
    assert shown["last_layers"]["tokens"] == expected.tokens == sum(12 + i for i in range(5)) - 10
    assert shown["last_layers"]["kl"]["value"] == pytest.approx(expected.kl.value, rel=1e-4)
    # A checkpoint from elsewhere with the same weights needs no comparison of its own.
    twin = {"label": "twin", "checkpoint": str(run / "last_layers" / "checkpoint")}
    other = {"label": "other", "checkpoint": str(tiny_llama)}
    with monkeypatch.context() as patch:
        patch.setattr("streamline_bench.runs.run.LocalExecutor", InProcess)
        InProcess.started.clear()
        more = compare_request(asking(recipes=["last_layers", twin, other]), run, progress=False)
    assert (more.exit_code, dict(more.reasons)) == (0, {})
    assert InProcess.started == ["text-other"]
    # A result that was damaged since is made again, and nothing else is.
    (run / "last_layers" / "divergence.json").write_text("{}", encoding="utf-8")
    again = compare_request(asking(), run, progress=False)
    assert {name for name, status in again.jobs.items() if status == "done"} == {"text-last_layers"}
    assert (
        json.loads((run / "leaderboard.json").read_text(encoding="utf-8"))["rows"][1]["divergence"]
        == shown["last_layers"]
    )


@pytest.mark.parametrize(("trunk", "at_once"), [(True, 1), (False, 1), (True, 2)])
def test_rows_are_compared_in_one_process_as_apart(
    asking: Callable[..., Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trunk: bool,
    at_once: int,
) -> None:
    monkeypatch.setattr(InProcess, "at_once", lambda self, kind: at_once)
    together = trunk and at_once == 1
    names = {"last_layers", "first_layers"}
    plan, run = resolve_plan(asking(recipes=sorted(names))), RunPaths(tmp_path / "run")
    jobs = [job for job in plan_jobs(plan, trunk=trunk) if not isinstance(job, ScoreJob)]
    done = Scheduler(run, InProcess(), retries=0, one_process=False, watch=lambda _: None)
    done.do(jobs)
    texts = [job for job in jobs if isinstance(job, TextJob)]
    assert {job.label for job in texts} == names
    for job in texts:
        state = done.states[job.name]
        assert state.status == "done"
        assert state.done is not None
        assert set(state.done.facts.together) == (names if together else set())
        assert state.process is not None
        assert state.process.startswith("text-together-") == together
        found = run.divergence(job.place).read_text("utf-8")
        again = job.work(run)
        assert run.divergence(job.place).read_text("utf-8") == found
        assert again.command == state.done.command


@pytest.mark.slow
def test_a_text_that_cannot_be_compared_leaves_the_row_its_result(
    asking: Callable[..., Request], story_file: Path, tmp_path: Path
) -> None:
    story_file.write_text('{"story": "w1"}\n', encoding="utf-8")  # one token predicts nothing
    result = compare_request(asking(), tmp_path / "run", progress=False)
    assert result.exit_code == 1
    assert result.failures == {}
    assert list(result.reasons) == ["text-last_layers"]
    assert "two tokens" in result.reasons["text-last_layers"]
    board = json.loads((tmp_path / "run" / "leaderboard.json").read_text(encoding="utf-8"))
    row = board["rows"][1]
    assert (row["label"], row["failed"], row["divergence"]) == ("last_layers", None, None)
    assert row["accuracy_macro"] is not None
    assert board["failed_jobs"] == dict(result.reasons)
    for name in ("leaderboard.html", "leaderboard.md"):
        assert "two tokens" in (tmp_path / "run" / name).read_text(encoding="utf-8")
