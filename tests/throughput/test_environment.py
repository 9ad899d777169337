"""One id for one machine, and the accelerators that its driver names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamline_bench.throughput import measurement

SMI = "#!/bin/sh\necho 'NVIDIA H200, 570.1'\necho 'NVIDIA H200, 570.1'\n"


@pytest.fixture(autouse=True)
def _fresh_devices() -> None:
    measurement.accelerators.cache_clear()


def test_id_is_stable_and_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measurement.machine_id()
    assert first == measurement.machine_id()
    assert len(first) == 16 and int(first, 16) >= 0
    monkeypatch.setenv(measurement.HOST_VARIABLE, "another")
    assert measurement.machine_id() != first


def test_accelerators_are_those_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measurement.accelerators() == ()
    alone = measurement.machine_id()
    measurement.accelerators.cache_clear()
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert measurement.accelerators() == (measurement.Accelerator("NVIDIA H200", "570.1"),) * 2
    assert measurement.machine_id() != alone
