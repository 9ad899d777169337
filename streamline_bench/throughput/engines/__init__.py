"""Engines: one way each to load one model and generate exact numbers of tokens; and their names."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.core.recipe.validation import suggest
from streamline_bench.errors import ThroughputError

__all__ = ["ENGINES", "Engine", "EngineSettings", "Loaded", "engine_class"]

ENGINES: Mapping[str, str] = {
    "hf": "streamline_bench.throughput.engines.hf:TransformersEngine",
    "vllm": "streamline_bench.throughput.engines.vllm:VLLMEngine",
}
"""Name -> ``module:Class``."""


class EngineSettings(Frozen):
    """How one model is loaded; it travels to the model's process as JSON.

    Other fields are those of :class:`~streamline_bench.throughput.workload.Setup`.

    Attributes:
        model: folder of the checkpoint.
        device: ``cpu``, or ``cuda`` (one device is visible to the process).
        dtype: torch's name of the dtype of weights and activations.
        max_batch: the largest batch.
        sequence_tokens: prompt and output of one sequence.
        kv_cache_bytes: size of a preallocated cache, for engines that have one; of one accelerator.
        kv_cache_dtype: dtype of that cache; ``auto``: that of the weights.
        tensor_parallel: accelerators that every layer is split over.
    """

    model: str
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    max_batch: int = 1
    sequence_tokens: int
    seed: int = 0
    prefix_caching: bool = False
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    tensor_parallel: int = 1
    eager: bool | None = None
    attention: str | None = None
    trust_remote_code: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether the processor runs the model."""
        return self.device == "cpu"


class Loaded(BaseModel):
    """What an engine says of a model once it is loaded.

    Attributes:
        reserved: token ids that prompts must not contain.
        kv_cache_tokens: tokens its preallocated cache holds; None if it has none.
        device_name: the accelerator's model; None on a processor.
        flags: the settings it really runs with.
        versions: of the engine and of what it stands on.
    """

    model_config = ConfigDict(extra="forbid")

    vocab_size: int
    reserved: list[int] = Field(default_factory=list)
    kv_cache_tokens: int | None = None
    device_name: str | None = None
    engine_version: str | None = None
    flags: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


class Engine(ABC):
    """One way to run a model. Modules of engines import their libraries inside methods only.

    Attributes:
        sized_at_load: memory for the whole batch is taken when the model is loaded.
    """

    sized_at_load: ClassVar[bool] = False

    @classmethod  # noqa: B027 - most engines need nothing beyond the package
    def require(cls) -> None:
        """Check that the engine's library is installed.

        Raises:
            MissingDependencyError: with the line that installs it.
        """

    @classmethod
    def environment(cls, settings: EngineSettings) -> Mapping[str, str]:
        """Environment variables that must be set before the model's process starts."""
        return {}

    @abstractmethod
    def load(self, settings: EngineSettings) -> Loaded:
        """Load the model; called once, before anything else."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[int]:
        """Generate greedily, all prompts as one batch, and return once the device is done.

        Returns:
            The number of tokens that each sequence really got.
        """

    def device_peak_bytes(self) -> int | None:
        """Peak of accelerator memory since the last call; None if it is read from outside."""
        return None


def engine_class(name: str) -> type[Engine]:
    """Return the class of an engine, given its name or ``module:Class``.

    Raises:
        ThroughputError: the name is unknown.
    """
    if ":" not in name and name not in ENGINES:
        raise ThroughputError(f"Unknown engine '{name}'{suggest(name, list(ENGINES))}")
    module, _, attribute = ENGINES.get(name, name).partition(":")
    found: type[Engine] = getattr(importlib.import_module(module), attribute)
    return found
