"""Signals come back as they were put in, from memory and from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamline_bench.core.state_store import BatchStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget", [0, 10_000])
def test_signals_come_back(tmp_path: Path, dtype: torch.dtype, budget: int) -> None:
    store = BatchStore(tmp_path / "signals", 5_000, budget)
    assert store.on_disk == (budget == 0)
    signals = [torch.randn(2, 3, width).to(dtype) for width in (8, 6, 8)]
    store[0], store[1] = signals[0], signals[1]
    assert torch.equal(store[0], signals[0])
    store[0] = signals[2].transpose(0, 1)
    assert torch.equal(store[0], signals[2].transpose(0, 1))
    assert torch.equal(store[1], signals[1])
    assert (tmp_path / "signals").exists() == store.on_disk
    store.close()
    assert not (tmp_path / "signals").exists()


def test_files_of_an_interrupted_run_are_dropped(tmp_path: Path) -> None:
    stale = tmp_path / "signals" / "7.bin"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    BatchStore(tmp_path / "signals", 5_000, 0)
    assert not stale.exists()
