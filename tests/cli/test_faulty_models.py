"""Every entrance, given a faulty model, ends with one sentence and exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from streamline_bench.cli.main import COMMANDS
from streamline_bench.compression import compress, compress_cached, load_recipe
from streamline_bench.core.data.calibration import load_calibration
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.divergence import token_divergence
from streamline_bench.errors import (
    MissingDependencyError,
    ResourceError,
    StreamlineBenchError,
    library_errors,
    out_of_memory,
)
from streamline_bench.harness.bridge import MODELS
from streamline_bench.harness.lm import StreamlineLM
from streamline_bench.modeling.loading import load_config, load_model, load_tokenizer
from streamline_bench.opencompass import evaluate as run_folder
from streamline_bench.opencompass import execution
from streamline_bench.opencompass.engine import ScoredText
from streamline_bench.opencompass.prompts import load_prompt_tokenizer
from streamline_bench.opencompass.source import entry_source
from streamline_bench.opencompass.transformers_engine import TransformersEngine, load_causal_model
from streamline_bench.runs.run import compare
from streamline_bench.stability.readers.load import load_samples

WITHOUT_MODEL = {"cache", "demo", "gate", "lm-eval", "recipes", "report", "stability", "tasks"}
"""Commands that are given no model folder; their own tests give them faulty files."""

SMALL = ("--calibration", "TEXT", "--set", "sequence_length=32", "--set", "calibration_samples=4")
CALLS: dict[str, tuple[str, ...]] = {
    "architecture": ("MODEL",),
    "compress": ("MODEL", "-o", "OUT", "--recipe", "streamline_none", "--n-layers", "1", *SMALL),
    "compare": ("MODEL", "--recipes", "dense,first_layers", "--n-layers", "1", "--tasks",
                "streamline_demo", "-o", "OUT"),
    "divergence": ("MODEL", "MODEL", "TEXT", "--window", "32"),
    "opencompass": ("MODEL", "--recipes", "dense", "--datasets", "bundled", "-o", "OUT"),
    "scan": ("MODEL", "--calibration", "TEXT", "--samples", "4", "-o", "OUT"),
    "throughput": ("MODEL", "--batch", "1", "--device", "cpu", "--prompt-tokens", "8",
                   "--output-tokens", "8", "--blocks", "1"),
}  # fmt: skip


def _change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:7]
    save_file(weights, path, metadata={"format": "pt"})


def _add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append(
        {"id": 100, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    )  # fmt: skip
    path.write_text(json.dumps(tokenizer))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no such value": (lambda folder: _change_config(folder, hidden_size="wide"), "hidden_size"),
    "layer_types too long": (
        lambda folder: _change_config(folder, layer_types=["full_attention"] * 7), "layer_type",
    ),
    "other shapes": (_change_weights, "MODEL"),
    "quantised": (
        lambda folder: _change_config(folder, quantization_config={"quant_method": "gptq"}),
        "gptq",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}") and None, "token"),
    "token without embedding": (_add_token, "<image>"),
}  # fmt: skip


@pytest.fixture(params=FAULTS)
def faulty(request: pytest.FixtureRequest, make_tiny_model: Any, tmp_path: Path) -> Any:
    """Return the folder of a model with one fault, a text, and what must be named."""
    source = make_tiny_model("qwen3", head_dim=8)
    folder = Path(shutil.copytree(source, tmp_path / "faulty"))
    damage, named = FAULTS[request.param]
    damage(folder)
    text = tmp_path / "text.jsonl"
    lines = [" ".join(f"w{(i * 7 + j) % 96}" for j in range(20)) for i in range(40)]
    image = "<image> " if request.param == "token without embedding" else ""
    text.write_text("".join(json.dumps({"text": image + line}) + "\n" for line in lines))
    return folder, text, str(folder) if named == "MODEL" else named


def test_every_command_is_in_one_of_the_two_lists() -> None:
    assert set(CALLS) | WITHOUT_MODEL == set(COMMANDS)
    assert not set(CALLS) & WITHOUT_MODEL


@pytest.mark.parametrize("command", ["compress", "divergence", "scan"])
def test_commands_that_load_the_model_end_with_one_sentence(
    call: Callable[..., Any], faulty: Any, tmp_path: Path, command: str
) -> None:
    folder, text, named = faulty
    words = {"MODEL": str(folder), "TEXT": str(text), "OUT": str(tmp_path / "out")}
    ended = call(command, *(words.get(part, part) for part in CALLS[command]), "-q")
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert ended.code == 2, ended
    assert lines[-1].startswith("streamline-bench: ")
    assert named in lines[-1]
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_the_streamed_scan_as_well(call: Callable[..., Any], faulty: Any, tmp_path: Path) -> None:
    folder, text, _ = faulty
    ended = call(
        "scan",
        folder,
        "--placement",
        "streamed",
        "--calibration",
        text,
        "-o",
        tmp_path / "out",
        "-q",
    )
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err


def test_the_architecture_of_a_faulty_model(call: Callable[..., Any], faulty: Any) -> None:
    """It reads no weights: a fault in them alone is not seen."""
    ended = call("architecture", faulty[0])
    assert ended.code in (0, 2), ended
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("command", ["compare", "throughput"])
def test_commands_that_start_processes_end_with_the_reason(
    call: Callable[..., Any], make_tiny_model: Any, tmp_path: Path, command: str
) -> None:
    """One fault: what a process of its own says comes back as a row's reason or as the sentence."""
    folder = make_tiny_model("qwen3", head_dim=8)
    _change_config(folder, hidden_size="wide")
    words = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    ended = call(command, *(words.get(part, part) for part in CALLS[command]))
    assert ended.code in (1, 2), ended
    assert "Traceback" not in ended.err + ended.out
    assert "hidden_size" in ended.err + ended.out


