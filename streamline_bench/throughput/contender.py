"""One model of a measurement: its state, its engine's process, and what that process does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.engines import Engine, EngineSettings, Loaded, engine_class
from streamline_bench.throughput.footprint import Footprint
from streamline_bench.throughput.meters import (
    Device,
    PeakMemory,
    Stopwatch,
    open_device,
    visible_device,
)
from streamline_bench.throughput.process import ModelProcess, WorkerError
from streamline_bench.throughput.record import Round
from streamline_bench.throughput.workload import Setup, Workload, prompts


@dataclass
class Contender:
    """A model in (or before) its process.

    Attributes:
        label, model: its name in the record, and the folder or hub name as it was given.
        folder: where it lies; None if it was not found.
        footprint: its sizes; None if the checkpoint could not be read.
        failure: why it can no longer be measured; None while it can.
        loaded: the engine's facts from the first load, which took ``start_seconds``.
    """

    label: str
    model: str
    folder: Path | None
    footprint: Footprint | None
    failure: str | None = None
    notes: list[str] = field(default_factory=list)
    loaded: Loaded | None = None
    start_seconds: float | None = None

    @property
    def alive(self) -> bool:
        """Whether it can still be measured."""
        return self.failure is None

    def fail(self, reason: str) -> None:
        """Measure this model no more; its results so far stay."""
        self.failure = reason


@dataclass
class RunningModel:
    """A contender's engine process, started when it is first needed and again after a failure.

    Attributes:
        capacity: the largest batch that the engine is started for.
    """

    contender: Contender
    engine_name: str
    settings: EngineSettings
    setup: Setup
    log: Path
    device: Device | None = None
    _process: ModelProcess | None = None

    @property
    def engine(self) -> type[Engine]:
        """The engine's class."""
        return engine_class(self.engine_name)

    @property
    def capacity(self) -> int:
        """Largest batch it takes; for engines that size their memory when they are loaded."""
        return self.settings.max_batch

    def start(self) -> None:
        """Load the model; where its memory runs out, again for half the batch, down to one.

        A failure ends up in the contender.
        """
        while self._process is None and self.contender.alive:
            try:
                self._load()
            except WorkerError as failure:
                if not self._can_shrink(failure):
                    self.contender.fail(failure.reason)

    def round(self, batch: int, workload: Workload, index: int) -> tuple[Round, int | None]:
        """Run one round; return it and the peak of memory in bytes.

        Raises:
            WorkerError: the process failed; it is gone.
        """
        self.start()
        process = self._process
        if process is None:
            raise WorkerError(self.contender.failure or "the model could not be started")
        try:
            with PeakMemory(process.pid, self.device) as peak:
                answer: dict[str, Any] = process.ask(
                    "round",
                    f"generating {batch} x {workload.output_tokens} tokens",
                    self.setup.timeout,
                    batch=batch,
                    prompt_tokens=workload.prompt_tokens,
                    output_tokens=workload.output_tokens,
                    seed=workload.seed,
                )
        except WorkerError:
            self._process = None
            raise
        on_device = answer.pop("device_peak_bytes")
        return Round(index=index, **answer), on_device or peak.bytes

    def hang_up(self) -> None:
        """Ask the process to end, without waiting for it."""
        if self._process is not None:
            self._process.hang_up()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def _load(self) -> None:
        started = time.perf_counter()
        environment = process_environment(
            self.engine.environment(self.settings), self.settings, self.setup.visible_device
        )
        process = ModelProcess(f"{__name__}:OfflineJob", environment, self.log)
        answer = process.ask(
            "load",
            "loading the model",
            self.setup.start_timeout,
            engine=self.engine_name,
            settings=self.settings.model_dump(),
        )
        self._process = process
        if self.contender.loaded is None:
            self.contender.start_seconds = time.perf_counter() - started
        self.contender.loaded = Loaded.model_validate(answer)

    def _can_shrink(self, failure: WorkerError) -> bool:
        if not (failure.out_of_memory and self.engine.sized_at_load and self.capacity > 1):
            return False
        half = self.capacity // 2
        self.contender.notes.append(
            f"out of memory when started for a batch of {self.capacity}; started for {half}"
        )
        cache = self.settings.kv_cache_bytes
        smaller = {"max_batch": half, "kv_cache_bytes": max(1, cache // 2) if cache else cache}
        self.settings = self.settings.model_copy(update=smaller)
        return True


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


def process_environment(
    of_engine: Mapping[str, str], settings: EngineSettings, visible: str | None
) -> Mapping[str, str]:
    """Return the additional environment variables of a model's process."""
    environment = {
        "OMP_NUM_THREADS": str(settings.threads),
        "TOKENIZERS_PARALLELISM": "false",
        **of_engine,
    }
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    return environment
