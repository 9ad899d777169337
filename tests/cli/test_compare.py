"""``streamline-bench compare``: options and plan files become one request; errors are sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.cli.compare import (
    parse_row,
    per_job,
    read_execution,
    read_options,
)
from streamline_bench.errors import RecipeError
from streamline_bench.runs.execution.options import Execution
from streamline_bench.runs.planning.request import Request, RowRequest
from streamline_bench.runs.run import CompareResult
from streamline_bench.stability.statistics.score import documents_needed


@pytest.fixture
def asked(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Request]:
    """Return a function: call the command with these options, return the request it makes."""

    def run(*options: object) -> Request:
        seen: list[Request] = []

        def compare_request(request: Request, output: Path, **_: object) -> CompareResult:
            seen.append(request)
            return CompareResult(run=output, report=output / "leaderboard.html")

        monkeypatch.setattr("streamline_bench.runs.run.compare_request", compare_request)
        ended = call("compare", *options, "-o", tmp_path / "run", "-q")
        assert ended.code == 0, ended.err
        return seen[0]

    return run


def test_options_become_a_request(asked: Callable[..., Request]) -> None:
    request = asked(
        "some/model", "--recipes", "dense, shortgpt", "--row", "half=shortgpt:sparsity=0.5",
        "--tasks", "piqa,hellaswag", "--n-layers", 4, "--calibration", "x.txt",
        "--limit", 10, "--num-fewshot", 5, "--batch-size", "auto:4", "--throughput", "hf",
        "--workload", "batch_sizes=[1, 2]", "--noise-floor",
    )  # fmt: skip
    assert request == Request(
        model="some/model",
        recipes=(
            "dense",
            "shortgpt",
            RowRequest(label="half", recipe="shortgpt", overrides={"sparsity": "0.5"}),
        ),
        tasks=("piqa", "hellaswag"),
        overrides={"n_layers": 4, "calibration": "x.txt"},
        limit=10,
        num_fewshot=5,
        batch_size="auto:4",
        throughput="hf",
        workload={"batch_sizes": [1, 2]},
        noise_floor=True,
    )


def test_what_is_sent_to_a_server(asked: Callable[..., Request], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("throughput: serve\nload: {requests: 64, concurrencies: [4]}\n")
    request = asked(
        "some/model", "--recipes", "dense", "--tasks", "piqa", "--plan", plan,
        "--load", "concurrencies=[1, 8]", "--load", "slo=ttft=500ms,tpot=50ms",
    )  # fmt: skip
    assert request.throughput == "serve"
    assert request.load == {
        "requests": 64, "concurrencies": [1, 8], "slo": "ttft=500ms,tpot=50ms"
    }  # fmt: skip


def test_the_bundled_model_brings_its_tasks_and_block_length(
    asked: Callable[..., Request],
) -> None:
    request = asked("bundled", "--recipes", "shortgpt", "--sparsity", 0.5)
    assert Path(request.model, "config.json").is_file()
    assert request.tasks == ("streamline_demo", "streamline_demo_generation")
    assert request.overrides == {"sequence_length": 128, "sparsity": 0.5}
    assert request.threads == 1
    assert request.text is None  # compared only if asked for
    own = asked("bundled", "--recipes", "shortgpt", "--tasks", "piqa", "--threads", 2)
    assert (own.tasks, own.threads) == (("piqa",), 2)


def test_options_win_over_the_plan_file(asked: Callable[..., Request], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "model: some/model\ntasks: [piqa]\nrecipes: [shortgpt]\nlimit: 5\n"
        "set: {sparsity: 0.25, seed: 3}\n",
        encoding="utf-8",
    )
    request = asked("--plan", plan, "--limit", 7, "--n-layers", 2, "--row", "b=sleb")
    assert (request.model, request.tasks, request.limit) == ("some/model", ("piqa",), 7)
    assert request.recipes == ("shortgpt", RowRequest(label="b", recipe="sleb"))
    # The two sizes are alternatives: the option's replaces the plan's.
    assert request.overrides == {"seed": 3, "n_layers": 2}
    assert asked("other/model", "--plan", plan).model == "other/model"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give MODEL"),
        (["some/model", "--tasks", "piqa"], "give --recipes"),
        (["some/model", "--recipes", "dense"], "give --tasks"),
        (["bundled", "--recipes", "shortgtp"], "did you mean 'shortgpt'"),
        (["bundled", "--recipes", "dense", "--row", "x"], "LABEL=RECIPE"),
        (["bundled", "--recipes", "dense", "--batch-size", "many"], "batch_size"),
        (["no/such/model", "--recipes", "dense", "--tasks", "t"], "no/such/model"),
        (["bundled", "--recipes", "dense", "--gpus", "0", "--gpus-per-job", "2"], "names 1 GPUs"),
        (
            ["bundled", "--recipes", "dense", "--gpus", "0", "--device", "cuda:1"],
            "give --device cuda",
        ),
        (["--plan", "no-such-plan"], "Unknown plan"),
        (["bundled", "--recipes", "dense", "--n-layers", "2"], "'n_layers' has no effect"),
        (["bundled", "--recipes", "last_layers", "--calibration", "t.txt"], "'calibration' has no"),
        (["bundled", "--recipes", "last_layers", "--limit", "2.5"], "whole number"),
        (["bundled", "--recipes", "last_layers", "--tasks", "a,b,a"], "'a' is given twice"),
        (["bundled", "--recipes", "dense", "--include-path", "/no/such"], "--include-path"),
    ],
)
def test_what_cannot_be_run_is_one_sentence_and_exit_code_2(
    call: Callable[..., Any], tmp_path: Path, options: list[str], sentence: str
) -> None:
    ended = call("compare", *options, "-o", tmp_path / "run", "-q")
    assert ended.code == 2
    assert sentence in ended.err
    assert ended.err.startswith("streamline-bench: ")
    assert "Traceback" not in ended.err
    assert not (tmp_path / "run" / "plan.yaml").exists()


def test_options_of_the_text(asked: Callable[..., Request]) -> None:
    request = asked(
        "some/model", "--recipes", "dense", "--tasks", "piqa", "--text", "held_out.jsonl",
        "--text-field", "story", "--text-documents", 50, "--text-window", 256,
    )  # fmt: skip
    asked_for = (request.text, request.text_field, request.text_documents, request.text_window)
    assert asked_for == ("held_out.jsonl", "story", 50, 256)
    assert asked("bundled", "--recipes", "shortgpt").text is None  # nobody asked for it
    bundled = asked("bundled", "--recipes", "shortgpt", "--text", "bundled")
    assert bundled.text is not None
    assert Path(bundled.text).is_file()
    assert bundled.text_window == 128


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist; give a .txt"),
        ("", "holds no document"),
        ('{"story": "w1 w2"}\n{"story": ', "Line 2"),
        ('{"other": "w1 w2"}\n', "no field 'story'; it has other"),
        ('{"story": "w1 w2"}\n{"story": 3}\n', "holds int, not text"),
    ],
)
def test_a_text_that_is_missing_or_damaged_is_refused_before_anything_runs(
    call: Callable[..., Any],
    tiny_llama: Path,
    tmp_path: Path,
    content: str | None,
    sentence: str,
) -> None:
    story_file = tmp_path / "stories.jsonl"
    if content is not None:
        story_file.write_text(content, encoding="utf-8")
    ended = call(
        "compare", tiny_llama, "--recipes", "last_layers", "--n-layers", 2,
        "--tasks", "streamline_demo_pairs", "--text", story_file, "--text-field", "story",
        "-o", tmp_path / "run", "-q",
    )  # fmt: skip
    assert ended.code == 2
    assert sentence in ended.err
    assert ended.err.startswith("streamline-bench: ")
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run" / "plan.yaml").exists()


def test_how_it_is_run_is_no_part_of_the_request() -> None:
    options = {
        "executor": "ray", "ray_address": "10.0.0.1:6379", "workers": 3,
        "cpus_per_job": "8,compress=2", "gpus": "0, 1", "gpus_per_job": "1,compress=2",
        "slurm": ("partition=a", "--mem-per-gpu=1G"), "retries": 5, "timeout": 60.0, "trunk": False,
        "placement": "streamed",
    }  # fmt: skip
    assert read_execution(options) == Execution(
        executor="ray", ray_address="10.0.0.1:6379", cpus_per_job=8, workers=3, gpus=("0", "1"),
        cpus_by_kind={"compress": 2}, gpus_per_job=1, gpus_by_kind={"compress": 2},
        slurm={"partition": "a", "mem_per_gpu": "1G"}, retries=5, timeout=60.0, trunk=False,
        placement="streamed",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workload", "rounds=3"], "--workload has no effect here; it needs --throughput"),
        (["--throughput", "vllm", "--load", "requests=8"], "--load has no effect here; it needs"),
        (["--text-window", "64"], "--text-window has no effect here; it needs --text"),
        (["--executor", "ray", "--workers", "3"], "--workers has no effect here"),
        (["--executor", "ray", "--gpus", "0"], "--gpus has no effect here"),
        (["--ray-address", "auto"], "--ray-address has no effect here; it needs"),
        (["--cpus-per-job", "2"], "--cpus-per-job has no effect here"),
        (["--throughput", "hf", "--workload", "rounds"], "Invalid value for --workload"),
        (["--throughput", "hf", "--workload", "rounds=[1"], "'[1' for 'rounds'"),
        (["--set", "seed"], "Invalid value for --set"),
        (["--device", "cud"], "Invalid value for '--device': 'cud' is not a device"),
        (["--until", "compress", "--throughput", "hf"], "Note: --throughput: not measured"),
    ],
)
def test_options_without_effect_or_form_are_refused(
    call: Callable[..., Any], tmp_path: Path, options: list[str], sentence: str
) -> None:
    ended = call(
        "compare", "m", "--recipes", "dense", "--tasks", "t", *options, "-o", tmp_path / "run"
    )
    assert ended.code == 2
    assert sentence in " ".join(ended.err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "asked_for"),
    [
        (["--noise-batch-size", "4"], (False, "4", None, None)),
        (["--noise-dtype", "bfloat16"], (False, None, "bfloat16", None)),
        (["--noise-engine", "vllm"], (False, None, None, "vllm")),
        (["--noise-floor", "--noise-dtype", "float16"], (True, None, "float16", None)),
    ],
)
def test_each_kind_of_repetition_can_be_asked_for_alone(
    asked: Callable[..., Request], given: list[str], asked_for: tuple[Any, ...]
) -> None:
    found = asked("some/model", "--recipes", "dense", "--tasks", "piqa", *given)
    kinds = (found.noise_floor, found.noise_batch_size, found.noise_dtype, found.noise_engine)
    assert kinds == asked_for


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("recipes: dense,streamline", "'recipes' must be a list, such as"),
        ("tasks: piqa", "'tasks' must be a list"),
        ("set: [seed]", "'set' must be a mapping"),
        ("workload: [1, 2]", "'workload' must be a mapping"),
        ("load: [1, 2]", "'load' must be a mapping"),
    ],
)
def test_a_plan_of_other_kinds_of_values(
    call: Callable[..., Any], tmp_path: Path, line: str, sentence: str
) -> None:
    keys = {"recipes": "[dense]", "tasks": "[t]", line.partition(":")[0]: line.partition(": ")[2]}
    text = "".join(f"{key}: {value}\n" for key, value in {"model": "m", **keys}.items())
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    ended = call(
        "compare", "--plan", tmp_path / "plan.yaml", "--row", "a=sleb", "--set", "seed=1",
        "--throughput", "hf", "--workload", "rounds=3", "-o", tmp_path / "run",
    )  # fmt: skip
    assert ended.code == 2
    assert ended.err.startswith("streamline-bench: Plan ")
    assert sentence in ended.err


def test_an_open_device_is_an_answer(asked: Callable[..., Request], tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("model: m\ntasks: [t]\nrecipes: [dense]\ndevice: cuda:1\n", encoding="utf-8")
    assert asked("--plan", plan).device == "cuda:1"
    assert asked("--plan", plan, "--device", "auto").device == "auto"
    assert asked("--plan", plan, "--device", "cpu:0").device == "cpu"


def test_a_zero_is_a_value(asked: Callable[..., Request]) -> None:
    request = asked("bundled", "--recipes", "dense", "--num-fewshot", 0)
    assert request.num_fewshot == 0


def test_metrics_of_the_command_count_before_those_of_the_plan(
    asked: Callable[..., Request], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "model: m\ntasks: [t]\nrecipes: [dense]\nmetrics: {t: f1, u: em}\n", encoding="utf-8"
    )
    assert asked("--plan", plan, "--metric", "t=acc").metrics == {"t": "acc", "u": "em"}
    assert asked("--plan", plan, "--pair", "t=c").pairs == {"t": "c"}


def test_the_plan_is_named_where_it_is_wrong(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("model: m\ntasks: [t]\nrecipes: [dense]\nlimit: -3\n", encoding="utf-8")
    options = {"rows": (), "assignments": (), "workload": (), "sparsity": None, "n_layers": None}
    with pytest.raises(RecipeError, match=r"plan\.yaml: 'limit' is -3"):
        read_options(None, str(plan), options)


@pytest.mark.parametrize("as_json", [False, True])
def test_failed_rows_are_named_and_the_exit_code_is_1(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool
) -> None:
    result = CompareResult(
        run=tmp_path,
        report=tmp_path / "leaderboard.html",
        failures={"laco": "Too \x1b[31mfew layers."},
        reasons={"noise": "It ran \x1b[31mlonger than 5 s (--timeout).", "text-sleb": "No tokens."},
        alone={
            "a": "it shares \x1b[31mno layer",
            "b": "its family",
            "c": "it shares \x1b[31mno layer",
        },
        left_out={"empty\x1b[31m": "it yielded no documents"},
        jobs={"compress-laco": "failed", "noise": "failed", "text-sleb": "failed"},
    )
    monkeypatch.setattr("streamline_bench.runs.run.compare_request", lambda *_, **__: result)
    options = ["--json"] if as_json else []
    ended = call("compare", "bundled", "--recipes", "laco", "-o", tmp_path / "run", *options)
    assert ended.code == 1
    assert "\x1b" not in ended.err + ended.out
    if as_json:
        shown = json.loads(ended.out)
        assert shown["jobs"]["compress-laco"] == "failed"
        assert list(shown["reasons"]) == ["noise", "text-sleb"]
        assert shown["alone"]["b"] == "its family"
        assert list(shown["left_out"].values()) == ["it yielded no documents"]
        assert shown["failures"]["laco"].startswith("Too")
    else:
        assert "laco failed: Too" in ended.err
        assert "noise failed: It ran" in ended.err
        assert "is not compared: it yielded no documents" in ended.err
        assert "text-sleb failed: No tokens." in ended.err
        assert "a, c: scored alone (it shares" in ended.err
        assert "b: scored alone (its family)" in ended.err
        assert f"Open {result.report}" in ended.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=shortgpt", RowRequest(label="a", recipe="shortgpt")),
        ("a=my.yaml", RowRequest(label="a", recipe="my.yaml")),
        (
            "a=streamline:sparsity=0.5,training.lr=1e-3",
            RowRequest(
                label="a",
                recipe="streamline",
                overrides={"sparsity": "0.5", "training.lr": "1e-3"},
            ),
        ),
    ],
)
def test_a_row_as_text(text: str, expected: RowRequest) -> None:
    assert parse_row(text) == expected


@pytest.mark.parametrize("text", ["shortgpt", "=shortgpt", "a=", "a=shortgpt:", "a=b:sparsity"])
def test_a_row_that_is_none(text: str) -> None:
    with pytest.raises(RecipeError, match=r"LABEL=RECIPE|KEY=VALUE"):
        parse_row(text)


def test_cpus_as_text() -> None:
    assert per_job("--cpus-per-job", "3") == (3, {})
    assert per_job("--gpus-per-job", "measure=16") == (None, {"measure": 16})
    assert per_job("--cpus-per-job", "8, compress=2") == (8, {"compress": 2})


@pytest.mark.parametrize("text", ["", "x", "2,", "=2", "compress=", "compress=two", "-1", "1.5"])
def test_what_is_no_number_of_cpus(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is neither a number nor such as '8,compress=2'\.$"):
        per_job("--cpus-per-job", text)


def test_a_finished_comparison_ends_with_its_table(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: Path
) -> None:
    board = repository / "reports" / "demo" / "leaderboard.json"
    (tmp_path / "leaderboard.json").write_bytes(board.read_bytes())
    result = CompareResult(
        run=tmp_path,
        report=tmp_path / "leaderboard.html",
        ignored_options=["--num-fewshot 3 had no effect on 1 tasks; examples used: a 0."],
    )
    monkeypatch.setattr("streamline_bench.runs.run.compare_request", lambda *_, **__: result)
    ended = call("compare", "bundled", "--recipes", "dense", "-o", tmp_path / "run")
    lines = ended.out.splitlines()
    assert "verdict" in lines[0]
    labels = {row["label"] for row in json.loads(board.read_bytes())["rows"]}
    assert labels <= {line.split()[0] for line in lines}
    assert lines[-1] == f"Open {result.report}"
    assert "\x1b" not in ended.out
    assert "--num-fewshot 3" in ended.err


@pytest.mark.parametrize(
    "typo", [["--tasks", "piqaa"], ["--recipes", "sleb,shortgp"], ["--set", "x=1"]]
)
def test_a_typo_costs_no_heavy_import(tmp_path: Path, typo: list[str]) -> None:
    arguments = [
        "compare",
        "bundled",
        "--recipes",
        "dense,sleb",
        *typo,
        "-o",
        str(tmp_path / "run"),
    ]
    code = (
        "import sys\n"
        "from streamline_bench.cli.main import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit as ended:\n    assert ended.code == 2\n"
        "print(sorted({'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr.startswith("streamline-bench: Unknown")


def test_the_size_of_a_run_is_planned(call: Callable[..., Any]) -> None:
    ended = call("compare", "--plan-size", "difference=0.02,discordance=0.12")
    needed = documents_needed(0.02, 0.12)
    assert ended.code == 0 and ended.out.startswith(f"{needed:,} documents")
    more = call("compare", "--plan-size", "difference=0.02,discordance=0.12,power=0.95")
    assert int(more.out.split()[0].replace(",", "")) > needed


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("difference=0.02", "discordance"),
        ("difference=2 points,discordance=0.1", "2 points"),
        ("difference=0,discordance=0.1", "difference 0"),
        ("difference=0.02,discordance=12", "discordance 12"),
        ("difference=0.02,discordance=0.1,powr=0.9", "powr"),
    ],
)
def test_a_wrong_size_is_named(call: Callable[..., Any], given: str, named: str) -> None:
    ended = call("compare", "--plan-size", given)
    assert ended.code == 2 and named in ended.err
