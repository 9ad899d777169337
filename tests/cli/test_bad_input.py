"""Bad input: one clear sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from streamline_bench.cli.main import cli


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def refused(
    call: Callable[..., Any],
    model: Path,
    tmp_path: Path,
    text_file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Return a function: compress with these options, expect a refusal, return its sentence."""
    # A process of its own reads our --quiet when it imports transformers; here that is done.
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)

    def run(
        *options: object,
        output: Path | None = None,
        calibration: str = text_file,
        source: Path = model,
    ) -> str:
        target = output or tmp_path / "out"
        before = sorted(tmp_path.rglob("*"))
        # A recovery has a length of its own.
        length = () if "last_layers_lora" in options else ("--set", "sequence_length=32")
        ended = call(
            "compress", source, "-o", target, "--recipe", "streamline_none", "-q",
            "--calibration", calibration, *length, *options,
        )  # fmt: skip
        assert ended.code == 2, ended
        lines = [line for line in ended.err.splitlines() if line.strip()]
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("streamline-bench: ")
        assert "Traceback" not in ended.err
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def test_the_same_call_with_good_input_succeeds(
    call: Callable[..., Any], model: Path, tmp_path: Path, text_file: str
) -> None:
    ended = call(
        "compress", model, "-o", tmp_path / "out", "--recipe", "streamline_none", "--n-layers", 2,
        "--calibration", text_file, "--set", "sequence_length=32",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "streamline.json").exists()
    assert "6 -> 4 layers" in ended.out


@pytest.mark.parametrize("n_layers", [0, -1, 6, 7])
def test_number_of_layers_out_of_range(refused: Callable[..., str], n_layers: int) -> None:
    assert str(n_layers) in refused("--n-layers", n_layers)


@pytest.mark.parametrize("sparsity", [-0.1, 0, 1, 1.5, "nan"])
def test_sparsity_out_of_range(refused: Callable[..., str], sparsity: object) -> None:
    assert "sparsity" in refused("--sparsity", sparsity)


def test_sparsity_and_layers_together(refused: Callable[..., str]) -> None:
    assert "not both" in refused("--sparsity", 0.25, "--n-layers", 2)


def test_unknown_recipe_name_suggests_one(refused: Callable[..., str]) -> None:
    assert "did you mean 'streamline'?" in refused("--recipe", "streamlin")


def test_unknown_recipe_key_suggests_one(refused: Callable[..., str]) -> None:
    assert "did you mean 'calibration.seed'?" in refused("--set", "calibration.sed=1")
    assert "did you mean 'sparsity'?" in refused("--set", "sparsty=0.2")