def test_library_functions_raise_our_errors(faulty: Any, tmp_path: Path) -> None:
    folder, text, named = faulty
    recipe = load_recipe(
        "streamline_none",
        {"n_layers": 1, "calibration": str(text), "sequence_length": 32, "calibration_samples": 4},
    )
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    functions: list[Callable[[], Any]] = [
        lambda: compress(folder, recipe, tmp_path / "out", progress=False),
        lambda: compress_cached(folder, recipe, cache=tmp_path / "cache", progress=False),
        lambda: token_divergence(folder, folder, texts, progress=False),
    ]
    for function in functions:
        with pytest.raises(StreamlineBenchError, match=named.replace("\\", ".")):
            function()


def test_compare_as_a_library_function(faulty: Any, tmp_path: Path) -> None:
    """It refuses, or a row fails, with a reason that names the fault."""
    folder, text, named = faulty
    small = {"sequence_length": 32, "calibration_samples": 4, "calibration": str(text)}
    try:
        result = compare(
            folder, ["streamline_none"], ["streamline_demo"], tmp_path / "run", until="compress",
            set={"n_layers": 1, **small}, progress=False,
        )  # fmt: skip
        said = " ".join(result.failures.values())
        assert result.exit_code == 1
    except StreamlineBenchError as error:
        said = str(error)
    assert named in said
    assert "Traceback" not in said


def test_what_opencompass_loads(
    faulty: Any, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, with what our class does in OpenCompass's processes done in this one."""
    folder, text, named = faulty
    words = json.loads(text.read_text().splitlines()[0])["text"]

    def run(*_: Any, **__: Any) -> Any:
        source = entry_source(str(folder), device="cpu", dtype="float32")
        tokenizer = load_prompt_tokenizer(str(folder))
        engine = TransformersEngine(load_causal_model(source), tokenizer, 128)
        ids = tokenizer(words)["input_ids"]
        engine.logprob_sums([ScoredText.whole(ids)])
        raise AssertionError("the fault made no difference")

    environment = execution.Environment("python", {"opencompass": "0.5.4"}, 0)
    monkeypatch.setattr(execution, "inspect_environment", lambda _: environment)
    monkeypatch.setattr(run_folder, "run_opencompass", run)
    given = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    ended = call(*("opencompass", *(given.get(part, part) for part in CALLS["opencompass"])), "-q")
    lines = [line for line in ended.err.splitlines() if line.strip()]
    assert ended.code == 2, ended
    assert lines[-1].startswith("streamline-bench: ")
    assert named in lines[-1]
    assert "Traceback" not in ended.err


RESULTS = "results_2026-01-02T03-04-05.600000.json"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.parquet", b"PAR1 not at all"),
        (f"model/{RESULTS}", b'{"results": '),
        (f"model/{RESULTS}", b"[]"),
        (f"model/{RESULTS}", b'{"results": {"\\ud800": {}}}'),
        (f"model/{RESULTS}", b"[" * 100_000),
        ("20260102_030405/predictions/m/d.json", b"\xff"),
        ("20260102_030405/predictions/m/d.json", b'{"0": 7}'),
        ("nothing.txt", b""),
    ],
)
def test_samples_that_cannot_be_read(
    name: str, content: bytes, call: Callable[..., Any], tmp_path: Path
) -> None:
    """``load_samples`` and the command that calls it."""
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    given = path if path.suffix == ".parquet" else tmp_path / "run"
    with pytest.raises(StreamlineBenchError) as caught:
        load_samples(given, progress=False)
    assert str(given) in str(caught.value)
    assert "\n" not in str(caught.value)
    ended = call("stability", given, given, "-q")
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1 and str(given) in ended.err


