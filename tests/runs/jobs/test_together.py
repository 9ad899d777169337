"""Rows in one process: which belong together, what is published, what a failure leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.compression import compress, load_recipe
from streamline_bench.harness.trunk.request import LabelOutcome, TrunkOutcome, TrunkRequest
from streamline_bench.harness.trunk.walk import Walk
from streamline_bench.runs.execution.scheduler import groups_of
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import read_done, read_failed
from streamline_bench.runs.jobs.planned import plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob, check_scores, score_together_job
from streamline_bench.runs.planning.plan import Plan
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan


def _scoring(plan: Plan) -> list[ScoreJob]:
    return [job for job in plan_jobs(plan) if isinstance(job, ScoreJob) and job.shareable]


def _names(groups: list[list[ScoreJob]]) -> list[list[str]]:
    return [sorted(job.name for job in group) for group in groups]


def test_rows_that_share_their_first_layers_belong_together(
    make: Callable[..., Request], tiny_llama: Path, tmp_path: Path
) -> None:
    rows = ["first_layers", "last_layers", "random_layers"]
    jobs = _scoring(resolve_plan(make(recipes=rows)))
    for row in rows:
        recipe = load_recipe(row, {"n_layers": 2})
        compress(tiny_llama, recipe, tmp_path / row / "checkpoint", progress=False)
    shutil.rmtree(tmp_path / "random_layers")  # cannot be read: left to whoever scores it alone
    found = groups_of(RunPaths(tmp_path), jobs, one_process=False)
    groups = _names(found.groups)
    # first_layers begins with the third layer of the dense model, last_layers with its first.
    assert groups == [
        ["score-dense", "score-last_layers"],
        ["score-first_layers"],
        ["score-random_layers"],
    ]
    assert set(found.alone) == {"score-first_layers", "score-random_layers"}
    assert (
        "shares no layer with 'dense': its first layer differs"
        in (found.alone["score-first_layers"])
    )
    assert "random_layers" in found.alone["score-random_layers"]
    assert len(groups_of(RunPaths(tmp_path), jobs, one_process=True).groups) == 1
    # Two at once take as long as the deeper model, which the walk takes anyway.
    apart = groups_of(RunPaths(tmp_path), jobs, one_process=False, at_once=2)
    assert all(len(group) == 1 for group in apart.groups)
    assert "sooner apart, 2 at once" in apart.alone["score-last_layers"]


def test_the_same_rows_are_the_same_unit(plan: Plan) -> None:
    jobs = _scoring(plan)
    assert score_together_job(jobs) == score_together_job(jobs)
    assert score_together_job(jobs).name != score_together_job(jobs[:2]).name
    changed = [jobs[0].model_copy(update={"key": "other"}), *jobs[1:]]
    assert score_together_job(changed).name != score_together_job(jobs).name


@pytest.fixture
def run(plan: Plan, tiny_llama: Path, tmp_path: Path) -> Path:
    """A run folder with folders for all jobs and checkpoints that are the model itself."""
    for job in plan_jobs(plan):
        RunPaths(tmp_path).make_job(job.name)
    for label in ("first_layers", "last_layers"):
        shutil.copytree(tiny_llama, tmp_path / label / "checkpoint")
    return tmp_path


def test_every_row_is_published_or_failed_by_itself(
    run: Path, plan: Plan, lm_eval_outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _scoring(plan)
    paths = RunPaths(run)
    by_label = {job.label: job for job in jobs}
    asked: list[TrunkRequest] = []

    def score(
        request: TrunkRequest, *, progress: bool, on_label: Callable[[str, LabelOutcome], None]
    ) -> TrunkOutcome:
        asked.append(request)
        shutil.copytree(lm_eval_outputs / "dense", request.outputs["dense"])
        shutil.copytree(lm_eval_outputs / "pruned", request.outputs["last_layers"])
        samples = next(request.outputs["last_layers"].rglob("samples_*.jsonl"))
        samples.write_text(samples.read_text(encoding="utf-8")[:-20], encoding="utf-8")
        walk = ("dense", "last_layers")
        ok = LabelOutcome(status="ok", company=walk, seconds=4.5)
        failed = LabelOutcome(status="failed", reason="Layer 3 is NaN.")
        outcomes = {"dense": ok, "first_layers": failed, "last_layers": ok}
        for label, outcome in outcomes.items():
            on_label(label, outcome)
            # It is published at once, not when all are scored.
            name, key = by_label[label].name, by_label[label].key
            assert read_done(paths, name, key) or read_failed(paths, name, key)
        return TrunkOutcome(labels=outcomes, walks=(walk,))

    monkeypatch.setattr("streamline_bench.harness.trunk.score.score_together", score)
    stale = run / "dense" / "eval"
    stale.mkdir(parents=True)
    (stale / "results_2099-01-01T00-00-00.000000.json").write_text("{}", encoding="utf-8")
    score_together_job(jobs).work(paths)

    (request,) = asked
    assert request.dense == "dense"
    assert request.batch_size == 16
    assert request.device == "cpu"
    dense = read_done(paths, "score-dense", by_label["dense"].key)
    assert dense is not None
    assert dense.facts.together == ("dense", "last_layers")
    assert dense.seconds == 4.5
    assert dense.command is not None
    assert f"--output_path {run}/dense/eval" in dense.command
    assert not (stale / "results_2099-01-01T00-00-00.000000.json").exists()
    first = read_failed(paths, "score-first_layers", by_label["first_layers"].key)
    assert first is not None
    assert first.reason == "Layer 3 is NaN."
    last = read_failed(paths, "score-last_layers", by_label["last_layers"].key)
    assert last is not None
    assert "samples_" in last.reason
    assert not (run / "last_layers" / "eval").exists()
    # What cannot be read is not there for the next attempt to stumble over.
    assert not request.outputs["last_layers"].exists()


@dataclass(frozen=True)
class Walking:
    """A run folder and its scoring jobs."""

    run: Path
    jobs: list[ScoreJob]

    def score(self) -> dict[str, list[str]]:
        """Score them; return job -> the labels it was scored with."""
        paths = RunPaths(self.run)
        score_together_job(self.jobs).work(paths)
        done = {job.name: read_done(paths, job.name, job.key) for job in self.jobs}
        return {
            name: sorted(each.facts.together) for name, each in done.items() if each is not None
        }

    def outputs(self) -> list[Path]:
        """Folders of rows that are scored and not yet published."""
        return sorted((self.run / "jobs" / ".scored").iterdir())


@pytest.fixture
def walking(make: Callable[..., Request], tasks: Path, tiny_llama: Path, tmp_path: Path) -> Walking:
    """A run folder with two rows that share layers, compressed but not scored."""
    request = make(
        recipes=["last_layers"], tasks=["words"], include_path=str(tasks), batch_size="1"
    )
    plan = resolve_plan(request)
    run = tmp_path / "run"
    for job in plan_jobs(plan):
        RunPaths(run).make_job(job.name)
    recipe = load_recipe("last_layers", {"n_layers": 2})
    compress(tiny_llama, recipe, run / "last_layers" / "checkpoint", progress=False)
    return Walking(run, _scoring(plan))


@pytest.mark.slow
def test_a_scored_row_that_was_damaged_before_it_was_published_is_scored_again(
    walking: Walking, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("streamline_bench.runs.jobs.score._publish", killed)
        with pytest.raises(KeyboardInterrupt):
            walking.score()
    (made,) = walking.outputs()
    samples = next(made.rglob("samples_*.jsonl"))
    samples.write_bytes(samples.read_bytes()[:-20])
    other = made.with_name(f"dense-{16 * '0'}")  # of other options, long ago
    other.mkdir()
    assert set(walking.score()) == {"score-dense", "score-last_layers"}
    assert walking.outputs() == []
    check_scores(walking.run / "dense" / "eval")


@pytest.mark.slow
def test_a_walk_that_was_stopped_goes_on_where_it_was(
    walking: Walking, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = Walk._leg_by_leg

    def counted(walk: Walk, labels: Sequence[str], bar: Any) -> Callable[[list[Any]], list[Any]]:
        answer = real(walk, labels, bar)

        def count(batch: list[Any]) -> list[Any]:
            if len(batches) == stop_after:
                raise KeyboardInterrupt
            batches.append(len(batch))
            return answer(batch)

        return count

    monkeypatch.setattr(Walk, "_leg_by_leg", counted)
    monkeypatch.setattr("streamline_bench.harness.scoring.scorer.CPU_TOKENS", 1)  # small batches
    stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        walking.score()
    assert len(batches) == 3
    stop_after = 1000
    walk = ["dense", "last_layers"]
    assert walking.score() == {"score-dense": walk, "score-last_layers": walk}
    together = len(batches)
    interrupted = _samples(walking.run)
    for job in walking.jobs:
        (RunPaths(walking.run).job(job.name) / "done.json").unlink()
    walking.score()
    assert len(batches) - together == together > 3  # as many as without the interruption
    assert _samples(walking.run) == interrupted


def _samples(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(run.glob("*/eval/**/samples_*.jsonl"))]
