"""Whole comparisons of a tiny model: failing rows, damage, full disks, two at once, signals."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from streamline_bench.compression import load_recipe
from streamline_bench.core.checkpoint.folder import read_manifest, verify_files
from streamline_bench.errors import ComparisonError, OutputError, StreamlineBenchError
from streamline_bench.report.run_file import RunFile, RunRow, read_run_file
from streamline_bench.runs import Execution, RowRequest, compare
from streamline_bench.runs.execution.scheduler import JobState
from streamline_bench.runs.finish import Results, write_report_once
from streamline_bench.runs.folder import RunPaths, locked
from streamline_bench.runs.jobs.planned import plan_jobs
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan
from streamline_bench.runs.run import CompareResult, Terminated, compare_request
from streamline_bench.stability.readers.lm_eval_reader import read_lm_eval


@pytest.fixture
def compress_only(make: Callable[..., Request], warm: Any) -> Callable[..., CompareResult]:
    """Return a function that runs the first stage, which is quick."""

    def run(output: Path, **changes: Any) -> CompareResult:
        return compare_request(make(**changes), output, until="compress", progress=False)

    return run


def _attempts(run: Path) -> dict[str, int]:
    found = sorted(run.glob("jobs/*/attempts.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in found}


@pytest.mark.slow
def test_a_failing_recipe_marks_its_row_and_the_others_go_on(
    tiny_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    broken = RowRequest(label="broken", recipe="last_layers", overrides={"sparsity": 0.001})

    def run() -> CompareResult:
        return compare(
            tiny_llama, ["first_layers", broken], ["words"], tmp_path / "run",
            include_path=str(tasks), set={"n_layers": 2}, device="cpu", noise_floor=True,
            noise_dtype="bfloat16", progress=False,
        )  # fmt: skip

    result = run()
    assert result.exit_code == 1
    assert list(result.failures) == ["broken"]
    assert "0.001" in result.failures["broken"]
    assert result.jobs["score-broken"] == "skipped"
    assert result.report is not None
    board = json.loads((tmp_path / "run" / "leaderboard.json").read_text(encoding="utf-8"))
    failed = {row["label"]: row["failed"] for row in board["rows"]}
    assert failed == {
        "dense": None,
        "first_layers": None,
        "broken": result.failures["broken"],
    }
    described = read_run_file(tmp_path / "run")
    assert [noise.label for noise in described.noise] == ["batch size 4", "bfloat16"]
    again = read_lm_eval(tmp_path / "run" / described.noise[1].eval, progress=False)
    assert "bfloat16" in str(again.info.config["model_dtype"])
    assert board["noise"]["repeats"] == ["batch size 4", "bfloat16"]
    starts = [command.split(" ")[:2] for command in described.commands]
    assert starts.count(["streamline-bench", "compress"]) == 1
    assert starts.count(["streamline-bench", "lm-eval"]) == 4  # for the user's own task folder
    (typed,) = [each for each in described.commands if " compress " in each]
    recipe = load_recipe(shlex.split(typed)[shlex.split(typed).index("--recipe") + 1])
    asked = load_recipe("first_layers", {"n_layers": 2})
    assert recipe == asked.model_copy(update={"overridden": {}})  # which a file does not set
    card = tmp_path / "run" / "first_layers" / "checkpoint" / "README.md"
    assert "model-index:" in card.read_text(encoding="utf-8")
    verify_files(card.parent, read_manifest(card.parent))
    # Once more: what is done is kept, down to the report, and what failed is tried again.
    page = result.report.stat().st_mtime_ns
    again = run()
    assert set(again.jobs.values()) == {"kept", "failed", "skipped"}
    assert again.report is not None
    assert again.report.stat().st_mtime_ns == page
    assert _attempts(tmp_path / "run")["compress-broken"] == 2
    assert _attempts(tmp_path / "run")["compress-first_layers"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("trunk", [True, False])
def test_a_task_without_documents_is_left_out_and_named(
    make: Callable[..., Request], tasks: Path, tmp_path: Path, trunk: bool
) -> None:
    _add_empty_task(tasks)
    asked = {"tasks": ["words", "nothing_asked"], "include_path": str(tasks)}
    request = make(recipes=["dense", "last_layers"] if trunk else ["dense"], **asked)
    execution = Execution(retries=0, trunk=trunk)
    result = compare_request(request, tmp_path / "run", execution=execution, progress=False)
    assert result.exit_code == 0
    assert result.left_out == {"nothing_asked": "it yielded no documents"}
    board = json.loads((tmp_path / "run" / "leaderboard.json").read_text(encoding="utf-8"))
    assert board["not_compared"] == {"nothing_asked": "it yielded no documents"}
    assert result.report is not None
    assert "nothing_asked (it yielded no documents)" in result.report.read_text(encoding="utf-8")
    scored = read_lm_eval(tmp_path / "run" / "dense" / "eval", progress=False)
    assert list(scored.info.results) == ["words"]
    if trunk:
        walk = read_run_file(tmp_path / "run").rows[1].scored_with
        assert set(walk) == {"dense", "last_layers"}
    # What a reader is told to type ends as it did here.
    assert all("--tasks words " in each for each in board["commands"] if "lm-eval" in each)
    again = compare_request(request, tmp_path / "run", execution=execution, progress=False)
    assert again.left_out == result.left_out


@pytest.mark.slow
def test_where_every_task_is_without_documents_the_row_fails(
    make: Callable[..., Request], tasks: Path, tmp_path: Path
) -> None:
    _add_empty_task(tasks)
    request = make(recipes=["dense"], tasks=["nothing_asked"], include_path=str(tasks))
    result = compare_request(request, tmp_path / "run", progress=False)
    assert result.exit_code == 1
    assert result.report is None
    assert "'nothing_asked' (it yielded no documents)" in result.failures["dense"]
    assert not (tmp_path / "run" / "run.json").exists()


def _add_empty_task(tasks: Path) -> None:
    (tasks / "none.jsonl").write_text("", encoding="utf-8")
    text = (tasks / "words.yaml").read_text(encoding="utf-8")
    text = text.replace("task: words", "task: nothing_asked").replace("words.jsonl", "none.jsonl")
    (tasks / "none.yaml").write_text(text, encoding="utf-8")


def test_rows_that_were_asked_differently_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*_: object, **__: object) -> None:
        raise ComparisonError("The document 3 differs.")

    monkeypatch.setattr("streamline_bench.report.build.build_report", differ)
    run = RunFile(dense="dense", rows=[RunRow(label="dense", eval="dense/eval")])
    with pytest.raises(ComparisonError, match=r"^The document 3 differs\. .* delete the 'eval'"):
        write_report_once(RunPaths(tmp_path), run, progress=False)


def test_only_damaged_results_are_made_again(
    compress_only: Callable[..., CompareResult], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert set(compress_only(run).jobs.values()) == {"done"}
    weights = run / "first_layers" / "checkpoint" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    (run / "first_layers" / "checkpoint" / "foreign.txt").write_text("?", encoding="utf-8")
    (run / "last_layers" / "foreign.txt").write_text("?", encoding="utf-8")
    result = compress_only(run)
    assert result.jobs == {"compress-first_layers": "done", "compress-last_layers": "kept"}
    assert weights.read_bytes() == whole


def test_a_published_checkpoint_without_its_marker_is_not_made_again(
    compress_only: Callable[..., CompareResult], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    compress_only(run, recipes=["first_layers"])
    manifest = run / "first_layers" / "checkpoint" / "streamline.json"
    written = manifest.stat().st_mtime_ns
    (run / "jobs" / "compress-first_layers" / "done.json").unlink()
    assert set(compress_only(run, recipes=["first_layers"]).jobs.values()) == {"done"}
    assert manifest.stat().st_mtime_ns == written


def test_a_file_where_a_row_should_be_fails_that_row_only(
    compress_only: Callable[..., CompareResult], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    compress_only(run, recipes=["first_layers"])
    shutil.rmtree(run / "first_layers")
    (run / "first_layers").write_text("in the way", encoding="utf-8")
    result = compress_only(run, recipes=["first_layers"])
    assert list(result.failures) == ["first_layers"]
    assert "cannot be written" in result.failures["first_layers"]
    assert (run / "first_layers").read_text(encoding="utf-8") == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts, or resizes, a file system of some kilobytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def size(kilobytes: int, mode: str = "rw") -> Path:
        nonlocal mounted
        options = f"{mode},size={kilobytes}k" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command for a small file system")
        if done.returncode:
            pytest.skip(f"a small file system may not be mounted here ({done.stderr.strip()})")
        mounted = True
        return folder

    yield size
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails_rows_and_room_mends_them(
    small_disk: Callable[[int], Path],
    compress_only: Callable[..., CompareResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = small_disk(260) / "run"  # enough for one checkpoint of the tiny model
    with monkeypatch.context() as patch:
        # As if someone else had filled it since it was looked at.
        patch.setattr("streamline_bench.runs.planning.checks._check_disk", lambda *_: None)
        result = compress_only(run)
    assert result.exit_code == 1
    assert any("No space left on device" in each for each in result.failures.values())
    small_disk(4000)
    again = compress_only(run)
    assert again.exit_code == 0
    assert set(again.jobs.values()) <= {"done", "kept"}


@pytest.mark.usefixtures("warm")
def test_a_disk_that_is_full_from_the_start(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    request = make(recipes=["first_layers"])
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device"):
            compare_request(request, tmp_path / "run", progress=False)
    result = compare_request(request, tmp_path / "run", until="compress", progress=False)
    assert result.exit_code == 0


def test_an_output_that_cannot_be_made(make: Callable[..., Request], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        compare_request(make(), tmp_path / "file" / "run", progress=False)


def test_a_folder_that_may_not_be_written(
    small_disk: Callable[..., Path], make: Callable[..., Request]
) -> None:
    closed = small_disk(1000, "ro")  # its mode would not stop root
    with pytest.raises(OutputError, match="cannot be written"):
        compare_request(make(), closed / "run", progress=False)


def test_a_report_that_cannot_be_begun_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "report").touch()
    description = RunFile(dense="d", rows=[RunRow(label="d", eval="d/eval")])
    with pytest.raises(OutputError, match="report cannot be made"):
        write_report_once(RunPaths(tmp_path), description, progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_disk_that_fills_while_scoring_fails_rows_and_room_mends_them(
    small_disk: Callable[..., Path], make: Callable[..., Request], tasks: Path
) -> None:
    run = small_disk(8000) / "run"
    request = make(recipes=["last_layers"], tasks=["words"], include_path=str(tasks))
    compare_request(request, run, until="compress", progress=False)
    used = shutil.disk_usage(run).used // 1024
    small_disk(used + 16)  # enough to begin with
    try:
        result = compare_request(request, run, progress=False)
    except OutputError as error:
        assert "No space left on device" in str(error)
    else:
        assert result.exit_code == 1
        assert "dense" in result.failures
    assert not (run / "leaderboard.json").exists()
    small_disk(8000)
    again = compare_request(request, run, progress=False)
    assert (again.exit_code, dict(again.failures)) == (0, {})
    assert again.jobs["compress-last_layers"] == "kept"


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_run_of_one_document_that_is_interrupted_in_its_report(
    make: Callable[..., Request], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    request = make(recipes=["last_layers"], tasks=["words"], include_path=str(tasks), limit=1)

    def interrupted(*_: Any, **__: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("the signal did not come")

    with monkeypatch.context() as patch:
        patch.setattr("streamline_bench.report.build.build_report", interrupted)
        with pytest.raises(Terminated):
            compare_request(request, run, progress=False)
    assert (run / "run.json").exists()
    assert not (run / "leaderboard.json").exists()
    result = compare_request(request, run, progress=False)
    assert result.exit_code == 0
    assert set(result.jobs.values()) == {"kept"}
    board = json.loads((run / "leaderboard.json").read_text(encoding="utf-8"))
    assert [row["tasks"][0]["n"] for row in board["rows"]] == [1, 1]


@pytest.mark.slow
def test_a_model_that_answers_nan_fails_its_row_by_name(
    tiny_llama: Path, tasks: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.5.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = compare(
        model, ["dense"], ["words"], tmp_path / "run", include_path=str(tasks), device="cpu",
        progress=False,
    )  # fmt: skip
    assert (result.exit_code, result.report) == (1, None)
    assert "NaN" in result.failures["dense"]


HOLDER = """
import sys, time
from pathlib import Path
from streamline_bench.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_do_not_share_a_folder_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match=f"process {holder.pid} on"), locked(run):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with locked(run):
        pass


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "until", "kind"),
    [
        (signal.SIGINT, 130, "compress", "compress"),
        (signal.SIGTERM, 143, "compress", "compress"),
        (signal.SIGTERM, 143, "evaluate", "score"),
    ],
)
@pytest.mark.usefixtures("warm")
def test_an_interrupted_run_ends_its_jobs_and_can_be_continued(
    tiny_llama: Path, tasks: Path, tmp_path: Path, number: int, code: int, until: str, kind: str
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "streamline_bench", "compare", str(tiny_llama), "--tasks", "words",
        "--recipes", "first_layers,last_layers", "--n-layers", "2", "--device", "cpu",
        "--include-path", str(tasks), "--until", until, "-o", str(run),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
        preexec_fn=_heed_ctrl_c if number == signal.SIGINT else None,
    )
    limit = time.monotonic() + 240
    while time.monotonic() < limit and not any(name.startswith(kind) for name in _attempts(run)):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "the same command continues the run" in said
    lines = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(run) in line]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(_attempts(run).values()) <= (3 if kind == "compress" else 4)


