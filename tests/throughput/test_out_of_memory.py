"""Errors that say memory ran out, in the words of those that raise them."""

from __future__ import annotations

import pytest

from streamline_bench.throughput.out_of_memory import is_out_of_memory, kernel_kills


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
    assert first is None or kernel_kills() >= first >= 0  # type: ignore[operator]
