"""What is wrong with a request is said in a sentence before a folder is claimed."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.core.checkpoint.folder import file_sha256
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.errors import EvaluationError, RecipeError, ThroughputError
from streamline_bench.runs.folder import RunPaths
from streamline_bench.runs.jobs.planned import measure_jobs, plan_jobs
from streamline_bench.runs.jobs.score import ScoreJob
from streamline_bench.runs.planning.plan import Evaluation
from streamline_bench.runs.planning.request import Request, make_request
from streamline_bench.runs.planning.resolve import resolve_plan
from streamline_bench.runs.run import compare_request


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"tasks": ["streamline_demo_pair"]}, EvaluationError, "mean 'streamline_demo_pairs'"),
        ({"num_fewshot": 3}, RecipeError, "--num-fewshot 3 .*streamline_demo_pairs"),
        ({"tasks": ["local_piqa"]}, EvaluationError, "local_piqa.*piqa_val.*BENCH_DATA"),
        ({"tasks": ["piqa"], "environment": {"HF_HUB_OFFLINE": "1", "HF_HOME": "/none"}},
         EvaluationError, "'piqa'.*not in the cache.*HF_HUB_OFFLINE"),
        ({"metrics": {"streamline_demo_pair": "acc"}}, RecipeError,
         "--metric streamline_demo_pair=acc.*mean 'streamline_demo_pairs'"),
        ({"pairs": {"streamline_demo_pairs": "streamline_demo_pear"}}, RecipeError,
         "--pair streamline_demo_pairs=streamline_demo_pear.*'streamline_demo_pear'"),
        ({"device": "cud"}, RecipeError, "'cud' is not a device"),
        ({"device": "cuda:9"}, RecipeError, "--device is cuda:9 and this process sees no cuda"),
        ({"noise_dtype": "flot"}, RecipeError, "'flot'.*dtype"),
        ({"throughput": "serve", "load": {"prefix_tokens": 128}}, ThroughputError,
         "shared prefix of 128 tokens.*shorter"),
        ({"throughput": "hf", "workload": {"round": 3}}, RecipeError,
         "--workload: unknown key 'round'; did you mean 'rounds'"),
        ({"throughput": "hf", "workload": {"xyz": 3}}, RecipeError, "'xyz'; known: batch_sizes,"),
        ({"throughput": "hf", "load": {"requests": 3}}, RecipeError, "--load .*--throughput serve"),
        ({"throughput": "serve", "workload": {"rounds": 3}}, RecipeError, "--workload rounds"),
        ({"throughput": "serve", "load": {"request": 3}}, RecipeError,
         "--load: unknown key 'request'; did you mean 'request"),
        ({"throughput": "serve", "load": {"slo": "tpot=5h"}}, ThroughputError, "'tpot=5h'"),
        ({"throughput": "serve", "load": {"prompts": "/no/such.jsonl"}}, ThroughputError,
         "no/such.jsonl"),
    ],
)  # fmt: skip
def test_nothing_is_claimed_for_what_cannot_be_run(
    make: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("STREAMLINE_BENCH_DATA", raising=False)
    with pytest.raises(error, match=sentence):
        compare_request(make(**changes), tmp_path / "run", until="compress", progress=False)
    assert not (tmp_path / "run" / "plan.yaml").exists()


def test_a_number_of_examples_that_only_some_tasks_take_is_said(
    make: Callable[..., Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "one", "answer": "two"}\n')
    task = f"""
        task: takes_examples
        dataset_path: json
        dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
        training_split: train
        test_split: test
        output_type: generate_until
        doc_to_text: "{{{{question}}}}"
        doc_to_target: "{{{{answer}}}}"
    """
    (tmp_path / "takes_examples.yaml").write_text(textwrap.dedent(task), encoding="utf-8")
    asked = make(tasks=["streamline_demo_pairs", "takes_examples"], include_path=str(tmp_path))
    for number, said in ((None, 0), (3, 1)):
        caplog.clear()
        resolve_plan(asked.model_copy(update={"num_fewshot": number}))
        found = [r.getMessage() for r in caplog.records if "--num-fewshot 3" in r.getMessage()]
        assert len(found) == said
    assert "streamline_demo_pairs" in found[0] and "takes_examples" not in found[0]


def test_tasks_that_run_code_need_the_switch_of_the_harness(
    make: Callable[..., Request], tmp_path: Path
) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "one", "answer": "two"}\n')
    task = f"""
        task: runs_code
        unsafe_code: true
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {data}}}}}
        test_split: test
        output_type: generate_until
        doc_to_text: question
        doc_to_target: answer
    """
    (tmp_path / "runs_code.yaml").write_text(textwrap.dedent(task), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"'runs_code'.*confirm_run_unsafe_code"):
        resolve_plan(make(tasks=["runs_code"], include_path=str(tmp_path)))


def test_metrics_are_part_of_the_plan(make: Callable[..., Request]) -> None:
    asked = make(metrics={"streamline_demo_pairs": "acc_norm"})
    assert resolve_plan(asked).metrics == {"streamline_demo_pairs": "acc_norm"}


def test_pairs_are_part_of_the_plan(make: Callable[..., Request]) -> None:
    tasks = ["streamline_demo_recall", "streamline_demo_pairs"]
    pair = {"streamline_demo_recall": "streamline_demo_pairs"}
    assert resolve_plan(make(tasks=tasks, pairs=pair)).pairs == pair


def test_auto_is_what_the_machine_has(
    make: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_plan(make(device="auto")).device == "cuda"
    assert resolve_plan(make(device="auto"), device="cpu").device == "cpu"
    assert resolve_plan(make(device="cpu"), device="cuda").device == "cpu"


def test_a_plan_of_several_rows_reads_each_file_of_the_model_once(
    make: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "one"}')
    hashed: list[Path] = []
    fingerprints: list[Path] = []
    fingerprint = CheckpointReader.fingerprint

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    def of_weights(reader: CheckpointReader, progress: bool = True) -> str:
        fingerprints.append(reader.folder)
        return fingerprint(reader, progress)

    monkeypatch.setattr("streamline_bench.modeling.loading.file_sha256", counted)
    monkeypatch.setattr(CheckpointReader, "fingerprint", of_weights)
    rows = ["streamline_none", "shortgpt", "sleb", "last_layers", "random_layers"]
    plan = resolve_plan(
        make(recipes=["dense", *rows], set={"n_layers": 2, "calibration": str(text)})
    )
    assert len({row.key for row in plan.rows}) == 6
    assert len(fingerprints) == 1
    assert len(hashed) == len(set(hashed))
    assert {path.name for path in hashed} >= {"tokenizer.json", "texts.jsonl"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipes": [{"recipe": "shortgpt", "sett": {"seed": 1}}]},
         "unknown key 'recipes.0.sett'; did you mean 'set'"),
        ({"recipes": [{"label": "x"}]}, "'recipes.0"),
        ({"limits": 3}, "unknown key 'limits'; did you mean 'limit'"),
        ({"limit": float("inf")}, "'limit' is inf: Input should be a finite number"),
        ({"limit": float("nan")}, "'limit' is nan"),
    ],
)  # fmt: skip
def test_a_request_that_is_none(changes: dict[str, Any], sentence: str) -> None:
    payload = {"model": "m", "recipes": ["dense"], "tasks": ["t"], **changes}
    with pytest.raises(RecipeError) as caught:
        make_request(payload, "Plan p.yaml")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("limit", "written"), [(100, "100"), (1234567, "1234567"), (0.125, "0.125"), (1e-7, "1e-07")]
)
def test_a_limit_is_handed_on_exactly(limit: float, written: str) -> None:
    evaluation = Evaluation(tasks=("t",), tasks_sha256="", batch_size="1", limit=limit)
    job = ScoreJob(key="k", model="m", label="dense", dense=True, device="cpu",
                   evaluation=evaluation)  # fmt: skip
    command = job.harness_command(RunPaths(Path("run")), Path("o"))
    assert command[command.index("--limit") + 1] == written
    assert float(written) == limit


def test_the_users_task_folder_comes_beside_ours(
    make: Callable[..., Request], tasks: Path, tmp_path: Path
) -> None:
    names = ["words", "streamline_demo_pairs"]
    plan = resolve_plan(make(recipes=["dense"], tasks=names, include_path=str(tasks)))
    (job,) = plan_jobs(plan)
    assert isinstance(job, ScoreJob)
    command = job.reader_command(RunPaths(tmp_path))
    assert command.startswith("streamline-bench lm-eval --model streamline ")
    assert f"--include_path {tasks} --tasks words,streamline_demo_pairs" in command
    (job,) = plan_jobs(resolve_plan(make(recipes=["dense"], tasks=names[1:])))
    assert isinstance(job, ScoreJob)
    assert job.reader_command(RunPaths(tmp_path)).startswith("lm_eval --model streamline ")


def test_changed_data_elsewhere_is_another_plan(
    make: Callable[..., Request], tasks: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    shutil.move(tasks / "words.jsonl", elsewhere)
    yaml = (tasks / "words.yaml").read_text(encoding="utf-8")
    (tasks / "words.yaml").write_text(
        yaml.replace(str(tasks / "words.jsonl"), str(elsewhere)), encoding="utf-8"
    )
    (tasks / "_all.yaml").write_text("group: all_words\ntask: [words]\n", encoding="utf-8")

    def key(*names: str) -> str:
        request = make(tasks=list(names), include_path=str(tasks))
        return resolve_plan(request).evaluation.tasks_sha256

    asked = [("words",), ("all_words",), ("wor*",), (str(tasks / "words.yaml"),)]
    before = [key(*names) for names in asked]
    packaged = key("streamline_demo_pairs")
    text = elsewhere.read_text(encoding="utf-8")
    elsewhere.write_text(text.replace("w9 w4", "w9 w8"), encoding="utf-8")
    assert all(key(*names) != old for names, old in zip(asked, before, strict=True))
    assert key("streamline_demo_pairs") == packaged  # which reads none of it


def test_a_served_run_is_measured_again_where_load_or_prompts_changed(
    make: Callable[..., Request], tmp_path: Path
) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "a b"}\n')

    def key(**load: Any) -> str:
        plan = resolve_plan(make(throughput="serve", load={"concurrencies": [1, 2], **load}))
        assert plan.load["request_rates"] == [], "only what was asked for"
        (job,) = measure_jobs(plan, ["dense", "last_layers"], 1)
        return job.key

    first, own = key(), key(prompts=str(prompts))
    assert first == key() != key(requests=8) and first != own
    prompts.write_text('{"prompt": "a c"}\n')
    assert key(prompts=str(prompts)) != own
