"""The forecast of memory against what processes take, and what is decided by it."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from streamline_bench.cli.main import cli
from streamline_bench.compression import compress, load_recipe, placement
from streamline_bench.compression import forecast as forecast_module
from streamline_bench.compression.forecast import forecast
from streamline_bench.compression.pipeline import content_key
from streamline_bench.compression.placement import decide_placement
from streamline_bench.compression.recipes import applicable
from streamline_bench.core.checkpoint.folder import read_manifest
from streamline_bench.core.checkpoint.reader import CheckpointReader
from streamline_bench.core.training.block import Teacher
from streamline_bench.errors import OutputError, ResourceError
from streamline_bench.modeling.loading import SourceModel

VOCABULARY, SAMPLES, LENGTH = 8_000, 4, 32
WIDTH, INNER = 512, 1_408
GIVEN = {
    "calibration": "auto", "calibration.samples": SAMPLES, "sequence_length": LENGTH,
    "training.data.samples": 8, "training.data.sequence_length": LENGTH, "training.epochs": 1,
    "training.min_steps": 2, "training.batch_size": 2, "n_layers": 2,
    "recovery.training.data.samples": 8, "recovery.training.data.sequence_length": LENGTH,
    "recovery.training.epochs": 1, "recovery.training.min_steps": 2,
    "recovery.training.batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 layers in float16, large enough for its weights to count."""
    folder = tmp_path_factory.mktemp("half")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, **{f"w{i}": i + 2 for i in range(VOCABULARY - 2)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)
    rows = torch.randint(VOCABULARY - 2, (40, 60), generator=torch.Generator().manual_seed(0))
    texts = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows.tolist()]
    (folder / "calibration.jsonl").write_text("\n".join(texts) + "\n")
    return folder


APART = {
    "n_layers": 3, "replacement": "swiglu_res",
    "parameters.selection": {"method": "given_layers", "parameters": {"layers": [1, 3, 5]}},
}  # fmt: skip
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("shortgpt", "streamed", {}), ("shortgpt", "resident", {}), ("sleb", "streamed", {}),
    ("streamline", "streamed", {}), ("streamline_lm", "resident", APART),
    ("streamline_lm", "resident", {**APART, "objective": "kd"}),
    ("last_layers_lora", "resident", {}),
)  # fmt: skip

PROGRAM = """
import ctypes, gc, json, sys
from pathlib import Path

ctypes.CDLL(None).mallopt(-3, 1 << 17)  # freed blocks leave the process at once

sys.path.insert(0, sys.argv[1])
from streamed_memory import peaks_of
from streamline_bench.compression import compress
from streamline_bench.core.machine.environment import give_back_freed
from streamline_bench.core.recipe.schema import Recipe

model, folder = Path(sys.argv[2]), Path(sys.argv[3])
found = []
for number, (recipe, placement) in enumerate(json.loads(sys.stdin.read())):
    gc.collect()
    give_back_freed()
    out, cache = folder / f"out{number}", folder / f"cache{number}"
    kind = Recipe.model_validate(recipe)
    found.append(
        peaks_of(
            lambda: compress(model, kind, out, cache=cache, placement=placement, progress=False)
        )[1]
    )
print(json.dumps(found))
"""


