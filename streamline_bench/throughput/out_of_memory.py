"""Recognises that memory ran out: by the text of an error or a log, or by the kernel's counter."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["is_out_of_memory", "kernel_kills"]

_SIGNS = re.compile(
    r"out of memory|outofmemory|can't allocate memory|cannot allocate memory|MemoryError"
    r"|std::bad_alloc|no available memory for the cache blocks"
    r"|available memory on node .* is less than requested"
    r"|larger than the available KV cache memory|less than desired GPU memory utilization",
    re.IGNORECASE,
)


def is_out_of_memory(text: str) -> bool:
    """Whether the text of an error says that memory ran out (torch, CUDA, C++, vLLM)."""
    return _SIGNS.search(text) is not None


def kernel_kills() -> int | None:
    """How many processes the kernel has ended for memory since it started; None if unknown."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
