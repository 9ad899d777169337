"""What would make jobs fail is refused before the first one starts, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from lm_eval.utils import sanitize_model_name

from streamline_bench.core.machine import environment
from streamline_bench.core.recipe.schema import Recipe
from streamline_bench.errors import (
    CalibrationError,
    CheckpointError,
    MissingDependencyError,
    OutputError,
    RecipeError,
    ResourceError,
    SparsityError,
)
from streamline_bench.runs import Execution
from streamline_bench.runs.planning.request import Request
from streamline_bench.runs.planning.rows import read_texts
from streamline_bench.runs.run import compare_request


def _refused(request: Request, run: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamline_bench.runs.run._run", lambda *_: pytest.fail("jobs were begun"))
        compare_request(request, run, progress=False, **options)


@pytest.mark.parametrize(
    ("calibration", "rows", "words"),
    [
        ("no/such-data", ["shortgpt", "sleb"], ["shortgpt and 1 more", "no/such-data"]),
        ("FOLDER/missing.txt", ["laco"], ["laco", "missing.txt"]),
        ("FOLDER/empty.txt", ["streamline_none"], ["streamline_none", "empty.txt"]),
    ],
)
def test_calibration_that_no_row_could_read(
    make: Callable[..., Request],
    tmp_path: Path,
    calibration: str,
    rows: list[str],
    words: list[str],
) -> None:
    (tmp_path / "empty.txt").touch()
    given = {"n_layers": 2, "calibration": calibration.replace("FOLDER", str(tmp_path))}
    with pytest.raises(CalibrationError, match="--calibration") as caught:
        _refused(make(recipes=["first_layers", *rows], set=given), tmp_path / "run")
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "run").exists()


def test_more_layers_than_the_model_has(make: Callable[..., Request], tmp_path: Path) -> None:
    with pytest.raises(SparsityError, match=r"Row last_layers.*6 layers.*50"):
        _refused(make(recipes=["last_layers"], set={"n_layers": 50}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_little_text_for_the_tokens_that_were_asked_for(
    make: Callable[..., Request], tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "w1 w2 w3"}) + "\n", encoding="utf-8")
    given = {"n_layers": 2, "calibration": str(text), "calibration_tokens": 500}
    with pytest.raises(CalibrationError, match=r"500 .* gives 3"):
        _refused(make(recipes=["shortgpt"], set=given), tmp_path / "run")


def test_rows_without_calibration_need_none_of_it(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    monkeypatch.setattr("streamline_bench.runs.run._run", lambda *each: begun.append(each))
    compare_request(
        make(recipes=["first_layers", "magnitude_l1"]), tmp_path / "run", progress=False
    )
    assert len(begun) == 1


def test_every_source_of_a_recipe_is_looked_at() -> None:
    calibration = {"source": "a.txt"}
    recovered = {"kind": "lora", "training": {"data": {"source": "b.txt"}}}
    trained: dict[str, Any] = {"replacement": {"kind": "ffn"}, "training": {"data": {}}}
    recipe = Recipe(name="r", method="streamline", calibration=calibration, **trained)
    assert [spec.source for spec in read_texts(recipe)] == ["a.txt", "a.txt"]
    recipe = Recipe(name="r", method="last_layers", calibration=calibration, recovery=recovered)
    assert [spec.source for spec in read_texts(recipe)] == ["b.txt"]
    recipe = Recipe(name="r", method="llm_pruner", parameters={"criterion": "l1"})
    assert list(read_texts(recipe)) == []


@pytest.mark.parametrize("name", ["a/b c", "/x/y__z", "q?*:<>|[1]\"'", "plain"])
def test_file_names_are_counted_as_the_harness_makes_them(
    make: Callable[..., Request], tmp_path: Path, name: str
) -> None:
    deep = tmp_path.joinpath(*["with_a_long_name_of_forty_characters_____"] * 5, name.strip("/"))
    deep.mkdir(parents=True)
    written = sanitize_model_name(str(deep / "run" / "first_layers" / "checkpoint"))
    over = len(written.encode()) - 255
    assert over > 0
    with pytest.raises(OutputError, match=f"too long.* --output that is {over} bytes shorter"):
        _refused(make(), deep / "run")
    assert not (deep / "run").exists()


def test_a_disk_without_room_for_the_checkpoints(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"2 checkpoints.* free"):
        _refused(make(), tmp_path / "run", until="compress")
    with pytest.raises(pytest.fail.Exception, match="begun"):
        _refused(make(recipes=["dense"]), tmp_path / "run")  # makes none


def test_a_model_that_memory_cannot_hold_once_for_each_job(
    make: Callable[..., Request], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tiny_llama / "model.safetensors").stat().st_size
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size))
    with pytest.raises(pytest.fail.Exception, match="begun"):
        _refused(make(recipes=["dense"]), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"memory for each of 3 jobs.* --workers"):
        _refused(make(), tmp_path / "new", execution=Execution(workers=3))


def test_a_recipe_that_fits_nowhere(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of three jobs has a third of the memory; an explicit placement tries it all the same."""
    monkeypatch.setattr(environment, "free_memory", lambda device: 3 * 10**6)
    with pytest.raises(ResourceError, match=r"Row first_layers .* 0\.001 GB are free.*--workers"):
        _refused(make(), tmp_path / "run", until="compress", execution=Execution(workers=3))
    assert not (tmp_path / "run").exists()
    with pytest.raises(pytest.fail.Exception, match="begun"):
        asked = Execution(workers=3, placement="resident")
        _refused(make(), tmp_path / "run", until="compress", execution=asked)


def test_a_model_without_a_chat_template(make: Callable[..., Request], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no chat template.*--apply-chat-template"):
        _refused(make(apply_chat_template=True), tmp_path / "run")


def test_an_engine_that_is_not_installed(
    make: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(MissingDependencyError, match=r"--throughput vllm.*pip install"):
        _refused(make(recipes=["dense"], throughput="vllm"), tmp_path / "run")
