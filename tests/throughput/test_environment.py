"""One id for one machine, and the accelerators that its driver names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamline_bench.throughput import environment

SMI = "#!/bin/sh\necho 'NVIDIA H200, 570.1'\necho 'NVIDIA H200, 570.1'\n"


@pytest.fixture(autouse=True)
def _fresh_devices() -> None:
    environment.accelerators.cache_clear()


def test_id_is_stable_and_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = environment.machine_id()
    assert first == environment.machine_id()
    assert len(first) == 16 and int(first, 16) >= 0
    monkeypatch.setenv(environment.HOST_VARIABLE, "another")
    assert environment.machine_id() != first


def test_accelerators_are_those_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.accelerators() == ()
    alone = environment.machine_id()
    environment.accelerators.cache_clear()
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert environment.accelerators() == (environment.Accelerator("NVIDIA H200", "570.1"),) * 2
    assert environment.machine_id() != alone
