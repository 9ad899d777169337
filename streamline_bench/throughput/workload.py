"""What every model is asked to generate, and how its process runs."""

from __future__ import annotations

import os
import random
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.throughput.meters import visible_device

Clock = Literal["wall", "cpu"]
"""What tokens are counted against: seconds that passed, or processor seconds that were spent."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]

MOST_BLOCKS = 50
"""The most blocks that are measured for the sake of a precision."""


class Workload(Frozen):
    """Offline batches of fixed length: every prompt and every output has exactly these tokens.

    Attributes:
        batch_sizes: sequences generated at once, one sweep point each.
        prompt_tokens, output_tokens: per sequence; the end-of-sequence token is ignored.
        blocks: each starts every model's process anew, in random order, and measures every point.
            With ``until_precision``, the fewest.
        until_precision: go on until half the width of every ratio's interval is below this share of
            the ratio, at most :data:`MOST_BLOCKS` blocks.
        minutes: start no block that would not end by then; the first one is always measured.
        self_check: measure the dense model a second time, as if it were another model.
        rounds: measured rounds of every model at every point of a block; models take turns.
        warmup_rounds: rounds before them, not counted.
        seed: of the prompts, of the order of the models and of the bootstrap.
        prefix_caching: let the engine reuse keys and values of prompts it has seen.
    """

    batch_sizes: tuple[Positive, ...] = (1, 8, 32)
    prompt_tokens: Positive = 128
    output_tokens: Positive = 128
    blocks: Positive = 3
    until_precision: Annotated[float, Field(gt=0, lt=1)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    self_check: bool = False
    rounds: Positive = 6
    warmup_rounds: Annotated[int, Field(ge=0)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    prefix_caching: bool = False

    @field_validator("batch_sizes")
    @classmethod
    def _some_once(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes:
            raise ValueError("at least one batch size is needed")
        return tuple(dict.fromkeys(sizes))

    @property
    def sequence_tokens(self) -> int:
        """Prompt and output of one sequence."""
        return self.prompt_tokens + self.output_tokens

    @property
    def steps(self) -> int:
        """Starts and rounds of one model in one block."""
        return 1 + len(self.batch_sizes) * (self.rounds + self.warmup_rounds)

    def cost(self, models: int) -> str:
        """What measuring so many models takes, in words."""
        more = "at least " if self.until_precision is not None else ""
        end = "" if self.minutes is None else f", at most about {self.minutes:g} minutes"
        return (
            f"{more}{self.blocks} blocks x {models} models: {self.blocks * models} starts of a "
            f"process, {self.blocks * models * (self.steps - 1)} rounds{end}"
        )


class Setup(Frozen):
    """Settings of every model's process.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``: that of the first model's checkpoint.
        threads: of each process; None: ``OMP_NUM_THREADS``, or one. One is the steady setting on
            a busy machine.
        clock: None: processor time on a processor, wall time on an accelerator.
        eager: no compilation and no captured graphs; None: the engine's default.
        attention: attention implementation of the ``hf`` engine; None: its default.
        kv_cache_bytes: vLLM's cache, equal for all models; None: what the largest batch needs.
        kv_cache_dtype: of vLLM's cache; ``auto``: that of the weights.
        max_model_len: longest sequence that vLLM takes; None: what is asked of it.
        gpus: numbers of the accelerators of each model; empty: as many as ``tensor_parallel``,
            from that of ``device`` on.
        tensor_parallel: accelerators that vLLM splits every layer over.
        timeout: seconds for one round, or for one rate when serving.
        start_timeout: seconds for loading.
        one_at_a_time: load, measure and end each model before the next; needs less memory. None:
            where weights and caches of all models exceed the free memory.
        trust_remote_code: run code that the models bring along.
        pythons: label -> interpreter of the environment that runs a model: two versions of this
            package, or of an engine, in one measurement. Other models have this process's own.
    """

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    dtype: Dtype = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None
    clock: Clock | None = None
    eager: bool | None = None
    attention: str | None = None
    kv_cache_bytes: Annotated[int, Field(ge=1)] | None = None
    kv_cache_dtype: str = "auto"
    max_model_len: Positive | None = None
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()
    tensor_parallel: Positive = 1
    timeout: Annotated[float, Field(gt=0)] = 600.0
    start_timeout: Annotated[float, Field(gt=0)] = 900.0
    one_at_a_time: bool | None = None
    trust_remote_code: bool = False
    pythons: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _enough_gpus(self) -> Setup:
        if self.on_cpu and (self.gpus or self.tensor_parallel > 1):
            raise ValueError(
                f"--gpus and --tensor-parallel-size are about accelerators, and the device is "
                f"'{self.device}'; leave them out, or give --device cuda"
            )
        if len(set(self.gpus)) != len(self.gpus):
            raise ValueError("--gpus names an accelerator twice; name each one once")
        # More than the engine splits a model over would be idle.
        if self.gpus and len(self.gpus) != self.tensor_parallel:
            raise ValueError(
                f"--gpus names {len(self.gpus)} accelerators, and every model is split over "
                f"{self.tensor_parallel}; name as many as --tensor-parallel-size says"
            )
        return self

    @property
    def on_cpu(self) -> bool:
        """Whether a processor runs the models."""
        return self.device == "cpu"

    @property
    def visible_device(self) -> str | None:
        """What ``CUDA_VISIBLE_DEVICES`` is in the models' processes."""
        if self.on_cpu:
            return None
        if not self.gpus and self.tensor_parallel == 1:
            return visible_device(self.device)
        first = int(self.device.partition(":")[2] or 0)
        numbers = self.gpus or range(first, first + self.tensor_parallel)
        return ",".join(visible_device(f"cuda:{number}") for number in numbers)

    @property
    def process_device(self) -> str:
        """The device as a model's process names it: it sees its own accelerators only."""
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


def prompts(
    count: int, length: int, vocab_size: int, seed: int, reserved: frozenset[int] = frozenset()
) -> list[list[int]]:
    """Return ``count`` different prompts of ``length`` token ids below ``vocab_size``.

    The same arguments give the same prompts in every process. ``reserved`` ids (padding, begin and
    end of sequence) are left out.

    Raises:
        ValueError: no token is left to choose from.
    """
    allowed = [token for token in range(vocab_size) if token not in reserved]
    if not allowed:
        raise ValueError(f"a vocabulary of {vocab_size} leaves no token for prompts")
    generator = random.Random(seed)
    return [generator.choices(allowed, k=length) for _ in range(count)]


def chosen_device(device: str) -> str:
    """Return what ``auto`` stands for: ``cuda`` where torch sees such a device, else ``cpu``."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
