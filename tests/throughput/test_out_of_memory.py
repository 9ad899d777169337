"""Errors that say memory ran out, in the words of those that raise them."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.throughput import process
from streamline_bench.throughput.process import kernel_kills
from streamline_bench.throughput.worker import is_out_of_memory


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: "
        "can't allocate memory: you tried to allocate 40000000000000 bytes.",
        "MemoryError",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "ValueError: No available memory for the cache blocks.",
        "ValueError: Available memory on node 0 (12.4/16.71 GiB) on kv cache allocation is less "
        "than requested memory for kv (262144.0 GiB).",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
)
def test_recognised(text: str) -> None:
    assert is_out_of_memory(text)


@pytest.mark.parametrize(
    "text", ["", "ValueError: unknown model type", "the model has a memory of 12 layers"]
)
def test_other_errors_are_not(text: str) -> None:
    assert not is_out_of_memory(text)


def test_a_real_allocation_that_fails() -> None:
    import torch

    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(str(error.value))


def test_the_kernels_counter_never_falls() -> None:
    first = kernel_kills()
    if first is None:
        pytest.skip("/proc/vmstat of this machine counts no process ended for memory")
    second = kernel_kills()
    assert second is not None
    assert second >= first >= 0


@pytest.mark.parametrize(
    ("counters", "kills"),
    [
        ("nr_free_pages 5\noom_kill 12\nswap_ra 3\n", 12),
        ("oom_kill 0\n", 0),
        ("nr_free_pages 5\nmy_oom_kill 7\noom_kill_other 8\n", None),
        (None, None),
    ],
)
def test_the_kernels_counter_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counters: str | None, kills: int | None
) -> None:
    file = tmp_path / "vmstat"
    if counters is not None:
        file.write_text(counters)
    monkeypatch.setattr(process, "Path", {"/proc/vmstat": file}.__getitem__)
    assert kernel_kills() == kills
