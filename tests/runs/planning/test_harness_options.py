"""Options of the harness, per comparison and per task: taken under its names, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig

from streamline_bench.errors import (
    CheckpointError,
    MissingDependencyError,
    OutputError,
    RecipeError,
    StreamlineBenchError,
)
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.folder import RunPaths, claim
from streamline_bench.runs.jobs.planned import plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.checks import check_before
from streamline_bench.runs.planning.harness_options import SECTION_KEYS
from streamline_bench.runs.planning.plan import Evaluation, Plan
from streamline_bench.runs.planning.request import Request, make_request, read_request
from streamline_bench.runs.planning.resolve import resolve_plan

PAIRS, ORDER = "streamline_demo_pairs", "streamline_demo_order"
STORY = "streamline_demo_story"


def _request(**changes: Any) -> Request:
    return make_request({"model": "m", "recipes": ["dense"], "tasks": ["a"], **changes}, "Plan p")


def _asked(job: ScoreJob) -> EvaluatorConfig:
    """What the stock command understands of a job's command line."""
    program, *arguments = job.harness_command(RunPaths(Path("run")), Path("out"))[2:]
    if program == "streamline_bench":
        arguments = arguments[1:]
    import sys

    before, sys.argv = sys.argv, ["lm_eval", "run", *arguments]
    try:
        return EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    finally:
        sys.argv = before


