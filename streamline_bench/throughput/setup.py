"""How models are run, whatever they are asked: device, dtype, limits of time and memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from streamline_bench.core.recipe.frozen import Frozen
from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.footprint import Footprint
from streamline_bench.throughput.nvml import visible_device
from streamline_bench.throughput.workload import Clock

__all__ = ["DTYPE_BYTES", "Setup", "cache_bytes", "chosen_device", "resolved_dtype"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number in each dtype that engines run in."""
_BLOCK = 128  # tokens: the largest block of vLLM's platforms
_SMALLEST_CACHE = 1 << 24
_UNKNOWN_CACHE = 1 << 30


class Setup(Frozen):
    """Settings of every model's process.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``: that of the first model's checkpoint.
        threads: of each process; None: ``OMP_NUM_THREADS``, or one. One is the steady setting on
            a busy machine.
        clock: None: processor time on a processor, wall time on an accelerator.
        eager: no compilation and no captured graphs; None: as the engine sees fit.
        attention: attention implementation of the ``hf`` engine; None: its default.
        kv_cache_bytes: vLLM's cache, equal for all models; None: what the largest batch needs.
        timeout: seconds for one round, or for one rate when serving.
        start_timeout: seconds for loading.
        one_at_a_time: load, measure and end each model before the next, for want of memory.
        trust_remote_code: run code that the models bring along.
    """

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Dtype = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    clock: Clock | None = None
    eager: bool | None = None
    attention: str | None = None
    kv_cache_bytes: Annotated[int, Field(ge=1)] | None = None
    timeout: Annotated[float, Field(gt=0)] = 600.0
    start_timeout: Annotated[float, Field(gt=0)] = 900.0
    one_at_a_time: bool = False
    trust_remote_code: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether a processor runs the models."""
        return self.device == "cpu"

    @property
    def visible_device(self) -> str | None:
        """The entry of ``CUDA_VISIBLE_DEVICES`` that the models' processes get."""
        return None if self.on_cpu else visible_device(self.device)

    @property
    def process_device(self) -> str:
        """The device as a model's process names it: it sees one accelerator only."""
        return "cpu" if self.on_cpu else "cuda"

    @property
    def resolved_clock(self) -> Clock:
        """The clock that the shown figures count against."""
        return self.clock or ("cpu" if self.on_cpu else "wall")

    @property
    def resolved_threads(self) -> int:
        """Threads of each process."""
        given = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(given) if given.isdigit() and int(given) else 1)


def chosen_device(device: str) -> str:
    """Return what ``auto`` stands for: ``cuda`` where torch sees such a device, else ``cpu``."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolved_dtype(dtype: str, stored: Iterable[str | None]) -> str:
    """Return the dtype to run in: ``auto`` is the first that a checkpoint names.

    Raises:
        ThroughputError: a checkpoint names one that no engine here runs in.
    """
    if dtype != "auto":
        return dtype
    named = next((name for name in stored if name), "float32").removeprefix("torch.")
    if named not in DTYPE_BYTES:
        raise ThroughputError(
            f"The first model's dtype is '{named}'; give --dtype {', '.join(DTYPE_BYTES)}."
        )
    return named


def cache_bytes(
    footprints: Iterable[Footprint], sequences: int, sequence_tokens: int, dtype: str
) -> int:
    """Return the size of a cache of keys and values that holds the largest batch of any model."""
    values = [f.kv_values_per_token for f in footprints if f.kv_values_per_token]
    if not values:
        return _UNKNOWN_CACHE
    blocks = -(-sequence_tokens // _BLOCK) + 1
    needed = max(values) * DTYPE_BYTES[dtype] * sequences * blocks * _BLOCK
    return max(_SMALLEST_CACHE, needed)