@pytest.mark.parametrize("output", ["x" * 300, "closed/run"])
def test_an_output_that_may_not_be_looked_at_is_one_sentence(
    make: Callable[..., Request], tmp_path: Path, output: str
) -> None:
    request = make()
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may enter any folder
    try:
        with pytest.raises(OutputError, match=r"\((File name too long|Permission denied)\); give"):
            compare_request(request, tmp_path / output, progress=False)
    finally:
        os.seteuid(user)
        closed.chmod(0o700)


def test_an_output_of_a_user_who_is_not_there(make: Callable[..., Request]) -> None:
    with pytest.raises(OutputError, match=r"^~nobody-here/run has no home folder .*; give another"):
        compare_request(make(), Path("~nobody-here/run"), progress=False)


def test_what_is_mistyped_leaves_no_folder(make: Callable[..., Request], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for changes in ({"model": "/nope"}, {"recipes": [RowRequest(recipe="dense", label="jobs")]}):
        with pytest.raises(StreamlineBenchError):
            compare_request(make(**changes), run, progress=False)
    with pytest.raises(StreamlineBenchError):
        compare_request(
            make(device="cuda"), run, execution=Execution(gpus_per_job=0), progress=False
        )
    assert not run.exists()


@pytest.mark.parametrize("blocking", ["jobs", "jobs/compress-last_layers"])
def test_a_file_where_a_job_belongs_is_named_with_the_remedy(
    compress_only: Callable[..., CompareResult], tmp_path: Path, blocking: str
) -> None:
    run = tmp_path / "run"
    compress_only(run, recipes=["last_layers"])
    shutil.rmtree(run / blocking)
    (run / blocking).touch()
    with pytest.raises(OutputError, match=f"{blocking} is not a folder; remove it and run again"):
        compress_only(run, recipes=["last_layers"])
    (run / blocking).unlink()
    assert compress_only(run, recipes=["last_layers"]).exit_code == 0


def test_a_row_whose_manifest_was_damaged_since_fails_with_the_reason(
    compress_only: Callable[..., CompareResult], make: Callable[..., Request], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    compress_only(run)
    plan = resolve_plan(make())
    states = {job.name: JobState(job, "done") for job in plan_jobs(plan)}
    assert Results(RunPaths(run), plan, states).failures() == {}
    manifest = run / "last_layers" / "checkpoint" / "streamline.json"
    manifest.write_text("{", encoding="utf-8")
    results = Results(RunPaths(run), plan, states)
    assert list(results.failures()) == ["last_layers"]
    described = {row.label: row for row in results.describe().rows}
    assert described["first_layers"].failed is None
    assert "streamline.json cannot be read" in str(described["last_layers"].failed)
