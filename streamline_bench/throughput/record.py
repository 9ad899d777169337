"""``throughput.json``: everything that was measured, and on what.

Times are seconds unless a name ends in ``_ms``; sizes are bytes. A value that could not
be measured is null; where the reason is not obvious, the next field gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from streamline_bench.core.files import atomic_write_text, read_json, validated
from streamline_bench.core.recipe.schema import Frozen
from streamline_bench.errors import ThroughputError
from streamline_bench.throughput.workload import Clock, ServingLoad, Workload

RECORD_NAME = "throughput.json"
SCHEMA_VERSION = 2

Status = Literal["ok", "failed"]


class _Recorded(Frozen):
    model_config = ConfigDict(ser_json_inf_nan="strings")  # a request rate may be infinite


class Round(_Recorded):
    """One measured round of one model.

    Attributes:
        block: number of the block, in which every model's process was started anew.
        index: number of the round in its block; rounds of equal block and number, of different
            models, lie side by side.
        seconds: wall time of the whole batch.
        cpu_seconds: processor time of the model's process and its children.
        requests, prompt_tokens, output_tokens: what the engine returned, counted.
        energy_joules: what the device drew, idle draw included; None where it cannot be read.
    """

    block: int = 0
    index: int
    seconds: float
    cpu_seconds: float
    requests: int
    prompt_tokens: int
    output_tokens: int
    energy_joules: float | None = None


class Rate(_Recorded):
    """Median over rounds, smallest and largest."""

    median: float
    low: float
    high: float


class Ratio(_Recorded):
    """Model / dense: the geometric mean over blocks, with Student's interval over the blocks.

    Attributes:
        low, high: None with one block, which does not show what another start would give.
        blocks: those in which both ran.
        median: median over the blocks, and its interval by a hierarchical bootstrap (blocks, then
            rounds in a block), which is too narrow for few blocks. None in records of schema 1,
            whose interval was over the rounds of one process.
    """

    value: float
    low: float | None
    high: float | None
    blocks: int = 1
    median: float | None = None
    median_low: float | None = None
    median_high: float | None = None


class Ideal(_Recorded):
    """By how much the model would be faster if only its size counted.

    Attributes:
        ratio: the one to be measured against: of the times that a device with the ridge ``ridge``
            (operations per byte) needs at least for a batch, see :mod:`~.footprint`. It lies
            between the next two.
        bytes: dense bytes moved for a batch (weights that are read, keys and values) / this
            model's. None in records of schema 1.
        flops: dense floating-point operations of a batch / this model's.
        layers: dense decoder layers / this model's.
        weights: dense bytes of stored weights / this model's.
        kind: ``layers`` and ``flops`` in records of schema 1, whose ratio was one of these.
    """

    kind: Literal["roofline", "layers", "flops"]
    ratio: float
    bytes: float | None = None
    flops: float
    layers: float | None
    weights: float
    ridge: float | None = None


class Point(_Recorded):
    """One model at one batch size.

    ``output_tokens_per_second`` uses the record's clock; the next two fields use one clock each.
    ``batch_size`` is smaller than ``batch_requested`` where memory ran out (see ``notes``).
    """

    batch_requested: int
    batch_size: int
    status: Status
    reason: str | None = None
    notes: tuple[str, ...] = ()
    rounds: tuple[Round, ...] = ()
    output_tokens_per_second: Rate | None = None
    output_tokens_per_wall_second: float | None = None
    output_tokens_per_cpu_second: float | None = None
    total_tokens_per_second: float | None = None
    requests_per_second: float | None = None
    ratio: Ratio | None = None
    ideal: Ideal | None = None
    peak_memory_bytes: int | None = None
    energy_joules_per_token: float | None = None


class Latency(_Recorded):
    """Milliseconds over all requests of one rate."""

    mean: float
    p50: float
    p90: float
    p99: float


class ServingPoint(_Recorded):
    """One model served at one request rate.

    ``ttft``: time to first token; ``tpot``: time per output token after it; ``itl``: between
    tokens as they arrive; ``e2el``: from request to last token.
    """

    request_rate: float
    status: Status
    reason: str | None = None
    completed: int = 0
    seconds: float | None = None
    requests_per_second: float | None = None
    output_tokens_per_second: float | None = None
    total_tokens_per_second: float | None = None
    ttft: Latency | None = None
    tpot: Latency | None = None
    itl: Latency | None = None
    e2el: Latency | None = None


class ModelResult(_Recorded):
    """One model.

    Attributes:
        model: folder or hub name as it was given.
        status: ``ok`` if at least one point was measured; ``reason`` is the first failure.
        kv_bytes_per_token: keys and values of one token over all layers.
        kv_cache_tokens: tokens that the engine's cache holds; None for engines without a fixed one.
        start_seconds: from starting the process to the loaded model.
    """

    label: str
    model: str
    status: Status
    reason: str | None = None
    notes: tuple[str, ...] = ()
    parameters: int | None = None
    layers: int | None = None
    weights_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    kv_cache_tokens: int | None = None
    start_seconds: float | None = None
    points: tuple[Point, ...] = ()
    serving: tuple[ServingPoint, ...] = ()


class Environment(_Recorded):
    """Where it was measured.

    Attributes:
        machine_id: equal on equal machines (processor, cores, accelerators, host), not reversible.
        device_name: model of the processor or accelerator that ran the models.
        load_average: of one minute, before and after; None where the system has none.
        memory: how ``peak_memory_bytes`` was read.
        energy: how energy was read, or why it was not.
    """

    machine_id: str
    device: str
    device_name: str
    driver: str | None
    cpu_count: int
    threads: int
    engine_version: str | None
    versions: dict[str, str]
    load_average: tuple[float | None, float | None] = (None, None)
    memory: str
    energy: str


class PaperFigure(_Recorded):
    """One row of the paper's table."""

    name: str
    tokens_per_second: float
    ratio: float


