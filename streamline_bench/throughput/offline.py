"""What the process of a model does in an offline measurement: load, then run rounds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.engines import Engine, EngineSettings, engine_class
from streamline_bench.throughput.meters import Stopwatch
from streamline_bench.throughput.nvml import Device, open_device, visible_device
from streamline_bench.throughput.workload import prompts

__all__ = ["JOB", "OfflineJob"]

JOB = f"{__name__}:OfflineJob"


class OfflineJob:
    """Holds one engine with one model. All arguments and answers are plain JSON."""

    _engine: Engine
    _device: Device | None = None

    def load(self, engine: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Load the model and return :class:`Loaded` as JSON."""
        asked = EngineSettings.model_validate(settings)
        self._engine = engine_class(engine)()
        loaded = self._engine.load(asked)
        if not asked.on_cpu:
            self._device, _ = open_device(visible_device("cuda"))
        self._vocab, self._reserved = loaded.vocab_size, frozenset(loaded.reserved)
        return loaded.model_dump()

    def round(self, batch: int, prompt_tokens: int, output_tokens: int, seed: int) -> Any:
        """Generate one batch and return what it cost.

        Raises:
            ThroughputError: the engine did not return exactly the tokens asked for.
        """
        asked = prompts(batch, prompt_tokens, self._vocab, seed, self._reserved)
        watch = Stopwatch(self._device)
        lengths = self._engine.generate(asked, output_tokens)
        reading = watch.read()
        if lengths != [output_tokens] * batch:
            raise ThroughputError(
                f"{batch} sequences of {output_tokens} tokens were asked for, the engine gave "
                f"{len(lengths)} of {min(lengths, default=0)} to {max(lengths, default=0)} tokens."
            )
        return {
            **asdict(reading),
            "requests": len(lengths),
            "prompt_tokens": sum(map(len, asked)),
            "output_tokens": sum(lengths),
            "device_peak_bytes": self._engine.device_peak_bytes(),
        }