def test_a_configuration_of_the_harness_is_a_section_of_a_plan(tmp_path: Path) -> None:
    config = {
        "model": "hf",
        "model_args": "pretrained=some/model,dtype=bfloat16,max_length=512",
        "tasks": "piqa,gsm8k",
        "num_fewshot": 5,
        "batch_size": 8,
        "limit": 20,
        "gen_kwargs": {"temperature": 0.5, "do_sample": True},
        "system_instruction": "Be brief.",
        "apply_chat_template": "short",
        "fewshot_as_multiturn": True,
        "seed": 42,
        "include_path": str(tmp_path),
        "log_samples": True,
        "write_out": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    plan = {"recipes": ["dense"], "harness": str(tmp_path / "config.yaml")}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    request = make_request(read_request(str(tmp_path / "plan.yaml")))
    assert request == make_request(
        {
            "model": "some/model", "recipes": ["dense"], "tasks": ["piqa", "gsm8k"],
            "dtype": "bfloat16", "engine": "hf", "model_args": {"max_length": 512},
            "num_fewshot": 5, "batch_size": "8", "limit": 20,
            "gen_kwargs": {"temperature": 0.5, "do_sample": True},
            "system_instruction": "Be brief.", "apply_chat_template": "short",
            "fewshot_as_multiturn": True, "seed": [42] * 4, "include_path": [str(tmp_path)],
        }
    )  # fmt: skip
    assert make_request({**plan, "harness": config}) == request


def test_every_option_of_the_harness_is_known() -> None:
    import dataclasses

    assert {field.name for field in dataclasses.fields(EvaluatorConfig)} <= {*SECTION_KEYS}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"harness": {"num_fewshots": 3}},
         "unknown key 'harness.num_fewshots'; did you mean 'num_fewshot'"),
        ({"gen_kwarg": {}}, "unknown key 'gen_kwarg'; did you mean 'gen_kwargs'"),
        ({"tasks": [{"task": "a", "num_fewshots": 3}]},
         "unknown key 'tasks.0.num_fewshots'; did you mean 'num_fewshot'"),
        ({"tasks": [{"num_fewshot": 3}]}, "'tasks.0.task'"),
        ({"tasks": ["a", {"task": "a", "limit": 3}]}, "'a' is given twice"),
        ({"harness": {"output_path": "x"}}, "'harness.output_path' has no place"),
        ({"harness": {"use_cache": "x"}}, "'harness.use_cache' has no place"),
        ({"harness": {"log_samples": False}}, "'harness.log_samples' is false"),
        ({"harness": {"model": "openai-completions"}}, "'openai-completions'"),
        ({"harness": {"num_fewshot": 3}, "num_fewshot": 2}, "'num_fewshot' stands in the plan and"),
        ({"harness": [1]}, "'harness' is [1]"),
        ({"harness": {"gen_kwargs": "warm"}}, "'harness.gen_kwargs' is 'warm'"),
        ({"harness": {"samples": "/no/such.json"}}, "'/no/such.json'"),
        ({"samples": {"a": []}}, "samples of 'a' must be a list"),
        ({"samples": {"a": [0, -1]}}, "samples of 'a' must be a list"),
        ({"samples": {"a": [3, 3]}}, "document 3 twice"),
        ({"samples": {"a": [0]}, "limit": 3}, "samples and limit exclude each other"),
        ({"fewshot_as_multiturn": True}, "fewshot_as_multiturn needs apply_chat_template"),
        ({"engine": "vlm"}, "'engine' is 'vlm'"),
        ({"seed": [1, 2]}, "'seed'"),
    ],
)  # fmt: skip
def test_what_the_harness_does_not_take_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        _request(**changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_options_reach_the_stock_command_as_they_are(make: Callable[..., Request]) -> None:
    given = {
        "gen_kwargs": {"temperature": 0.5, "until": ["a b", "c,d"]},
        "system_instruction": "Think, then answer = yes.",
        "apply_chat_template": "short",
        "fewshot_as_multiturn": False,
        "samples": {PAIRS: [5, 1, 3]},
        "seed": 7,
        "max_batch_size": 32,
        "metadata": {"max_seq_lengths": [4096, 8192]},
        "confirm_run_unsafe_code": True,
    }
    arguments = {"max_length": 64, "enable_thinking": True, "think_end_token": "</think>"}
    plan = resolve_plan(make(recipes=["dense"], model_args=arguments, **given))
    (job,) = plan_jobs(plan)
    assert isinstance(job, ScoreJob) and job.shareable
    asked = _asked(job)
    for key in given.keys() - {"seed", "samples", "metadata"}:
        assert getattr(asked, key) == given[key], key
    assert asked.seed == [7] * 4
    assert asked.samples == {PAIRS: [1, 3, 5]}
    assert asked.metadata["max_seq_lengths"] == [4096, 8192]
    assert asked.model_args.items() >= arguments.items()


def test_a_task_has_options_of_its_own(make: Callable[..., Request]) -> None:
    own = {"task": STORY, "gen_kwargs": {"temperature": 0.5}, "limit": 3, "batch_size": 2}
    plan = resolve_plan(
        make(
            tasks=[own, PAIRS, {"task": ORDER, "samples": [4, 0]}],
            gen_kwargs={"max_gen_toks": 9},
            recipes=["dense"],
        )
    )
    assert plan.tasks == (PAIRS, STORY, ORDER)
    jobs = {job.evaluation.tasks: job for job in plan_jobs(plan) if isinstance(job, ScoreJob)}
    asked = {tasks: _asked(job) for tasks, job in jobs.items()}
    assert asked[(PAIRS,)].gen_kwargs == {"max_gen_toks": 9}
    assert (asked[(PAIRS,)].limit, asked[(PAIRS,)].batch_size) == (None, "16")
    assert asked[(STORY,)].gen_kwargs == {"max_gen_toks": 9, "temperature": 0.5}
    assert (asked[(STORY,)].limit, asked[(STORY,)].batch_size) == (3, "2")
    assert asked[(ORDER,)].samples == {ORDER: [0, 4]}
    assert len({job.name for job in jobs.values()}) == 3


def test_options_that_nobody_gave_leave_names_of_results_as_they_were(plan: Plan) -> None:
    """What earlier versions made is found again: they hashed these keys, and no others."""
    known = {"tasks", "tasks_sha256", "limit", "num_fewshot", "apply_chat_template", "batch_size",
             "dtype"}  # fmt: skip
    assert plan.evaluation.decisive.keys() == known
    allowed = plan.evaluation.model_copy(update={"confirm_run_unsafe_code": True})
    assert allowed.decisive == plan.evaluation.decisive
    warmer = plan.evaluation.model_copy(update={"gen_kwargs": {"temperature": 1}})
    assert warmer.decisive.keys() == {*known, "gen_kwargs"}
    old = {"tasks": ["a"], "tasks_sha256": "", "batch_size": "1", "include_path": "/x"}
    assert Evaluation.model_validate(old).include_path == ("/x",)


def test_another_way_of_asking_grows_a_folder(
    make: Callable[..., Request], plan: Plan, tmp_path: Path
) -> None:
    claim(tmp_path, plan)
    other = claim(tmp_path, resolve_plan(make(tasks=[{"task": PAIRS, "num_fewshot": None,
                                                       "seed": 3}])))  # fmt: skip
    run = RunPaths(tmp_path)
    names = {job.name for job in plan_jobs(other, run)} - {job.name for job in plan_jobs(plan, run)}
    assert len(names) == 3
    assert all(name.startswith("score-") for name in names)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": {PAIRS: [0, 100_000]}}, "document 100000 of 'streamline_demo_pairs', which"),
        ({"samples": {"streamline_demo_pair": [0]}}, "did you mean 'streamline_demo_pairs'"),
        ({"model_args": {"max_lenght": 3}}, "did you mean 'max_length'"),
        ({"model_args": {"revision": "x"}}, "give 'revision' itself"),
        ({"model_args": {"pretrained": "x"}}, "give the model itself"),
        ({"model_args": {"recipe": "x"}}, "--recipes"),
        ({"model_args": {"enable_thinking": True}}, "think_end_token"),
        ({"include_path": ["/no/such"]}, "/no/such"),
        ({"limit": 4, "tasks": [{"task": PAIRS, "samples": [0]}]}, "'streamline_demo_pairs': samp"),
    ],
)
def test_values_that_the_harness_could_not_use_are_refused(
    make: Callable[..., Request], changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(StreamlineBenchError) as caught:
        resolve_plan(make(**changes))
    assert sentence in str(caught.value)


def test_vllm_that_is_missing_is_a_sentence(
    make: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "vllm" else found(name, *a)
    )
    for changes in ({"engine": "vllm"}, {"tasks": [{"task": PAIRS, "engine": "vllm"}]}):
        with pytest.raises(MissingDependencyError, match="pip install 'streamline-bench"):
            resolve_plan(make(**changes))


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were installed: a plan needs its version and the names of its arguments only."""
    here = "streamline_bench.runs.planning.questions"
    monkeypatch.setattr(f"{here}.check_model_arguments", lambda *_, **__: None)
    monkeypatch.setattr(f"{here}._version", lambda engine: "0.29" if engine == "vllm" else None)


@pytest.mark.usefixtures("with_vllm")
def test_vllm_scores_by_its_own_class_and_its_noise_is_measured(
    make: Callable[..., Request],
) -> None:
    plan = resolve_plan(make(engine="vllm"))
    score = [job for job in plan_jobs(plan) if isinstance(job, ScoreJob)]
    assert [job.name for job in score] == [
        "score-dense", "score-first_layers", "score-last_layers", "noise-batch-size-8",
    ]  # fmt: skip
    asked = [_asked(job) for job in score]
    assert {each.model for each in asked} == {"streamline-vllm"}
    assert [each.batch_size for each in asked] == ["auto"] * 3 + ["8"]
    assert not any(job.shareable for job in score)
    usual = {job.key for job in plan_jobs(resolve_plan(make())) if isinstance(job, ScoreJob)}
    assert usual.isdisjoint(job.key for job in score)
    # Another engine is met only where it is asked for, and is named.
    arguments = {"max_length": 64, "enforce_eager": True}
    plan = resolve_plan(make(engine="vllm", noise_engine="hf", model_args=arguments))
    (noise,) = [job for job in plan_jobs(plan) if isinstance(job, ScoreJob) and job.noise]
    assert (noise.name, plan.noise[0].label) == ("noise-hf", "hf")
    asked_hf = _asked(noise)
    assert asked_hf.model == "streamline"
    assert asked_hf.model_args["max_length"] == 64
    assert "enforce_eager" not in asked_hf.model_args
    with pytest.raises(RecipeError, match="--noise-engine is vllm"):
        resolve_plan(make(engine="vllm", noise_engine="vllm"))


@pytest.mark.usefixtures("with_vllm")
def test_one_task_by_vllm_has_the_noise_of_vllm_alone(make: Callable[..., Request]) -> None:
    plan = resolve_plan(make(recipes=["dense"], tasks=[PAIRS, {"task": STORY, "engine": "vllm"}]))
    jobs = [job for job in plan_jobs(plan) if isinstance(job, ScoreJob)]
    found = {(job.noise is not None, job.evaluation.tasks): _asked(job).model for job in jobs}
    assert found == {
        (False, (PAIRS,)): "streamline",
        (False, (STORY,)): "streamline-vllm",
        (True, (STORY,)): "streamline-vllm",
    }


@pytest.mark.usefixtures("with_vllm")
def test_a_folder_has_one_engine_for_each_task(
    make: Callable[..., Request], plan: Plan, tmp_path: Path
) -> None:
    claim(tmp_path, plan)
    with pytest.raises(OutputError, match=r"streamline_demo_pairs.*transformers.*vLLM 0\.29"):
        claim(tmp_path, resolve_plan(make(engine="vllm")))
    more = resolve_plan(make(tasks=[PAIRS, {"task": ORDER, "engine": "vllm"}]))
    grown = claim(tmp_path, more)
    assert [each.engine for each in grown.questions] == ["hf", "vllm"]


def test_a_chat_template_by_name_must_be_there(
    make: Callable[..., Request], tiny_llama: Path, tmp_path: Path
) -> None:
    import shutil

    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())

    def refused(templates: Any, name: str) -> str:
        path.write_text(json.dumps({**config, "chat_template": templates}))
        plan = resolve_plan(make(model=str(model), recipes=["dense"], apply_chat_template=name))
        run = RunPaths(tmp_path / "run")
        try:
            check_before(plan, run, Execution(), until="report")
        except CheckpointError as error:
            return str(error)
        return ""

    one = "{{ messages[0]['content'] }}"
    named = [{"name": "default", "template": one}, {"name": "short", "template": one}]
    assert refused(named, "short") == ""
    assert "no chat template 'shrot'; did you mean 'short'" in refused(named, "shrot")
    assert "no chat template 'short'; it has one template" in refused(one, "short")