def test_unknown_key_in_a_recipe_file(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: streamline\nsparsty: 0.25\n", encoding="utf-8")
    assert "did you mean 'sparsity'?" in refused("--recipe", path)


def test_unknown_method_and_parameter(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: steamline\n", encoding="utf-8")
    assert "did you mean 'streamline'?" in refused("--recipe", path)
    path.write_text("method: streamline\nparameters: {metrik: cosine}\n", encoding="utf-8")
    assert "did you mean 'parameters.metric'?" in refused("--recipe", path)


@pytest.mark.parametrize(
    ("source", "options", "named"),
    [
        (None, ["--seed", 3], "'seed' has no effect"),
        (None, ["--calibration", "t.txt"], "'calibration' has no effect"),
        (None, ["--revision", "v2"], "'v2' has no effect"),
        ("bundled", ["--revision", "v2"], "'v2' has no effect"),
        ("", [], "name is empty"),
    ],
)
def test_what_has_no_effect_is_refused_also_without_quiet(
    call: Callable[..., Any],
    model: Path,
    tmp_path: Path,
    source: str | None,
    options: list[object],
    named: str,
) -> None:
    given = model if source is None else source
    ended = call(
        "compress", given, "-o", tmp_path / "out", "--recipe", "last_layers", "--n-layers", 2,
        *options,
    )  # fmt: skip
    assert ended.code == 2 and named in ended.err, ended
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_calibration(refused: Callable[..., str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(text, encoding="utf-8")
    assert "empty.txt" in refused("--n-layers", 2, calibration=str(path))


def test_missing_calibration_file(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "gone.jsonl" in refused("--n-layers", 2, calibration=str(tmp_path / "gone.jsonl"))


def test_pickle_only_weights(refused: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    sentence = refused("--n-layers", 2)
    assert "pickles only" in sentence
    assert "save_pretrained" in sentence


def test_truncated_shard(refused: Callable[..., str], model: Path) -> None:
    shard = model / "model.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    assert "model.safetensors" in refused("--n-layers", 2)


def test_index_pointing_outside_the_folder(refused: Callable[..., str], model: Path) -> None:
    outside = model.parent / "outside.safetensors"
    (model / "model.safetensors").rename(outside)
    with outside.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        names = [n for n in json.loads(stream.read(length)) if n != "__metadata__"]
    weight_map = dict.fromkeys(names, "../outside.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "outside" in refused("--n-layers", 2)


def test_output_exists(refused: Callable[..., str], tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "keep.txt").write_text("mine", encoding="utf-8")
    assert "exists" in refused("--n-layers", 2, output=target)
    assert (target / "keep.txt").read_text(encoding="utf-8") == "mine"


def test_output_unwritable(refused: Callable[..., str], tmp_path: Path) -> None:
    # A file where a folder is needed cannot be written into, not even by root.
    blocker = tmp_path / "blocker"
    blocker.write_text("", encoding="utf-8")
    assert "cannot be written" in refused("--n-layers", 2, output=blocker / "out")


def test_tokenizer_missing(refused: Callable[..., str], model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused("--n-layers", 2)


def test_nan_in_weights_names_the_tensor(refused: Callable[..., str], model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert name in refused("--n-layers", 2)


@pytest.mark.parametrize(
    ("recipe", "family", "sizes", "words"),
    [
        ("slicegpt", "gemma2", {"head_dim": 8}, ["'gemma2'", "norms between"]),
        ("llm_pruner", "gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}, ["'gpt2'"]),
        ("replaceme_lstsq", "olmo2", {}, ["'olmo2'", "ridge_map"]),
    ],
)
def test_a_family_that_a_method_cannot_take(
    refused: Callable[..., str],
    make_tiny_model: Callable[..., Path],
    recipe: str,
    family: str,
    sizes: dict[str, int],
    words: list[str],
) -> None:
    source = make_tiny_model(family, **{"num_hidden_layers": 4, **sizes})
    sentence = refused("--recipe", recipe, source=source)
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize(
    ("recipe", "size", "samples"),
    [("slicegpt", ("--sparsity", 0.3), 1), ("ridge_map", ("--n-layers", 2), 2)],
)
def test_too_few_tokens_for_as_many_channels(
    refused: Callable[..., str], recipe: str, size: tuple[object, ...], samples: int
) -> None:
    """The ridge map sets one sequence of two aside."""
    few = ("--set", f"calibration_samples={samples}", "--set", "sequence_length=16")
    sentence = refused("--recipe", recipe, *size, *few)
    assert "32 channels" in sentence
    assert "got 16" in sentence
    assert "calibration" in sentence


def _set(*assignments: str) -> tuple[str, ...]:
    return tuple(part for each in assignments for part in ("--set", each))


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("sleb", ("--n-layers", 5), ["5 of 6", "only 4 are", "remove fewer"]),
        (
            "shortened_llama_taylor_plus",
            ("--n-layers", 2, *_set("parameters.protect_first=4", "parameters.protect_last=2")),
            ["protect_first=4", "only 0 are"],
        ),
        ("llm_pruner", ("--sparsity", 0.9), ["0.9 is out of reach", "4 of 6 layers"]),
        (
            "llm_pruner",
            ("--sparsity", 0.2, "--set", "parameters.protect_first=6"),
            ["All 6 layers are protected", "lower protect_first"],
        ),
    ],
)
def test_protected_layers_leave_too_little(
    refused: Callable[..., str], recipe: str, options: tuple[object, ...], words: list[str]
) -> None:
    sentence = refused("--recipe", recipe, *options)
    assert [word for word in words if word not in sentence] == []


@pytest.fixture
def overflowing(model: Path) -> Path:
    """Queries of layer 3 so large that the loss is finite and the gradients are not."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = "model.layers.3.self_attn.q_proj.weight"
    weights[name] *= 1e20
    assert weights[name].isfinite().all()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("llm_pruner", ("--sparsity", 0.2)),
        ("shortened_llama_taylor", ("--n-layers", 2)),
        ("last_layers_lora", ("--n-layers", 1)),
    ],
)
def test_gradients_that_are_no_numbers_name_the_layer(
    refused: Callable[..., str], overflowing: Path, recipe: str, options: tuple[object, ...]
) -> None:
    """NaN flows from layer 3 down to the others; it is layer 3 that is named."""
    short: tuple[object, ...] = ()
    if "lora" in recipe:
        data = "recovery.training.data"
        short = ("--set", f"{data}.sequence_length=16", "--set", f"{data}.samples=8")
    sentence = refused("--recipe", recipe, *options, *short)
    assert "self_attn." in sentence
    assert "in layer 3" in sentence
    assert "weights" in sentence


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("llm_pruner", ("--sparsity", 0.2)),
        ("shortened_llama_taylor", ("--n-layers", 2)),
        ("shortened_llama_ppl", ("--n-layers", 2)),
        ("sleb", ("--n-layers", 2)),
        ("laco", ("--n-layers", 2, "--set", "parameters.layers_per_merge=2")),
    ],
)
def test_a_layer_that_overflows_on_the_way_up_is_named(
    refused: Callable[..., str], model: Path, recipe: str, options: tuple[object, ...]
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] *= 1e20
    weights["model.layers.3.mlp.down_proj.weight"] *= 1e30
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinity from layer 3 on" in refused("--recipe", recipe, *options)


def test_no_such_model(call: Callable[..., Any], tmp_path: Path) -> None:
    ended = call("compress", tmp_path / "none", "-o", tmp_path / "out")
    assert ended.code == 2
    assert "none" in ended.err
    assert not (tmp_path / "out").exists()


def test_compressed_already(
    call: Callable[..., Any], model: Path, tmp_path: Path, text_file: str
) -> None:
    options = ("--recipe", "streamline_none", "--n-layers", 1, "--calibration", text_file, "-q")
    assert call("compress", model, "-o", tmp_path / "one", *options).code == 0
    ended = call("compress", tmp_path / "one", "-o", tmp_path / "two", *options)
    assert ended.code == 2
    assert "compressed already" in ended.err
    assert not (tmp_path / "two").exists()


def test_unknown_command_suggests_one(call: Callable[..., Any]) -> None:
    ended = call("compres")
    assert ended.code == 2
    assert "did you mean 'compress'?" in ended.err


def test_terminal_escapes_in_a_name_are_not_printed(call: Callable[..., Any]) -> None:
    ended = call("compress", "evil\x1b[31mname", "-o", "nowhere")
    assert ended.code == 2
    assert "\x1b" not in ended.err


@pytest.mark.parametrize("command", ["scan", "compress", "throughput", "report", "stability"])
def test_names_that_the_file_system_refuses(call: Callable[..., Any], command: str) -> None:
    name = "x" * 300
    more = {"compress": ("--recipe", "last_layers", "-o", name), "stability": (name,)}
    ended = call(command, name, *more.get(command, ()))
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert "xxx" in ended.err


def test_an_error_of_our_own_keeps_its_traceback(
    call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "ours.json")

    monkeypatch.setattr("streamline_bench.cli.main.cli.main", broken)
    from streamline_bench.cli.main import main

    with pytest.raises(FileNotFoundError):
        main([])


def test_who_calls_the_command_from_python_finds_the_sentence() -> None:
    result = CliRunner().invoke(cli, ["scan", "/nowhere/to/be/found"])
    assert result.exit_code == 2
    assert "/nowhere/to/be/found" in str(result.exception)
    assert "/nowhere/to/be/found" in result.stderr