def test_a_model_that_the_device_has_no_memory_for(
    call: Callable[..., Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way in which a model is moved to its device."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedModel

    def refuse(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr(PreTrainedModel, "to", refuse)
    ways: list[Callable[[], Any]] = [
        lambda: load_model(tiny_llama, device="cpu"),
        lambda: load_causal_model(entry_source(str(tiny_llama), device="cpu")),
    ]
    for way in ways:
        with pytest.raises(ResourceError, match=r"Tried to allocate 2\.00 GiB.*smaller") as caught:
            way()
        assert str(tiny_llama) in str(caught.value)
        assert "\n" not in str(caught.value)
    with monkeypatch.context() as patched:  # the harness gives the device to from_pretrained
        patched.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
        with pytest.raises(ResourceError, match=r"Tried to allocate 2\.00 GiB.*smaller"):
            StreamlineLM(pretrained=str(tiny_llama), device="cpu")
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4\n\n" * 40)
    ended = call("divergence", tiny_llama, tiny_llama, text, "-q")
    assert ended.code == 2
    assert [line for line in ended.err.splitlines() if "memory" in line] == [
        ended.err.splitlines()[-1]
    ]
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_whatever_a_loader_of_transformers_raises_is_named(
    load: Callable[..., Any], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any exception at all: none is on a list."""
    import transformers

    classes = {
        load_config: "AutoConfig", load_tokenizer: "AutoTokenizer",
        load_model: "AutoModelForCausalLM",
    }  # fmt: skip
    options = {"device": "cpu"} if load is load_model else {}
    for kind in (AttributeError, ZeroDivisionError, RecursionError, AssertionError):

        def fail(*_: Any, kind: type[Exception] = kind, **__: Any) -> Any:
            raise kind("what it said\nin two lines")

        monkeypatch.setattr(getattr(transformers, classes[load]), "from_pretrained", fail)
        with pytest.raises(StreamlineBenchError, match="what it said") as caught:
            load(tiny_llama, **options)
        assert str(tiny_llama) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_harness_model_ends_with_one_sentence(
    faulty: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.api.instance import Instance

    assert set(MODELS) == {"streamline", "streamline-vllm"}  # the latter in its environment
    folder, text, named = faulty
    words = json.loads(text.read_text().splitlines()[0])["text"]
    request = Instance("loglikelihood", {}, (words, " w1 w2"), 0, metadata=("t", 0, 1))
    monkeypatch.setattr("streamline_bench.harness.model_creation._under_command", lambda: True)
    options = {"batch_size": 1, "device": "cpu"}
    with pytest.raises(SystemExit) as ended:
        made = StreamlineLM.create_from_arg_obj({"pretrained": str(folder)}, options)
        made.loglikelihood([request], disable_tqdm=True)
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("streamline-bench: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert "Traceback" not in shown
    assert named in lines[0]


def test_memory_that_runs_out_is_said_for_what_it_is() -> None:
    import torch

    errors: list[Exception] = [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ]
    for error in errors:
        assert out_of_memory(error)
        with pytest.raises(ResourceError, match="memory"), library_errors():
            raise error
    assert not out_of_memory(ValueError("out of memory"))


def test_mistakes_of_our_own_keep_their_traceback() -> None:
    with pytest.raises(KeyError), library_errors():
        raise KeyError("ours")
    with pytest.raises(MissingDependencyError, match="numpyy"), library_errors("Reading"):
        import numpyy  # noqa: F401
    with pytest.raises(StreamlineBenchError, match="torch"), library_errors():
        import torch

        torch.nn.functional.embedding(torch.tensor([7]), torch.zeros(2, 2))


def test_calibration_that_a_tokenizer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w1")

    class Refusing:
        bos_token_id = None

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise TypeError("TextEncodeInput must be Union")

    with pytest.raises(StreamlineBenchError, match="TextEncodeInput"):
        load_calibration(CalibrationSpec(source=str(path)), Refusing(), progress=False)
