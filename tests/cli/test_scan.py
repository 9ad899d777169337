"""``streamline-bench scan``: table, JSON, picture; bad input ends in one sentence and code 2."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamline_bench.core.similarity import Similarity
from streamline_bench.errors import StreamlineBenchError


@pytest.fixture
def scanned(call: Callable[..., Any], tiny_llama: Path, text_file: str, tmp_path: Path) -> Any:
    """Return a function that scans the tiny model into ``tmp_path / "out"``."""

    def run(*options: object, output: Path = tmp_path / "out", model: Path = tiny_llama) -> Any:
        common = ["--calibration", text_file, "--samples", 4, "--sequence-length", 32]
        return call("scan", model, *common, "-o", output, *options)

    return run


def test_table_files_and_picture(scanned: Any, tmp_path: Path) -> None:
    ended = scanned()
    assert ended.code == 0, ended.err
    assert "6 layers; 128 tokens" in ended.out
    similarity = Similarity.load(tmp_path / "out" / "similarity.json")
    assert (similarity.num_layers, similarity.num_tokens) == (6, 128)
    lines = ended.out.splitlines()
    for n in range(1, 6):
        block = similarity.best_block(n)
        layers = f"{block.start}-{block.stop - 1}" if n > 1 else str(block.start)
        assert any(
            line.split()[:2] == [str(n), layers] and f"{block.score:.4f}" in line for line in lines
        ), (n, layers, ended.out)
    root = ET.fromstring((tmp_path / "out" / "similarity.svg").read_text())
    assert root.tag.endswith("svg")


def test_chosen_sizes_list_their_best_starts_in_order(scanned: Any) -> None:
    shown = json.loads(scanned("--n", "2,3", "--metric", "angular", "--json").out)
    blocks = shown["blocks"]
    assert [block["n"] for block in blocks] == [2] * 5 + [3] * 4
    for n in (2, 3):
        rows = [block for block in blocks if block["n"] == n]
        assert [row["rank_angular"] for row in rows] == list(range(1, len(rows) + 1))
        assert [row["angular"] for row in rows] == sorted(row["angular"] for row in rows)


def test_json_names_tokens_and_files(scanned: Any, tmp_path: Path) -> None:
    shown = json.loads(scanned("--json").out)
    assert shown["num_layers"] == 6
    assert shown["last_state"] == "raw"
    assert shown["calibration"]["tokens"] == shown["num_tokens"] == 128
    assert [Path(file).name for file in shown["files"]] == ["similarity.json", "similarity.svg"]
    assert all(Path(file).is_file() for file in shown["files"])


def test_json_without_output_writes_nothing(
    call: Callable[..., Any],
    tiny_llama: Path,
    text_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call("scan", tiny_llama, "--calibration", text_file, "--samples", 1, "--json")
    assert json.loads(ended.out)["files"] == []
    idle = call("scan", tiny_llama, "--json", "--overwrite")
    assert idle.code == 2 and "--overwrite has no effect" in idle.err
    assert not list(tmp_path.iterdir())


def test_streamed_gives_the_same_numbers(scanned: Any, tmp_path: Path) -> None:
    for name, options in {"a": [], "b": ["--placement", "streamed", "--batch-size", 2]}.items():
        assert scanned("--last-state", "postnorm", *options, output=tmp_path / name).code == 0
    a, b = (Similarity.load(tmp_path / name / "similarity.json") for name in "ab")
    np.testing.assert_allclose(a.cosine, b.cosine, atol=1e-6)
    assert a.last_state == b.last_state == "postnorm"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_computes_in_the_dtype_of_the_checkpoint_and_adds_up_in_more(
    scanned: Any,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    """The GPU is made believe; the cosines of bfloat16 weights are those of the same in float32."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = Path(shutil.copytree(tiny_llama, tmp_path / "half"))
    weights = load_file(model / "model.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halved, model / "model.safetensors", {"format": "pt"})
    asked = []

    def load(folder: Path, *, dtype: str, **where: Any) -> Any:
        asked.append((where["device"], dtype))
        kind = getattr(torch, dtype)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()

    monkeypatch.setattr("streamline_bench.core.machine.environment.found_device", lambda _: device)
    monkeypatch.setattr("streamline_bench.modeling.loading.load_model", load)
    monkeypatch.setattr("streamline_bench.compression.placement.free_memory", lambda _: 10**10)
    cosines = []
    for options in ([], ["--dtype", "float32"]):
        ended = scanned("--overwrite", *options, model=model)
        assert ended.code == 0, ended.err
        assert f"dtype: {asked[-1][1]} on {device}" in caplog.text
        assert "placement: resident, the whole model needs" in caplog.text
        cosines.append(Similarity.load(tmp_path / "out" / "similarity.json").cosine)
    own = {"cpu": "float32", "cuda": "bfloat16"}[device]
    assert asked == [(device, own), (device, "float32")]
    # Numbers of bfloat16 below 1 are 4e-3 apart.
    off = np.abs(cosines[0] - cosines[1]).max()
    assert off == 0.0 if own == "float32" else 0.0 < off < 2e-3


def test_the_seed_changes_the_tokens(scanned: Any, tmp_path: Path) -> None:
    hashes = [
        json.loads(scanned("--seed", seed, "--json", "--overwrite").out)["calibration"]["sha256"]
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_quiet_prints_nothing(scanned: Any, tmp_path: Path) -> None:
    ended = scanned("--quiet")
    assert (ended.code, ended.out) == (0, "")
    assert (tmp_path / "out" / "similarity.json").is_file()


def test_existing_files_are_kept_unless_told_otherwise(scanned: Any, tmp_path: Path) -> None:
    other = tmp_path / "out" / "mine.txt"
    other.parent.mkdir()
    other.write_text("mine")
    assert scanned().code == 0
    before = (tmp_path / "out" / "similarity.json").read_bytes()
    ended = scanned("--seed", 1)
    assert ended.code == 2
    assert "exists; give another --output or pass --overwrite" in ended.err
    assert (tmp_path / "out" / "similarity.json").read_bytes() == before
    assert scanned("--seed", 1, "--overwrite").code == 0
    assert (tmp_path / "out" / "similarity.json").read_bytes() != before
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration", "slimpajam"], "did you mean 'slimpajama'"),
        (["--calibration", "none.jsonl"], "none.jsonl does not exist"),
        (["--n", "7"], "A block of 7 layers cannot be removed from 6"),
        (["--n", "two"], "'two' is not a list of numbers"),
        (["--device", "no-such-device"], "Invalid value for '--device'"),
        (["--samples", "0"], "0 is not in the range"),
    ],
)
def test_bad_options_leave_nothing_behind(
    scanned: Any, tmp_path: Path, options: list[str], message: str
) -> None:
    ended = scanned(*options)
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_sizes_are_checked_before_the_scan(scanned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamline_bench.core.scan", None)
    ended = scanned("--n", "4,40")
    assert ended.code == 2
    assert "A block of 40 layers cannot be removed from 6; give --n from 1 to 6." in ended.err


def test_the_scan_is_kept_when_its_table_cannot_be_shown(
    scanned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("streamline_bench.cli.scan._table", fails)
    assert scanned().code == 1
    assert Similarity.load(tmp_path / "out" / "similarity.json").num_layers == 6


@pytest.mark.parametrize("there", [True, False])
def test_the_device_is_cuda_where_there_is_one(
    there: bool,
    call: Callable[..., Any],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[str] = []

    def stop(*arguments: object, device: str, **options: object) -> None:
        used.append(device)
        raise StreamlineBenchError("stopped here")

    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("streamline_bench.compression.pipeline.compress", stop)
    monkeypatch.setattr("streamline_bench.cli.scan._scanned", stop)
    monkeypatch.setattr("streamline_bench.divergence.token_divergence", stop)
    text = tmp_path / "text.txt"
    text.write_text("w1")
    for arguments in (
        ("scan", tiny_llama, "-o", tmp_path / "scan"),
        ("compress", tiny_llama, "-o", tmp_path / "out"),
        ("divergence", tiny_llama, tiny_llama, text),
    ):
        assert "stopped here" in call(*arguments).err
        assert "Invalid value for '--device'" in call(*arguments, "--device", "tpu9").err
    assert used == ["cuda" if there else "cpu"] * 3


def test_an_output_that_cannot_be_made(scanned: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = scanned(output=tmp_path / "file" / "inside")
    assert ended.code == 2
    assert "cannot be made" in ended.err
    ended = scanned(output=tmp_path / "file")
    assert ended.code == 2
    assert "is a file" in ended.err


def test_a_model_without_tokenizer(
    call: Callable[..., Any], make_tiny_model: Callable[..., Path], text_file: str, tmp_path: Path
) -> None:
    folder = make_tiny_model("llama", num_hidden_layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    ended = call("scan", folder, "--calibration", text_file, "-o", tmp_path / "out")
    assert ended.code == 2
    assert "no tokenizer" in ended.err
    assert not (tmp_path / "out").exists()
