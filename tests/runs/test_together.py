"""Rows in one process: which belong together, what is published, what a failure leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from streamline_bench.harness.trunk.request import LabelOutcome, TrunkOutcome, TrunkRequest
from streamline_bench.methods import compress, load_recipe
from streamline_bench.runs.folder import job_folder
from streamline_bench.runs.jobs import Job, plan_jobs
from streamline_bench.runs.marker import read_done, read_failed
from streamline_bench.runs.plan import Plan
from streamline_bench.runs.request import Request
from streamline_bench.runs.resolve import resolve_plan
from streamline_bench.runs.together import (
    groups_of,
    score_rows_together,
    together_payload,
    unit_of,
)


def _scoring(plan: Plan) -> list[Job]:
    return [job for job in plan_jobs(plan) if job.shareable]


def _names(groups: list[list[Job]]) -> list[list[str]]:
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
    found = groups_of(tmp_path, jobs, one_process=False)
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
    assert len(groups_of(tmp_path, jobs, one_process=True).groups) == 1


def test_the_same_rows_are_the_same_unit(plan: Plan) -> None:
    jobs = _scoring(plan)
    assert unit_of(jobs[:1]).name == jobs[0].name
    assert unit_of(jobs) == unit_of(jobs)
    assert unit_of(jobs).name != unit_of(jobs[:2]).name
    changed = [replace(jobs[0], key="other"), *jobs[1:]]
    assert unit_of(changed).name != unit_of(jobs).name


@pytest.fixture
def run(plan: Plan, tiny_llama: Path, tmp_path: Path) -> Path:
    """A run folder with folders for all jobs and checkpoints that are the model itself."""
    for job in plan_jobs(plan):
        job_folder(tmp_path, job.name).mkdir(parents=True)
    for label in ("first_layers", "last_layers"):
        shutil.copytree(tiny_llama, tmp_path / label / "checkpoint")
    return tmp_path


def test_every_row_is_published_or_failed_by_itself(
    run: Path, plan: Plan, lm_eval_outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = _scoring(plan)
    by_label = {job.labels[0]: job for job in jobs}
    asked: list[TrunkRequest] = []

    def score(request: TrunkRequest, *, progress: bool) -> TrunkOutcome:
        asked.append(request)
        shutil.copytree(lm_eval_outputs / "dense", request.outputs["dense"])
        shutil.copytree(lm_eval_outputs / "pruned", request.outputs["last_layers"])
        samples = next(request.outputs["last_layers"].rglob("samples_*.jsonl"))
        samples.write_text(samples.read_text(encoding="utf-8")[:-20], encoding="utf-8")
        ok = LabelOutcome(status="ok", together=True)
        failed = LabelOutcome(status="failed", reason="Layer 3 is NaN.")
        outcomes = {"dense": ok, "first_layers": failed, "last_layers": ok}
        return TrunkOutcome(labels=outcomes, walks=(("dense", "last_layers"),))

    monkeypatch.setattr("streamline_bench.harness.trunk.score_together", score)
    stale = run / "dense" / "eval"
    stale.mkdir(parents=True)
    (stale / "results_2020-01-01T00-00-00.000000.json").write_text("{}", encoding="utf-8")
    score_rows_together(run, unit_of(jobs).name, together_payload(jobs))

    (request,) = asked
    assert request.dense == "dense"
    assert request.batch_size == 16
    assert request.device == "cpu"
    dense = read_done(run, "score-dense", by_label["dense"].key)
    assert dense is not None
    assert dense.facts["together"] == ["dense", "last_layers"]
    assert dense.command is not None
    assert f"--output_path {run}/dense/eval" in dense.command
    assert not (stale / "results_2020-01-01T00-00-00.000000.json").exists()
    first = read_failed(run, "score-first_layers", by_label["first_layers"].key)
    assert first is not None
    assert first.reason == "Layer 3 is NaN."
    last = read_failed(run, "score-last_layers", by_label["last_layers"].key)
    assert last is not None
    assert "samples_" in last.reason
    assert not (run / "last_layers" / "eval").exists()
