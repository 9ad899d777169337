"""Whatever a recipe's data reader reads decides the key, and nothing else does."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamline_bench.compression.pipeline import content_key
from streamline_bench.core.data.corpora import open_documents
from streamline_bench.core.recipe.schema import CalibrationSpec
from streamline_bench.errors import CalibrationError
from streamline_bench.modeling.loading import SourceModel, computing_dtype


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model beside which the process runs, so that relative names are read."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def key(folder: Path, make_recipe: Callable[..., Any], source: str) -> str:
    return content_key(SourceModel(folder), make_recipe("streamline_none", calibration=source))


def texts(source: str, folder: Path) -> list[str]:
    return list(open_documents(CalibrationSpec(source=source, samples=4), folder))


@pytest.mark.parametrize("name", ["slimpajama", "auto", "texts"])
def test_a_file_that_no_reader_takes_changes_no_key(
    name: str, folder: Path, make_recipe: Callable[..., Any]
) -> None:
    """Presets come before files of their name, and a file is known by its ending."""
    before = key(folder, make_recipe, name)
    Path(name).write_text("something else")
    assert key(folder, make_recipe, name) == before
    with pytest.raises(CalibrationError):
        texts(name, folder)


def test_the_text_of_the_model_is_a_file(folder: Path, make_recipe: Callable[..., Any]) -> None:
    before = key(folder, make_recipe, "auto")
    own = folder / "calibration.jsonl"
    own.mkdir()
    (own / "x").write_text("y")
    assert key(folder, make_recipe, "auto") == before
    shutil.rmtree(own)
    own.write_text('{"text": "w1 w2"}\n')
    assert key(folder, make_recipe, "auto") != before
    assert texts("auto", folder) == ["w1 w2"]


def test_content_counts_and_where_it_lies_does_not(
    folder: Path, make_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    keys = []
    for content in ("w1", "w2"):
        Path("texts.txt").write_text(content)
        assert texts("texts.txt", folder) == [content]
        keys.append(key(folder, make_recipe, "texts.txt"))
    assert keys[0] != keys[1]


def test_data_is_known_by_name_and_digest(folder: Path) -> None:
    from streamline_bench.compression.pipeline import _data_identity

    Path("deep").mkdir()
    for name in ("a.txt", "deep/a.txt", "deep/b.txt"):
        Path(name).write_text(f"in {name}")
    digests = {name: hashlib.sha256(f"in {name}".encode()).hexdigest()
               for name in ("a.txt", "deep/a.txt", "deep/b.txt")}  # fmt: skip
    found = {name: _data_identity(CalibrationSpec(source=name), SourceModel(folder))
             for name in ("a.txt", "deep", "owner/name", "auto", "absent.txt")}  # fmt: skip
    assert found == {
        "a.txt": {"a.txt": digests["a.txt"]},
        "deep": {"a.txt": digests["deep/a.txt"], "b.txt": digests["deep/b.txt"]},
        "owner/name": "owner/name",
        "auto": "auto",
        "absent.txt": "absent.txt",
    }


@pytest.mark.parametrize(
    ("stored", "device", "dtype"),
    [
        ("bfloat16", "cuda:1", "bfloat16"),
        ("float16", "cuda", "float16"),
        ("float32", "cuda", "float32"),
        ("bfloat16", "cpu", "float32"),
    ],
)
def test_the_dtype_that_auto_stands_for(
    stored: str, device: str, dtype: str, folder: Path, make_recipe: Callable[..., Any]
) -> None:
    """The checkpoint's own on an accelerator; norms in float32 do not decide."""
    path = folder / "model.safetensors"
    kind = getattr(torch, stored)
    weights = {n: t.to(kind) if t.dim() > 1 else t.float() for n, t in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    source, recipe = SourceModel(folder), make_recipe("streamline_none")
    assert computing_dtype("auto", device, source.reader) == dtype
    same = ("auto", None, dtype)
    assert len({content_key(source, recipe, device=device, dtype=each) for each in same}) == 1
    assert computing_dtype("float32", device, source.reader) == "float32"


@pytest.mark.parametrize(
    ("device", "dtype", "autocast"),
    [("cpu", "bfloat16", "none"), ("cuda", "bfloat16", "bf16"), ("cuda:1", "float32", "none")],
)
@pytest.mark.parametrize(("name", "part"), [("streamline", ""), ("last_layers_lora", "recovery.")])
def test_the_autocast_that_auto_stands_for(
    device: str,
    dtype: str,
    autocast: str,
    name: str,
    part: str,
    folder: Path,
    make_recipe: Callable[..., Any],
) -> None:
    """As it is resolved, so that a result on a CPU has the key of one without it."""
    keys = {
        given: content_key(
            SourceModel(folder), make_recipe(name, **{f"{part}training.autocast": given}),
            device=device, dtype=dtype,
        )
        for given in ("auto", "none", "bf16")
    }  # fmt: skip
    assert keys["none"] != keys["bf16"]
    assert keys["auto"] == keys[autocast]
