"""Signals come back as they were put in, from memory and from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamline_bench.core.state_store import BatchStore, state_store


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


@pytest.mark.parametrize("budget", [0, 10_000])
def test_signals_are_named_by_place_and_batch(tmp_path: Path, budget: int) -> None:
    store = BatchStore(tmp_path / "states", 5_000, budget)
    store[3, 0], store["output", 1] = torch.ones(2), torch.zeros(3)
    assert torch.equal(store.load((3, 0), "cpu"), torch.ones(2))
    store.drop((3, 0))
    with pytest.raises(KeyError):
        store[3, 0]
    assert torch.equal(store["output", 1], torch.zeros(3))
    assert len(list(tmp_path.rglob("*.bin"))) == (budget == 0)


def test_what_a_killed_attempt_left_is_deleted(tmp_path: Path) -> None:
    stale = tmp_path / "states-1-abc" / "states"
    stale.mkdir(parents=True)
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: torch.nn.Embedding(2, 2)  # type: ignore[assignment]
    with state_store(model, 8, tmp_path) as first, state_store(model, 8, tmp_path) as second:
        assert not stale.exists()
        first[0], second[0] = torch.ones(1), torch.zeros(1)
        assert torch.equal(first[0] + second[0], torch.ones(1))
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())
