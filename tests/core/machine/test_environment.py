"""Names of devices: what is none is refused, what this machine has is found; free memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from streamline_bench.core.machine import environment
from streamline_bench.core.machine.environment import (
    found_device,
    free_memory,
    has_bfloat16_units,
    known_device,
)
from streamline_bench.errors import RecipeError


@pytest.mark.parametrize(
    ("name", "device"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda"), ("cuda:3", "cuda:3"), ("mps", "mps")],
)
def test_names_of_devices(name: str, device: str) -> None:
    assert known_device(name) == device


@pytest.mark.parametrize("name", ["cud", "auto", "", "meta", "cuda:x", "gpu", "xla"])
def test_names_of_none(name: str) -> None:
    with pytest.raises(RecipeError, match=f"'{name}'.*cuda:N"):
        known_device(name)


@pytest.mark.parametrize(("name", "there"), [("cuda", 1), ("cuda:1", 2), ("cpu", 0), ("cpu:5", 0)])
def test_what_is_there(monkeypatch: pytest.MonkeyPatch, name: str, there: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    assert found_device(name) == name.replace(":5", "")


@pytest.mark.parametrize(
    ("name", "there", "sentence"),
    [
        ("cuda", 0, "--device is cuda and this process sees no cuda device;"),
        ("cuda:1", 1, "--device is cuda:1 and this process sees 1 cuda device;"),
        ("cuda:9", 2, "--device is cuda:9 and this process sees 2 cuda devices;"),
    ],
)
def test_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, name: str, there: int, sentence: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    with pytest.raises(RecipeError, match=sentence):
        found_device(name)


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto(monkeypatch: pytest.MonkeyPatch, available: bool, device: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    assert found_device("auto") == device


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        (None, True),
    ],
)
def test_units_for_bfloat16(
    text: str | None, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert has_bfloat16_units() is found


@pytest.mark.parametrize(
    ("limit", "free"), [("5000000", 5_000_000 - 600_000 + 100_000), ("500000", 0), ("max", None)]
)
def test_free_memory_is_that_of_the_container(
    limit: str, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type("Memory", (), {"available": 10**9})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    assert free_memory("cpu") == 10**9  # no such files
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    assert free_memory("cpu") == (10**9 if free is None else free)
