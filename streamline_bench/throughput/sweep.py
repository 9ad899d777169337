"""The models of a measurement, each with its engine in a process of its own, and the sweep over
batch sizes: models take turns; after running out of memory, half the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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


@dataclass
class RunningModel:
    """A contender's process, started when it is first needed and again after a failure.

    Attributes:
        job: ``module:Class`` of what the process does, and ``doing``: its start, in words.
    """

    job: ClassVar[str] = f"{__name__}:OfflineJob"
    doing: ClassVar[str] = "loading the model"

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

    def start(self) -> None:
        """Load the model; a failure that cannot be mended ends up in the contender."""
        while self._process is None and self.contender.alive:
            try:
                self._load()
            except WorkerError as failure:
                if not self.may_retry(failure):
                    self.contender.failure = failure.reason

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

    def environment(self) -> Mapping[str, str]:
        """Return the variables that the engine needs."""
        return self.engine.environment(self.settings)

    def arguments(self) -> dict[str, Any]:
        """Return what the job has to know to load the model, besides its settings."""
        return {"engine": self.engine_name}

    def _load(self) -> None:
        started, limit = time.perf_counter(), self.setup.start_timeout
        # What is left at its default may be unknown to the version that runs in --python.
        settings = self.settings.model_dump(exclude_defaults=True)
        visible, python = self.setup.visible_device, self.setup.pythons.get(self.contender.label)
        environment = process_environment(self.environment(), self.settings, visible)
        process = ModelProcess(self.job, environment, self.log, python)
        answer = process.ask("load", self.doing, limit, settings=settings, **self.arguments())
        self._process = process
        if self.contender.loaded is None:
            self.contender.start_seconds = time.perf_counter() - started
        self.contender.loaded = Loaded.model_validate(answer)

    def may_retry(self, failure: WorkerError) -> bool:
        """Whether to start again: for half the batch, where memory ran out for the whole one."""
        batch = self.settings.max_batch
        if not (failure.out_of_memory and self.engine.sized_at_load and batch > 1):
            return False
        half = batch // 2
        self.contender.notes.append(
            f"out of memory when started for a batch of {batch}; started for {half}"
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
            numbers = range(asked.tensor_parallel)
            own = ",".join(visible_device(f"cuda:{number}") for number in numbers)
            self._device, _ = open_device(own)
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
                f"The request was {batch} sequences of {output_tokens} tokens, the engine gave "
                f"{len(lengths)} of {min(lengths, default=0)} to {max(lengths, default=0)} tokens."
            )
        return {
            **reading._asdict(), "requests": len(lengths), "prompt_tokens": sum(map(len, asked)),
            "output_tokens": sum(lengths), "device_peak_bytes": self._engine.device_peak_bytes(),
        }  # fmt: skip


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


@dataclass
class Measured:
    """What one model gave at one point of the sweep."""

    batch_requested: int
    batch_size: int
    notes: list[str] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    reason: str | None = None


class _OutOfMemoryError(Exception):
    def __init__(self, model: RunningModel, reason: str) -> None:
        super().__init__(reason)
        self.model = model
        self.reason = reason


def sweep(
    models: Sequence[RunningModel],
    workload: Workload,
    advance: Callable[[], object],
    held: Mapping[int, int],
) -> dict[str, list[Measured]]:
    """Measure all models at every batch size of the workload.

    Args:
        models: those to take turns; they are started and ended here.
        advance: called when a model was started, and after every round of every model.
        held: batch size of the workload -> the one to begin with, where memory ran out before.

    Returns:
        The points of each model, by label, in the workload's order.
    """
    points: dict[str, list[Measured]] = {model.contender.label: [] for model in models}
    try:
        for model in models:
            model.start()
            advance()
        for batch in workload.batch_sizes:
            start = held.get(batch, batch)
            for label, measured in _point(models, batch, start, workload, advance).items():
                points[label].append(measured)
    finally:
        for model in models:
            model.hang_up()  # all at once: an engine may take seconds to clean up
        for model in models:
            model.close()
    return points


def _point(
    models: Sequence[RunningModel],
    requested: int,
    start: int,
    workload: Workload,
    advance: Callable[[], object],
) -> dict[str, Measured]:
    """Measure one point, at the largest batch up to ``start`` that every model holds."""
    batch, notes = start, list[str]()
    while True:
        batch = _within_capacity(models, batch, notes)
        measured = {m.contender.label: Measured(requested, batch, [*notes]) for m in models}
        try:
            _rounds(models, measured, workload, advance)
        except _OutOfMemoryError as out:
            label = out.model.contender.label
            if batch == 1:
                # Only this model fails: the others may hold the requested batch.
                out.model.contender.failure = f"out of memory with a batch of one: {out.reason}"
                batch, notes = start, []
                continue
            notes.append(
                f"{label} ran out of memory with a batch of {batch}; "
                f"{_who(models)} measured with {batch // 2}"
            )
            batch //= 2
            continue
        return measured


def _within_capacity(models: Sequence[RunningModel], batch: int, notes: list[str]) -> int:
    for model in models:
        limited = model.engine.sized_at_load and model.contender.alive
        if limited and model.settings.max_batch < batch:
            batch = model.settings.max_batch
            notes.append(
                f"{model.contender.label} could be started for a batch of {batch} only; "
                f"{_who(models)} measured with that"
            )
    return batch


def _who(models: Sequence[RunningModel]) -> str:
    return "all models were" if len(models) > 1 else "it was"


def _rounds(
    models: Sequence[RunningModel],
    measured: dict[str, Measured],
    workload: Workload,
    advance: Callable[[], object],
) -> None:
    for index in range(-workload.warmup_rounds, workload.rounds):
        first = index % len(models)  # rotates, so that no model always follows another
        for model in [*models[first:], *models[:first]]:
            point = measured[model.contender.label]
            if model.contender.alive:
                _one_round(model, point, workload, index)
            point.reason = model.contender.failure
            advance()


def _one_round(model: RunningModel, point: Measured, workload: Workload, index: int) -> None:
    try:
        found, peak = model.round(point.batch_size, workload, index)
    except WorkerError as failure:
        if failure.out_of_memory:
            raise _OutOfMemoryError(model, failure.reason) from failure
        model.contender.failure = failure.reason
        return
    if index >= 0:
        point.rounds.append(found)
    if peak is not None:
        point.peak_memory_bytes = max(point.peak_memory_bytes or 0, peak)