_DENSE = 19.87
_ROWS = (
    ("dense", _DENSE),
    ("LLM-Streamline, no replacement or a layer", 25.68),
    ("LLM-Streamline, FFN", 25.88),
    ("SliceGPT", 27.20),
    ("LLM-Pruner", 25.91),
)

PAPER_FIGURES = tuple(
    PaperFigure(name=name, tokens_per_second=speed, ratio=speed / _DENSE) for name, speed in _ROWS
)
"""Output tokens per second of Llama-2-7B at about 25 % sparsity (LLM-Streamline, arXiv 2403.19135).

The paper gives no engine, device or lengths. 19.87 tokens/s for a dense 7 B model looks like
transformers without compilation, one sequence at a time, so paper mode runs that. Only the ratios
to dense compare with another machine.
"""


class ThroughputRecord(_Recorded):
    """A whole measurement.

    Attributes:
        dense: label of the reference model; None if none was named.
        dtype: of weights and activations.
        clock: what ``output_tokens_per_second`` and the ratios count against.
        interleaved: the models took turns round by round; else one after the other.
        blocks: those that were measured; in each one, every model's process was started anew.
        stopped: why there are fewer than asked for, or less precision; None if all was reached.
        self_check: label of the copy of the dense model; None without one.
        flags: the engine's settings.
        paper: the paper's figures, in paper mode only.
    """

    schema_version: int = SCHEMA_VERSION
    created: str
    engine: str
    mode: Literal["offline", "paper", "serving"]
    dense: str | None
    dtype: str
    clock: Clock
    confidence: float
    interleaved: bool
    blocks: int = 1
    stopped: str | None = None
    self_check: str | None = None
    workload: Workload
    serving_load: ServingLoad | None = None
    flags: dict[str, Any] = Field(default_factory=dict)
    environment: Environment
    models: tuple[ModelResult, ...]
    paper: tuple[PaperFigure, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_schema_1(cls, data: Any) -> Any:
        """Read a record of one block, whose ideal was a model's and not a point's."""
        if not isinstance(data, dict) or data.get("schema_version") != 1:
            return data
        workload, models = data.get("workload"), data.get("models")
        if isinstance(workload, dict):
            data = {**data, "workload": {"blocks": 1, **workload}}
        if isinstance(models, list):
            data = {**data, "models": [_with_ideals(model) for model in models]}
        return data

    def model(self, label: str) -> ModelResult | None:
        """Return one model's result, None if it is not in the record."""
        return next((result for result in self.models if result.label == label), None)


def _with_ideals(model: Any) -> Any:
    if not isinstance(model, dict) or not isinstance(model.get("points", []), list):
        return model
    kept = {key: value for key, value in model.items() if key != "ideal"}
    points = [
        {"ideal": model.get("ideal"), **point} if isinstance(point, dict) else point
        for point in model.get("points", [])
    ]
    return {**kept, "points": points}


def write_record(record: ThroughputRecord, folder: Path) -> Path:
    """Write ``throughput.json`` into ``folder`` in one step and return its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / RECORD_NAME
    atomic_write_text(path, record.model_dump_json(indent=2) + "\n")
    return path


def read_record(path: Path) -> ThroughputRecord:
    """Read a ``throughput.json``, or the one in a folder.

    Raises:
        ThroughputError: it is missing, damaged, or of a newer schema.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECORD_NAME
    advice = "measure again"
    return validated(
        ThroughputRecord,
        read_json(path, ThroughputError, advice),
        str(path),
        newest=SCHEMA_VERSION,
        error=ThroughputError,
        advice=advice,
    )


class Speed(Frozen):
    """The speed of a model at one batch size (see ``streamline-bench throughput``).

    Attributes:
        batch_size: the largest that was measured for the dense model (0: nothing was measured).
        output_tokens_per_second: median by ``clock``; ``low`` and ``high`` are its extremes.
        ratio: to dense in the same measurement, with the ends of its interval; None without a dense
            result.
        blocks: starts of every model's process; with one, the ratio has no interval (in files of
            versions before blocks, one over the rounds of one process).
        self_ratio: of a copy of the dense model to it, with its interval: what is noise.
        ideal_ratio: what the ratio would be if only size counted.
        ttft_ms: median time to first token at the lowest request rate, where it was served.
        mode, engine_version, threads, prompt_tokens, output_tokens: how it was measured, and on
            sequences of what length; with ``request_load``, the rates and numbers of requests where
            it was served. None in files of versions that did not note them.
    """

    status: Literal["ok", "failed"]
    reason: str | None = None
    engine: str
    device: str
    dtype: str
    clock: Literal["wall", "cpu"] | None = None
    batch_size: int
    output_tokens_per_second: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    blocks: int | None = None
    self_ratio: float | None = None
    self_ratio_low: float | None = None
    self_ratio_high: float | None = None
    ideal_ratio: float | None = None
    weights_bytes: int | None = None
    peak_memory_bytes: int | None = None
    kv_cache_tokens: int | None = None
    ttft_ms: float | None = None
    start_seconds: float | None = None
    mode: Literal["offline", "paper", "serving"] | None = None
    engine_version: str | None = None
    threads: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    request_load: str | None = None

    @property
    def noise_floor(self) -> Ratio | None:
        """What a copy of the dense model has of its speed, where that was measured."""
        if self.self_ratio is None:
            return None
        return Ratio(value=self.self_ratio, low=self.self_ratio_low, high=self.self_ratio_high)


class ThroughputFigures(Speed):
    """The speed of the model that the measurement calls ``label``."""

    label: str


def read_figures(path: Path | str) -> dict[str, ThroughputFigures]:
    """Read a ``throughput.json`` (or the one in a folder) as one line per model, by label.

    Raises:
        ThroughputError: it is missing, damaged, or of a newer schema.
    """
    return figures_of(read_record(Path(path)))


def figures_of(record: ThroughputRecord) -> dict[str, ThroughputFigures]:
    """Return one line per model, at the largest batch that the dense model ran.

    Without a dense model, or where it failed, each model's own largest batch is shown.
    """
    dense = record.model(record.dense) if record.dense is not None else None
    shown = _largest(dense) if dense is not None else None
    batch = None if shown is None else shown.batch_requested
    return {model.label: _figures(record, model, batch) for model in record.models}


def _largest(model: ModelResult) -> Point | None:
    measured = [point for point in model.points if point.status == "ok"]
    return max(measured, key=lambda point: point.batch_size, default=None)


def _shown(model: ModelResult, batch: int | None) -> Point | None:
    if batch is None:
        return _largest(model) or next(iter(model.points), None)
    return next((point for point in model.points if point.batch_requested == batch), None)


def floor_of(record: ThroughputRecord, batch: int | None) -> Ratio | None:
    """Return the ratio of the copy of the dense model to it; None where it was not measured."""
    copy = record.model(record.self_check) if record.self_check is not None else None
    point = _shown(copy, batch) if copy is not None else None
    return point.ratio if point is not None else None


def _figures(record: ThroughputRecord, model: ModelResult, batch: int | None) -> ThroughputFigures:
    point = _shown(model, batch)
    measured: dict[str, Any] = {"batch_size": 0}
    if point is not None:
        rate, ratio = point.output_tokens_per_second, point.ratio
        measured = {"batch_size": point.batch_size, "peak_memory_bytes": point.peak_memory_bytes}
        if rate is not None:
            measured |= {"output_tokens_per_second": rate.median}
            measured |= {"low": rate.low, "high": rate.high}
        if ratio is not None:
            measured |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
            measured |= {"blocks": ratio.blocks}
        measured["ideal_ratio"] = point.ideal.ratio if point.ideal is not None else None
        if (floor := floor_of(record, point.batch_requested)) is not None:
            measured |= {"self_ratio": floor.value}
            measured |= {"self_ratio_low": floor.low, "self_ratio_high": floor.high}
    served = [found for found in model.serving if found.status == "ok"]
    if served:
        slowest = min(served, key=lambda found: found.request_rate)
        measured["ttft_ms"] = slowest.ttft.p50 if slowest.ttft is not None else None
        fastest = max(found.output_tokens_per_second or 0.0 for found in served)
        measured.setdefault("output_tokens_per_second", fastest)
    failed = "output_tokens_per_second" not in measured
    reason = point.reason if point is not None and point.reason else model.reason
    return ThroughputFigures(
        label=model.label, status="failed" if failed else "ok",
        reason=(reason or "nothing was measured") if failed else None, engine=record.engine,
        device=record.environment.device_name, dtype=record.dtype, clock=record.clock, **measured,
        weights_bytes=model.weights_bytes, kv_cache_tokens=model.kv_cache_tokens,
        start_seconds=model.start_seconds, mode=record.mode,
        engine_version=record.environment.engine_version, threads=record.environment.threads,
        prompt_tokens=record.workload.prompt_tokens, output_tokens=record.workload.output_tokens,
        request_load=None if record.serving_load is None else record.serving_load.described,
    )  # fmt: skip