def test_within_15_percent_of_what_a_process_takes(
    half_model: Path, tmp_path: Path, warm: Any
) -> None:
    """The most that the anonymous part of a process's resident set grows."""
    source = SourceModel.find(half_model, progress=False)
    cases = [
        (load_recipe(name, {**applicable(GIVEN, load_recipe(name)), **changes}), place)
        for name, place, changes in (CASES[0], *CASES)
    ]
    # The first one also takes what libraries set up once.
    jobs = [(recipe.model_dump(mode="json"), place) for recipe, place in cases]
    here = Path(__file__).parents[1] / "benchmarks"
    command = [sys.executable, "-c", PROGRAM, str(here), str(half_model), str(tmp_path)]
    ended = subprocess.run(
        command, input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    for (recipe, place), measured in zip(cases[1:], json.loads(ended.stdout)[1:], strict=True):
        where: dict[str, Any] = {"dtype": None, "streamed": place == "streamed"}
        expected = forecast(source, recipe, device="cpu", **where)
        assert expected.host_bytes == pytest.approx(measured, rel=0.15), (recipe.name, expected)


@pytest.mark.parametrize(
    ("changes", "cuts"),
    [
        ({}, 1),  # a block
        ({"parameters.selection": "shortgpt"}, 2),  # two layers, each with another before it
        ({"parameters.selection": "shortgpt", "n_layers": 4}, 2),  # 8 layers are not enough for 3
        ({"parameters.selection": "shortgpt", "replacement": "swiglu_res", "n_layers": 4}, 4),
        (APART, 3),
    ],
)
def test_replacements_trained_at_once_are_the_most_there_may_be(
    changes: dict[str, Any], cuts: int, half_model: Path
) -> None:
    given = {**applicable(GIVEN, load_recipe("streamline_lm")), **changes}
    source = SourceModel.find(half_model, progress=False)
    where: dict[str, Any] = {"device": "cpu", "dtype": None, "streamed": False}
    found = forecast(source, load_recipe("streamline_lm", given), **where)
    mlp = 3 * WIDTH * INNER + WIDTH
    of_one = mlp if "replacement" in changes else mlp + 4 * WIDTH**2 + WIDTH
    assert found.host["trained weights"] == cuts * of_one * 4


def test_states_that_a_training_of_several_epochs_keeps_in_files(half_model: Path) -> None:
    source = SourceModel.find(half_model, progress=False)

    def files(**changes: Any) -> int:
        given = {**GIVEN, "training.min_steps": 0, **changes}
        recipe = load_recipe("streamline", applicable(given, load_recipe("streamline")))
        where: dict[str, Any] = {"device": "cpu", "dtype": None, "streamed": False}
        return forecast(source, recipe, **where).files.get("hidden states", 0)

    # Both ends of the block, 8 sequences of 32 tokens, their channels in float32.
    assert files(**{"training.epochs": 3}) == 2 * 8 * 32 * WIDTH * 4
    assert files(**{"training.min_steps": 100}) == 2 * 8 * 32 * WIDTH * 4
    assert files(**{"training.epochs": 3, "training.cache_gb": 0}) == files() == 0
    listed = {"method": "given_layers", "parameters": {"layers": [1, 2, 4, 5]}}
    of_two = {"parameters.selection": listed, "n_layers": 2, "training.epochs": 3}
    assert files(**of_two) == 2 * 2 * 8 * 32 * WIDTH * 4


@pytest.mark.usefixtures("bare")
def test_an_accelerator_holds_layers_and_the_host_states(half_model: Path) -> None:
    source = SourceModel.find(half_model, progress=False)
    recipe = load_recipe("shortgpt", applicable(GIVEN, load_recipe("shortgpt")))
    layer = 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH)  # bytes in bfloat16
    where: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    found = forecast(source, recipe, **where, streamed=True)
    states = 10 * SAMPLES * LENGTH * WIDTH * 2
    assert found.device["weights of a layer"] == 2 * layer  # one computes, one is on its way
    assert found.device["embeddings"] == 2 * (VOCABULARY * WIDTH + WIDTH)
    assert found.host["the next layer"] == layer
    assert found.host["hidden states"] == states
    in_files = forecast(source, recipe, **where, streamed=True, budget=states - 1)
    assert (in_files.file_bytes, in_files.host_bytes) == (states, found.host_bytes - states)
    whole = forecast(source, recipe, **where, streamed=False)
    assert (
        whole.device["weights"]
        == whole.host["weights"]
        == 8 * layer + 2 * (2 * VOCABULARY * WIDTH + WIDTH)
    )


# -- what is decided by it -------------------------------------------------------------------------

GB = 10**9


def memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda device: free)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """What any compression takes counts nothing: it is more than small models."""
    for name in ("_LIBRARIES", "_BUFFERS"):
        monkeypatch.setattr(forecast_module, name, 0)


def need(source: SourceModel, recipe: Any, **changes: Any) -> int:
    given = {"device": "cpu", "dtype": None, "streamed": False, **changes}
    return forecast(source, recipe, **given).host_bytes


@pytest.fixture
def source(recipe_source: Path) -> SourceModel:
    return SourceModel.find(recipe_source, progress=False)


@pytest.mark.parametrize(("free", "streamed"), [(10 * GB, False), (0, True)])
@pytest.mark.usefixtures("bare")
def test_the_choice_follows_the_free_memory(
    free: int,
    streamed: bool,
    source: SourceModel,
    small: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = small("shortgpt")
    free = free or int((need(source, recipe, streamed=True) + need(source, recipe)) / 2 / 0.9)
    memory(monkeypatch, free)
    with caplog.at_level(logging.INFO, "streamline_bench"):
        chosen = decide_placement("auto", source, recipe, "cpu", None)
    assert chosen.streamed is streamed
    assert f"placement: {'streamed' if streamed else 'resident'}" in caplog.text
    assert f"of {free / 1e9:.3g} GB free on cpu" in caplog.text
    memory(monkeypatch, 10 * GB)
    allowed = decide_placement("auto", source, recipe, "cpu", None, memory=free)
    assert allowed.streamed is streamed
    # The result is the same, and so is its key: no placement in it.
    assert content_key(source, recipe) == content_key(source, recipe, device="cpu")


@pytest.mark.parametrize(
    ("name", "remedy"), [("last_layers_lora", "layer by layer.*lora"), ("shortgpt", "sequences")]
)
def test_a_model_that_fits_nowhere_is_refused_before_any_work(
    name: str,
    remedy: str,
    recipe_source: Path,
    small: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory(monkeypatch, 10**5)
    monkeypatch.setattr(CheckpointReader, "check_finite", lambda *_, **__: pytest.fail("work"))
    with pytest.raises(ResourceError, match=rf"needs 0\.\d+ GB.*0\.0001 GB are free.*{remedy}"):
        compress(recipe_source, small(name), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def of_four(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is one of four of a launch on one machine."""
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return monkeypatch


SPREAD = {
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "whole": {},
}


@pytest.mark.parametrize("by", SPREAD)
@pytest.mark.usefixtures("bare")
def test_each_of_several_processes_holds_its_part_of_a_training(
    half_model: Path, of_four: pytest.MonkeyPatch, by: str
) -> None:
    for name, value in SPREAD[by].items():
        of_four.setenv(name, value)
    source = SourceModel.find(half_model, progress=False)
    given = {**GIVEN, "recovery.kind": "full", "recovery.training.batch_size": 8}
    recipe = load_recipe("last_layers_lora", applicable(given, load_recipe("last_layers_lora")))
    found = forecast(source, recipe, device="cuda", dtype="float16", streamed=by != "whole")
    layer = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
    left = 6 * layer + 2 * VOCABULARY * WIDTH + WIDTH
    among = {"whole": (1, 1), "zero2": (1, 4)}.get(by, (4, 4))
    assert (found.stage, found.processes) == ("recovery", 4)
    assert found.device["trained weights"] == 4 * left // among[0]
    assert found.device["gradients"] == 4 * left // among[1]
    assert found.device["optimiser"] == 8 * left // among[1]
    assert "weights" not in found.device  # all are trained
    # Two of eight sequences, of whose positions no process holds more.
    assert found.device["logits"] == 2 * LENGTH * VOCABULARY * (2 + 12)
    if by == "fsdp":
        unit = max(layer, VOCABULARY * WIDTH + WIDTH)
        assert found.device["weights that are whole at a time"] == 2 * 4 * unit


@pytest.mark.usefixtures("bare")
def test_a_model_larger_than_one_gpu_fits_where_it_is_divided(
    half_model: Path, of_four: pytest.MonkeyPatch
) -> None:
    source = SourceModel.find(half_model, progress=False)
    recipe = load_recipe("last_layers_lora", applicable(GIVEN, load_recipe("last_layers_lora")))
    stored = source.reader.num_parameters * 2
    of_four.setattr(placement, "free_memory", lambda name: GB if name == "cpu" else stored * 3 // 4)
    with pytest.raises(ResourceError, match=r"in each of 4 processes.*FSDP2 or ZeRO-3"):
        decide_placement("auto", source, recipe, "cuda", "float16")
    for name, value in SPREAD["fsdp"].items():
        of_four.setenv(name, value)
    decided = decide_placement("auto", source, recipe, "cuda", "float16")
    assert decided.streamed
    assert decided.forecast.device_bytes < stored * 3 // 4
    layer = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
    assert decided.forecast.host["weights on the host"] == stored - 2 * 2 * layer
    of_four.setattr(placement, "free_memory", lambda name: GB if name == "cpu" else stored // 8)
    with pytest.raises(ResourceError, match=r"in each of 4 processes.*more GPUs"):
        decide_placement("auto", source, recipe, "cuda", "float16")


@pytest.mark.usefixtures("bare")
def test_half_the_precision_is_named_where_it_helps(
    source: SourceModel, small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small("last_layers_lora")
    halves = [need(source, recipe, dtype=dtype, at_once=1) for dtype in (None, "bfloat16")]
    memory(monkeypatch, int(sum(halves) / 2 / 0.9))
    with pytest.raises(ResourceError, match="give dtype bfloat16"):
        decide_placement("auto", source, recipe, "cpu", None)
    assert not decide_placement("auto", source, recipe, "cpu", "bfloat16").streamed


def test_asked_for_all_the_same(
    source: SourceModel,
    small: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory(monkeypatch, 10**5)
    chosen = decide_placement("resident", source, small("last_layers_lora"), "cpu", None)
    assert not chosen.streamed
    assert "memory may not suffice" in caplog.text


def test_too_little_disk_for_states_is_said_before_any_work(
    source: SourceModel,
    small: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = small("shortgpt")
    memory(monkeypatch, 10**5)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"hidden states .*1e-06 GB free.*free space"):
        decide_placement("streamed", source, recipe, "cpu", None, tmp_path / "work")


def test_a_small_text_needs_no_disk_for_the_samples_that_it_does_not_have(
    half_model: Path, tmp_path: Path
) -> None:
    source, text = SourceModel.find(half_model, progress=False), tmp_path / "text.txt"
    text.write_text("w1 " * 100)
    given = {"objective": "kd", "calibration": str(text), "training.data.samples": 10**6}
    recipe = load_recipe("streamline_lm", {**given, "training.data.sequence_length": LENGTH})
    where: dict[str, Any] = {"device": "cpu", "dtype": None, "streamed": False}
    kept = forecast(source, recipe, **where).files["logits of the dense model"]
    assert 100 * 65 * 8 <= kept < 400 * 65 * 8


def test_files_of_a_recovery_that_distils(
    recipe_source: Path,
    source: SourceModel,
    small: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The forecast against what lies in the work folder when the recovery begins.

    What an interrupted attempt left there counts as free for the next one.
    """
    given = {"data.samples": 12, "data.sequence_length": 16, "objective": "kd", "kd.top_k": 8}
    changes = {f"recovery.training.{key}": value for key, value in given.items()}
    recipe = small("last_layers_lora", n_layers=1, **changes)
    stopped = ResourceError("stopped")

    def stop(*_: object, **__: object) -> None:
        raise stopped

    monkeypatch.setattr("streamline_bench.methods.recovery.training.train_recovery", stop)
    options: dict[str, Any] = {"progress": False, "cache": tmp_path}
    with pytest.raises(ResourceError, match="stopped"):
        compress(recipe_source, recipe, tmp_path / "out", **options)
    expected = forecast(source, recipe, device="cpu", dtype=None, streamed=False).files
    logits = sum(path.stat().st_size for path in tmp_path.rglob("teacher_*.bin"))
    kept = sum(path.stat().st_size for path in tmp_path.rglob("compressed/*.safetensors"))
    assert expected["logits of the dense model"] == logits
    assert expected["compressed model"] == pytest.approx(kept, rel=0.15)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="stopped"):
        compress(recipe_source, recipe, tmp_path / "out", **options)
    with pytest.raises(OutputError, match=r"logits of the dense model.*lower kd\.top_k"):
        compress(recipe_source, recipe, tmp_path / "out", progress=False, cache=tmp_path / "other")


@pytest.mark.parametrize(("epochs", "cache"), [(3, 2e-5), (1, 2e-5), (1, 1.0), (2, 1.0)])
def test_how_often_a_training_reads_layers(
    epochs: int,
    cache: float,
    recipe_source: Path,
    source: SourceModel,
    small: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The forecast against the passes of the teacher."""
    changes = {"epochs": epochs, "cache_gb": cache, "validation_share": 0.4, "min_steps": 0}
    recipe = small("streamline", n_layers=1, **{f"training.{k}": v for k, v in changes.items()})
    passes: list[int] = []
    whole = Teacher.states_of

    def counted(self: Teacher, batches: Any, *rest: Any, **named: Any) -> None:
        passes.append(len(batches))
        whole(self, batches, *rest, **named)

    monkeypatch.setattr(Teacher, "states_of", counted)
    with caplog.at_level(logging.INFO, "streamline_bench"):
        compress(
            recipe_source, recipe, tmp_path / "out", placement="streamed", cache=tmp_path / "cache",
            progress=False,
        )  # fmt: skip
    times, size = forecast(source, recipe, device="cpu", dtype=None, streamed=True).reads
    assert times == len(passes) >= 2
    assert size <= times * source.reader.stored_bytes
    assert f"{times} times" in caplog.text


@pytest.mark.usefixtures("bare")
def test_smaller_micro_batches_give_the_same_steps(
    recipe_source: Path,
    source: SourceModel,
    small: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The weights of a training in quarters of micro-batches are the same up to rounding."""
    recipe, trained = small("streamline_lm"), []
    options: dict[str, Any] = {"progress": False, "cache": tmp_path / "cache"}
    whole = compress(recipe_source, recipe, tmp_path / "a", placement="resident", **options)
    least = need(source, recipe, at_once=1)
    memory(monkeypatch, int((least + need(source, recipe, at_once=2)) / 2 / 0.9))
    with caplog.at_level(logging.INFO, "streamline_bench"):
        split = compress(recipe_source, recipe, tmp_path / "b", placement="auto", **options)
    assert "computed 1 at a time" in caplog.text
    for folder in (whole, split):
        trained.append(load_file(folder / "model.safetensors"))
    before, after = (read_manifest(folder) for folder in (whole, split))
    assert before is not None and before.training and after is not None and after.training
    assert after.recipe == before.recipe
    assert after.training["steps"] == before.training["steps"]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_is_one_sentence(
    recipe_source: Path, small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 5 bytes")

    monkeypatch.setattr("streamline_bench.methods.tools.shared_scan.scan", run_out)
    with pytest.raises(ResourceError, match=r"ran out with placement resident.*forecast.*streamed"):
        compress(recipe_source, small("shortgpt"), tmp_path / "out", cache=tmp_path, progress=False)


@pytest.mark.usefixtures("bare")
def test_explain_prints_need_and_have(
    recipe_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointReader, "stored", lambda *_: pytest.fail("weights were read"))
    arguments = ["compress", str(recipe_source), "--recipe", "streamline", "--explain"]
    result = CliRunner().invoke(cli, [*arguments, "--calibration", "auto", "--n-layers", "1"])
    assert result.exit_code == 0, result.output
    for said in ("placement   resident", "cpu: need", "have", "optimiser", "per step"):
        assert said in result.output
