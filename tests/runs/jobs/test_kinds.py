"""What the job that measures is asked, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.cli.throughput import command
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.job import Job
from streamline_bench.runs.jobs.planned import measure_jobs
from streamline_bench.runs.planning.plan import Plan
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.resolve import resolve_plan


@pytest.fixture
def job(make: Callable[..., Request]) -> Job:
    """The job of a plan with a model of a hub that brings code along."""
    plan = resolve_plan(
        make(throughput="hf", trust_remote_code=True, workload={"prefix_caching": True})
    )
    hub = {"model": "owner/model", "revision": "v2"}
    (job,) = measure_jobs(Plan(**{**plan.model_dump(), **hub}), ["dense", "last_layers"], 3)
    return job


def test_the_command_repeats_what_was_measured(
    job: Job, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def measure(models: Any, **options: Any) -> None:
        asked.update(options, models=models)

    monkeypatch.setattr("streamline_bench.throughput.measure", measure)
    monkeypatch.setattr(
        "streamline_bench.core.checkpoint.folder.resolve_pretrained",
        lambda name, revision: tiny_llama / f"{name}@{revision}",
    )
    typed = job.work(RunPaths(tmp_path)).command
    assert asked["setup"].trust_remote_code
    assert asked["models"]["dense"] == tiny_llama / "owner/model@v2"
    assert typed is not None
    words = shlex.split(typed)
    assert words[:2] == ["streamline-bench", "throughput"]
    given = command.make_context("throughput", words[2:]).params
    assert given["models"] == (
        "dense=owner/model",
        f"last_layers={tmp_path / 'last_layers' / 'checkpoint'}",
    )
    for key in ("device", "threads", "trust_remote_code"):
        assert given[key] == getattr(asked["setup"], key)
    for key in ("prompt_tokens", "output_tokens", "rounds", "seed", "prefix_caching"):
        assert given[key] == getattr(asked["workload"], key)
    assert given["batch"] == asked["workload"].batch_sizes
    assert (given["revision"], given["engine"], given["dense"]) == ("v2", "hf", "dense")


@pytest.mark.parametrize("own", [False, True])
def test_the_command_of_a_server_sends_the_same(
    own: bool,
    make: Callable[..., Request],
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from streamline_bench.cli.throughput import _load
    from streamline_bench.throughput import ServingLoad

    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "a b", "output_tokens": 3}\n')
    load: dict[str, Any] = {
        "slo": "ttft=500ms,tpot=50ms,p=90",
        "requests": 8,
        "arrivals": "constant",
    }
    load |= (
        {"prompts": str(prompts), "output_lengths": "data", "search": "rate"}
        if own
        else {"concurrencies": [1, 8], "prefix_tokens": 4}
    )
    load["request_rates"] = [2, float("inf")]
    plan = resolve_plan(make(throughput="serve", load=load, workload={"self_check": True}))
    (job,) = measure_jobs(plan, ["dense", "last_layers"], 3)
    asked: dict[str, Any] = {}
    monkeypatch.setattr("streamline_bench.throughput.serve",
                        lambda models, **options: asked.update(options, models=models))  # fmt: skip
    typed = job.work(RunPaths(tmp_path)).command
    assert asked["load"] == ServingLoad.model_validate(load) and asked["dense"] == "dense"
    assert asked["models"]["dense"] == tiny_llama
    assert asked["workload"].self_check and asked["setup"].threads == 3
    assert typed is not None
    context = command.make_context("throughput", shlex.split(typed)[2:])
    assert context.params["serving"] and context.params["self_check"]
    assert _load(context, context.params) == asked["load"]
